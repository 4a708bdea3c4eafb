"""The shipped sana-nano: its size, what its pictures show, and that it reads captions as it was trained to."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open

from sana_core.evaluation import scenes
from sana_core.evaluation.judge import evaluate
from sana_core.evaluation.nano import draw_scenes
from sana_core.text import CHI
from scripts.nano.autoencoder import measure
from scripts.nano.score import MODELS, load_nano
from scripts.nano.transformer import caption_features

MILLIONS = {"vae": 5, "text_encoders": 4, "diffusion_models": 10}


@pytest.fixture(scope="module")
def nano():
    return load_nano("cpu")


def test_files_are_small():
    files = list(MODELS.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) <= 40 * 2**20
    for file in files:
        assert file.stat().st_size <= 15 * 2**20
        with safe_open(file, "pt") as weights:
            names = [name for name in weights.keys() if name != "spiece_model"]
            shapes = [weights.get_slice(name).get_shape() for name in names]
            dtypes = {weights.get_slice(name).get_dtype() for name in names}
        assert sum(int(np.prod(shape)) for shape in shapes) <= MILLIONS[file.parent.name] * 1e6
        assert dtypes <= {"F16", "BF16"}


def test_autoencoder_meets_its_bar(nano):
    measured = measure(nano.vae, 24)
    assert measured["psnr"] >= 28
    assert measured["psnr_subject"] >= 22
    assert 0.7 <= measured["latent_std"] <= 1.3


@pytest.mark.parametrize("chi", [True, False])
def test_training_saw_the_features_that_sampling_gives(nano, chi):
    """Training cuts the instruction to what the sliding windows reach; the features must not differ by it."""
    captions = [
        scenes.caption(scenes.HELD_OUT[i], language, np.random.default_rng(i))
        for i, language in enumerate(scenes.LANGUAGES)
    ]
    trained, trained_mask = caption_features(nano.text_encoder, captions, chi)
    sampled, sampled_mask = nano.text_encoder.encode(captions, chi=CHI if chi else False)
    for row in range(len(captions)):
        ours, theirs = trained[row][trained_mask[row]], sampled[row][sampled_mask[row].bool()]
        assert ours.shape == theirs.shape
        assert torch.allclose(ours, theirs, atol=1e-4 * theirs.abs().max().item())


@pytest.mark.slow
def test_pictures_show_what_the_captions_say(nano):
    """Twenty held-out combinations in each language; the whole score is in models/README.md."""
    for number, language in enumerate(scenes.LANGUAGES):
        wanted = list(scenes.HELD_OUT[number::25])
        scores = evaluate(draw_scenes(nano, wanted, language), wanted)
        assert scores.background >= 0.95, f"{language}: {scores}"
        assert scores.place >= 0.9, f"{language}: {scores}"
        assert scores.subject >= 0.9, f"{language}: {scores}"


def test_model_card_states_the_measured_scores():
    measured = json.loads((MODELS / "scores.json").read_text())
    card = (MODELS / "README.md").read_text(encoding="utf-8")
    for language in scenes.LANGUAGES:
        for name in ("background", "place", "subject"):
            assert f"{measured[language][name]:.1%}" in card
    assert f"{measured['autoencoder']['psnr']:.1f} dB" in card
