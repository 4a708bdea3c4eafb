"""Graphs of ComfyUI_ExtraModels' classes, in the front end's format and in the API's, and what is done to run them.

Written for these tests: each form of each class occurs, with the values that users have in their files.
"""

import copy
import json

from tests.conftest import ROOT

FOLDER = ROOT / "tests" / "fixtures" / "old_graphs"
NAMES = sorted(path.stem for path in FOLDER.glob("*.json"))
SPRINT = [name for name in NAMES if name.startswith("sprint")]
OLD_CLASSES = {
    "EmptyDCAELatentImage", "EmptySanaLatentImage", "ExtraVAELoader", "GemmaLoader", "GemmaTextEncode",
    "SanaCheckpointLoader", "SanaResolutionCond", "SanaResolutionSelect", "SanaTextEncode", "ScmModelSampling",
}  # fmt: skip
FILE_INPUTS = {
    "SanaDiffusionModelLoader": "model_name",
    "SanaTextEncoderLoader": "text_encoder_name",
    "SanaDCAELoader": "vae_name",
}
SPRINT_SETTINGS = {"guidance": 4.5, "denoise": 1.0, "timesteps": ""}


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def ui(name: str) -> dict:
    return read(FOLDER / f"{name}.json")


def api(name: str) -> dict:
    return read(FOLDER / "api" / f"{name}.json")


def nodes_of(prompt: dict, class_type: str) -> list[dict]:
    return [node for node in prompt.values() if node["class_type"] == class_type]


def files(name: str) -> dict[str, str]:
    """Loader -> the file that a user picks."""
    return {loader: "tiny.safetensors" for loader in FILE_INPUTS} | (
        {"SanaDiffusionModelLoader": "sprint.safetensors"} if name in SPRINT else {}
    )


def pick_old_files(prompt: dict, name: str) -> dict:
    """An old prompt with files instead of repositories: what a program changes before it queues it."""
    prompt, picked = copy.deepcopy(prompt), files(name)
    for node in prompt.values():
        inputs = node["inputs"]
        if node["class_type"] == "SanaCheckpointLoader":
            inputs["ckpt_name"] = picked["SanaDiffusionModelLoader"]
        elif node["class_type"] == "GemmaLoader":
            inputs["model_name"] = picked["SanaTextEncoderLoader"]
        elif node["class_type"] == "ExtraVAELoader":
            inputs["vae_name"] = picked["SanaDCAELoader"]
    return prompt


def use_sprint_sampler(prompt: dict) -> dict:
    """The prompt with Sana Sprint Sampler in the place of KSampler, as the help page tells users to."""
    prompt = copy.deepcopy(prompt)
    (sampler,) = nodes_of(prompt, "KSampler")
    kept = {key: sampler["inputs"][key] for key in ("model", "positive", "latent_image", "seed", "steps")}
    sampler |= {"class_type": "SanaSprintSampler", "inputs": kept | SPRINT_SETTINGS}
    return prompt
