"""The table against the project's other tables, the shapes of the published files, and the README."""

import math
import re
from pathlib import Path

import pytest

from sana_core.checkpoint.detection import detect_dc_ae, detect_transformer
from sana_core.config import AUTOENCODERS, TRANSFORMERS
from sana_core.published import AUTOENCODER, PUBLISHED, TEXT_ENCODER, describe_size, find_published, with_parts
from tests.checkpoint import manifests

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def of(folder):
    return [file for file in PUBLISHED.values() if file.folder == folder]


def layout_of(file):
    return "official" if file.filename.endswith(".pth") else "diffusers"


def test_every_preset_but_nano_has_a_file():
    assert [file.name for file in of("diffusion_models")] == [name for name in TRANSFORMERS if name != "sana-nano"]
    assert {file.name for file in of("vae")} == AUTOENCODERS.keys() - {"dc-ae-nano"}
    assert [file.name for file in of("text_encoders")] == [TEXT_ENCODER]
    assert {file.name for file in of("controlnet")} == {
        "Sana_600M_1024px_ControlNet_HED",
        "Sana_1600M_1024px_BF16_ControlNet_HED",
    }


def test_nothing_is_saved_over_something_else():
    assert len({(file.folder, file.filename) for file in PUBLISHED.values()}) == len(PUBLISHED)
    assert all(Path(file.filename).name == file.filename for file in PUBLISHED.values())


@pytest.mark.parametrize("file", of("diffusion_models"), ids=lambda file: file.name)
def test_the_loader_knows_a_transformer_by_the_name_it_is_saved_under(file):
    name = manifests.facts()["aliases"].get(file.name, file.name)
    state_dict = manifests.state_dict("transformer", name, layout_of(file))
    config, layout, _ = detect_transformer(state_dict, path=Path("models/diffusion_models", file.filename))
    assert config == TRANSFORMERS[file.name]
    assert layout == layout_of(file)


@pytest.mark.parametrize("file", of("vae"), ids=lambda file: file.name)
def test_the_loader_knows_an_autoencoder_by_the_name_it_is_saved_under(file):
    state_dict = manifests.state_dict("dc_ae", file.name, "diffusers")
    config, *_ = detect_dc_ae(state_dict, path=Path("models/vae", file.filename))
    assert config == AUTOENCODERS[file.name]


@pytest.mark.parametrize("file", [*of("diffusion_models"), *of("vae")], ids=lambda file: file.name)
def test_sizes_are_those_of_the_published_shapes(file):
    kind = "vae" if file.folder == "vae" else "transformer"
    name = manifests.facts()["aliases"].get(file.name, file.name)
    state_dict = manifests.state_dict("dc_ae" if kind == "vae" else kind, name, layout_of(file))
    weights = sum(math.prod(tensor.shape) for tensor in state_dict.values())
    width = 4 if kind == "vae" or layout_of(file) == "official" else 2  # the twins are half precision, DC-AE is not
    assert 0 < file.size - width * weights < 5e-4 * file.size  # the rest is the header


def test_a_picture_takes_a_transformer_a_text_encoder_and_an_autoencoder():
    for file in of("diffusion_models"):
        assert [part.name for part in with_parts(file)] == [file.name, TEXT_ENCODER, AUTOENCODER]
    base, control_net = PUBLISHED["Sana_600M_1024px"], PUBLISHED["Sana_600M_1024px_ControlNet_HED"]
    assert with_parts(control_net) == [control_net, *with_parts(base)]
    assert with_parts(PUBLISHED[AUTOENCODER]) == [PUBLISHED[AUTOENCODER]]


@pytest.mark.parametrize(
    "spelling, name",
    [
        ("Sana_1600M_1024px_BF16", "Sana_1600M_1024px_BF16"),
        ("Efficient-Large-Model/Sana_1600M_1024px_BF16", "Sana_1600M_1024px_BF16"),
        ("Efficient-Large-Model/Sana_1600M_1024px_BF16_diffusers", "Sana_1600M_1024px_BF16"),
        ("Efficient-Large-Model/SANA_Sprint_1.6B_1024px_teacher_diffusers", "Sana_Sprint_1.6B_1024px_teacher"),
        ("mit-han-lab/dc-ae-f32c32-sana-1.1", "dc-ae-f32c32-sana-1.1"),
        ("Comfy-Org/PixelDiT", TEXT_ENCODER),
    ],
)
def test_names_and_repositories_are_found(spelling, name):
    assert find_published(spelling) is PUBLISHED[name]


@pytest.mark.parametrize(
    "spelling, hint",
    [
        ("Sana_1600M_1024", "Did you mean Sana_1600M_1024px or "),
        ("someone/Sana_Sprint_1.6B_1024px", "Did you mean Sana_Sprint_1.6B_1024px"),
        ("dc-ae-f64c128", "dc-ae-f64c128-in-1.0"),
        ("stabilityai/sdxl", "download --list` shows what is in it"),
        ("sana-nano", "not in the table"),
        ("../../etc/passwd", "not in the table"),
    ],
)
def test_other_repositories_are_refused(spelling, hint):
    with pytest.raises(ValueError, match="is not in the table of published files") as error:
        find_published(spelling)
    assert repr(spelling) in str(error.value) and hint in str(error.value)


def test_the_readme_names_the_same_files():
    rows = [line for line in README.splitlines() if re.match(r"\| (Sana|SANA)[^|]*\| `", line)]
    named = {name for row in rows for name in re.findall(r"`((?:Sana|SANA)\w[\w.]*px\w*)`", row)}
    teachers = {name for name in TRANSFORMERS if name.endswith("_teacher")}  # for distilling, not for drawing
    assert named == {file.name for file in of("diffusion_models")} - teachers
    for file in (PUBLISHED[TEXT_ENCODER], PUBLISHED[AUTOENCODER]):
        row = next(line for line in README.splitlines() if f"`{file.repository}`: `{file.path}`" in line)
        assert f"`models/{file.folder}`" in row
        assert file.filename in README


def test_sizes_read_well():
    assert describe_size(3208971544) == "3.21 GB"
    assert describe_size(4096) == "4,096 bytes"
