"""What the loaders offer, and what their choices come to."""

import json

import pytest
import torch

from sana_core.checkpoint import save_dc_ae, save_transformer
from tests import tiny


@pytest.fixture
def folder(part, tmp_path, monkeypatch):
    """A models folder of its own for each kind."""
    import folder_paths

    for kind in ("diffusion_models", "text_encoders", "vae"):
        (tmp_path / kind).mkdir()
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tmp_path / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def files(part):
    return part("nodes.model_files")


def touch(folder, *names, config=None):
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    if config is not None:
        (folder / "config.json").write_text(config)


def test_files_and_folders_are_listed(folder, files):
    models = folder / "diffusion_models"
    touch(models, "a.safetensors", "notes.txt")
    touch(models / "plain", "b.pth")
    shards = [f"model-0000{number}-of-00002.safetensors" for number in (1, 2)]
    touch(models / "repo" / "transformer", *shards, config=json.dumps({"_class_name": "SanaTransformer2DModel"}))
    touch(models / "repo" / "vae", "c.safetensors", config=json.dumps({"_class_name": "AutoencoderDC"}))
    touch(models / "odd", "d.safetensors", config="{")
    assert files.list_models("diffusion_models") == [
        "a.safetensors",
        "odd/d.safetensors",
        "plain/b.pth",
        "repo/vae/c.safetensors",
        "odd",
        "repo/transformer",
    ]


def test_text_encoder_folders_are_told_by_their_architecture(folder, files):
    touch(folder / "text_encoders" / "gemma", "m.safetensors", config=json.dumps({"architectures": ["Gemma2Model"]}))
    touch(folder / "text_encoders" / "t5", "m.safetensors", config=json.dumps({"architectures": ["T5EncoderModel"]}))
    assert files.list_models("text_encoders") == ["gemma/m.safetensors", "t5/m.safetensors", "gemma"]


def test_paths_stay_inside(folder, files):
    touch(folder / "vae", "a.safetensors")
    assert files.find_model("vae", "a.safetensors") == folder / "vae" / "a.safetensors"
    for name in ("../diffusion_models", "../../etc/passwd", "missing.safetensors"):
        with pytest.raises(FileNotFoundError):
            files.find_model("vae", name)


def test_a_diffusers_folder_loads(folder, part):
    save_transformer(tiny.transformer(), folder / "diffusion_models" / "repo" / "transformer", layout="diffusers")
    save_dc_ae(tiny.dc_ae(), folder / "vae" / "repo" / "vae", layout="diffusers")
    loaders = part("nodes.loaders")
    (model,) = loaders.SanaDiffusionModelLoader.execute("repo/transformer", dtype="bfloat16").result
    assert model.model.diffusion_model.dtype == torch.bfloat16
    (vae,) = loaders.SanaDCAELoader.execute("repo/vae", dtype="bfloat16").result
    assert vae.vae_dtype == torch.bfloat16


def test_float16_is_offered_only_where_it_is_safe(part):
    loaders = part("nodes.loaders")
    for node in (loaders.SanaTextEncoderLoader, loaders.SanaDCAELoader):
        (dtype,) = (entry for entry in node.define_schema().inputs if entry.id == "dtype")
        assert dtype.options == ["auto", "bfloat16", "float32"]
