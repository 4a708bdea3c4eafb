"""Tiny random weights under the names of the published files, so that the shipped workflows run as they are."""

from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import save_file

from sana_core.checkpoint import CONFIG_KEY, config_tensor, save_dc_ae, save_text_encoder, save_transformer
from sana_core.config import TRANSFORMERS
from sana_core.published import PUBLISHED, PublishedFile
from tests import loras, tiny

SIZE = {"width": 96, "height": 64}
TRAINING = {"resolution": "256", "steps": 2, "batch_size": 2, "sample_every": 2}
FEATURES = ("qk_norm", "guidance_embed", "timestep_scale", "pos_embed_base", "pos_embed_interpolation", "shift")
FILES = {file.filename: file for file in PUBLISHED.values()}
LORA = "my_sana_lora.safetensors"


def make(workflow: dict, models: Path, inputs: Path) -> None:
    """Write what an API workflow loads: weights into ComfyUI's models, pictures into its inputs."""
    inputs.mkdir(exist_ok=True)
    for node in workflow.values():
        for value in node["inputs"].values():
            if value in list(FILES):
                _make_weights(FILES[value], models / FILES[value].folder / value)
            elif value == LORA:
                _make_lora(models / "loras" / value)
        if node["class_type"] == "LoadImage":
            _make_picture(inputs / node["inputs"]["image"])
        if node["class_type"] == "SanaDataset":
            _make_dataset(inputs / node["inputs"]["folder"])


def ships_with_the_pack(workflow: dict) -> bool:
    """Whether the workflow draws with sana-nano, in its own size."""
    return not any(value in list(FILES) for node in workflow.values() for value in node["inputs"].values())


def shrink(workflow: dict) -> None:
    """A size that tiny weights draw in no time, wherever the workflow names one; and a short training."""
    for node in workflow.values():
        if node["class_type"] in ("SanaDataset", "SanaTrainer"):
            node["inputs"] |= {name: value for name, value in TRAINING.items() if name in node["inputs"]}
        for side, pixels in SIZE.items():
            for name in (side, f"resize_type.{side}"):
                if isinstance(node["inputs"].get(name), int):
                    node["inputs"][name] = pixels


def _make_weights(file: PublishedFile, path: Path) -> None:
    match file.folder:
        case "diffusion_models":
            config = TRANSFORMERS[file.name]
            save_transformer(tiny.transformer(**{name: getattr(config, name) for name in FEATURES}), path)
        case "controlnet":
            net = tiny.controlnet()
            path.parent.mkdir(exist_ok=True)
            torch.save({"state_dict": {**net.state_dict(), CONFIG_KEY: config_tensor(net.config)}}, path)
        case "vae":
            save_dc_ae(tiny.dc_ae(), path)
        case "text_encoders":
            save_text_encoder(tiny.text_encoder(), path)


def _make_lora(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    save_file(loras.flat(loras.factors(tiny.transformer(), ["blocks.1.attn.qkv"])), path)


def _make_dataset(folder: Path) -> None:
    """Four small pictures of noise with their captions."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(4):
        Image.effect_noise((256, 256), 50 + 20 * number).convert("RGB").save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"noise number {number}", encoding="utf-8")


def _make_picture(path: Path) -> None:
    """Noise, whose right half is transparent: ComfyUI takes that for the mask."""
    picture = Image.effect_noise((200, 150), 90).convert("RGBA")
    picture.paste((0, 0, 0, 0), (100, 0, 200, 150))
    picture.save(path)
