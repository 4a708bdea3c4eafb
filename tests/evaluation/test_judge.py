"""The judge of sana-nano's pictures: right on true and on damaged scenes, no better than chance on wrong captions."""

import io
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter

from sana_core.checkpoint import load_dc_ae
from sana_core.evaluation.judge import cielab, compare, evaluate, score
from sana_core.evaluation.scenes import BACKGROUNDS, HELD_OUT, PLACES, SIZES, SUBJECTS, Scene, draw

AUTOENCODER = Path(__file__).parents[2] / "models" / "vae" / "dc_ae_nano.safetensors"
BLANK = np.full((256, 256, 3), BACKGROUNDS[4].rgb, np.uint8)


def blurred(picture: np.ndarray, sigma: float) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(sigma)))


def noisy(picture: np.ndarray, rng: np.random.Generator, deviation: float, cells: int) -> np.ndarray:
    """Add smooth noise that has `cells` independent values a side; 256 is white noise."""
    noise = rng.normal(0, deviation, (3, cells, cells)).astype(np.float32)
    grown = [np.asarray(Image.fromarray(channel).resize((256, 256), Image.Resampling.BICUBIC)) for channel in noise]
    return np.clip(picture + np.stack(grown, axis=-1), 0, 255).astype(np.uint8)


def compressed(picture: np.ndarray, quality: int) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "jpeg", quality=quality)
    return np.asarray(Image.open(file).convert("RGB"))


def bent(picture: np.ndarray, rng: np.random.Generator, deviation: float) -> np.ndarray:
    """Move the pixels along a smooth random field, so that the glyph's outline is wrong."""
    field = rng.normal(0, deviation, (2, 6, 6)).astype(np.float32)
    dy, dx = (np.asarray(Image.fromarray(part).resize((256, 256), Image.Resampling.BICUBIC)) for part in field)
    y, x = np.mgrid[:256, :256]
    return picture[np.clip(y + dy, 0, 255).astype(int), np.clip(x + dx, 0, 255).astype(int)]


def in_coarse_cells(picture: np.ndarray, cells: int) -> np.ndarray:
    small = Image.fromarray(picture).resize((cells, cells), Image.Resampling.BOX)
    return np.asarray(small.resize((256, 256), Image.Resampling.BICUBIC))


def contrasted(picture: np.ndarray, gain: float) -> np.ndarray:
    return np.clip(128 + (picture - 128.0) * gain, 0, 255).astype(np.uint8)


SAMPLE = HELD_OUT[::4]

DAMAGES = {
    "blurred": lambda picture, rng: blurred(picture, 3),
    "blurred, noisy and compressed": lambda picture, rng: compressed(noisy(blurred(picture, 2.5), rng, 10, 256), 20),
    "blotched": lambda picture, rng: noisy(picture, rng, 20, 32),
    "bent": lambda picture, rng: bent(picture, rng, 6),
    "in cells of 8 pixels": lambda picture, rng: in_coarse_cells(picture, 32),
    "over-contrasted": lambda picture, rng: contrasted(picture, 1.4),
    "pale": lambda picture, rng: contrasted(picture, 0.6),
    "moved": lambda picture, rng: np.roll(picture, tuple(rng.integers(-6, 7, 2)), (0, 1)),
}


def test_true_scenes_of_every_subject_background_place_and_size_are_read():
    rng = np.random.default_rng(0)
    scenes = list(HELD_OUT)
    for subject in SUBJECTS:
        for background in BACKGROUNDS:
            scenes.append(Scene(subject, background, PLACES[rng.integers(5)], SIZES[rng.integers(len(SIZES))]))
    scores = evaluate(map(draw, scenes), scenes)
    assert min(scores.background, scores.place, scores.subject) >= 0.99, scores


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_scenes_are_read(damage):
    rng = np.random.default_rng(0)
    scores = evaluate((DAMAGES[damage](draw(scene), rng) for scene in SAMPLE), SAMPLE)
    assert min(scores.background, scores.place, scores.subject) >= 0.95, scores


def test_scenes_passed_through_the_autoencoder_are_read():
    autoencoder = load_dc_ae(AUTOENCODER, dtype=torch.float32)
    pictures = torch.from_numpy(np.stack([draw(scene) for scene in SAMPLE]))
    passed = []
    with torch.inference_mode():
        for batch in pictures.split(8):
            decoded = autoencoder.decode(autoencoder.encode(batch.movedim(-1, 1) / 127.5 - 1))
            passed.append((127.5 * (decoded + 1)).round().clamp(0, 255).to(torch.uint8).movedim(1, -1))
    scores = evaluate(torch.cat(passed).numpy(), SAMPLE)
    assert min(scores.background, scores.place, scores.subject) >= 0.95, scores


def test_shuffled_captions_score_at_chance():
    guesses = [score(draw(scene)) for scene in SAMPLE]
    rng = np.random.default_rng(0)
    shuffles = [compare(guesses, [SAMPLE[i] for i in rng.permutation(len(SAMPLE))]) for _ in range(200)]
    for part in ("background", "place", "subject"):
        chance = sum(count**2 for count in Counter(getattr(one, part) for one in SAMPLE).values()) / len(SAMPLE) ** 2
        mean = np.mean([getattr(scores, part) for scores in shuffles])
        deviation = np.sqrt(chance * (1 - chance) / (len(SAMPLE) * len(shuffles)))
        assert abs(mean - chance) < 4 * deviation, (part, mean)


def test_a_picture_of_nothing_has_a_background_and_no_subject():
    guess = score(noisy(BLANK, np.random.default_rng(0), 4, 256))
    assert (guess.subject, guess.background, guess.place) == (None, BACKGROUNDS[4], None)


def test_likeness_falls_with_damage():
    rng = np.random.default_rng(0)
    picture = draw(HELD_OUT[0])
    likeness = [score(bent(picture, rng, deviation)).likeness for deviation in (0, 4, 12)]
    assert likeness[0] > 0.99 and likeness == sorted(likeness, reverse=True)


def test_cielab_of_known_colours():
    # Values of the sRGB primaries under D65, as any colour calculator gives them.
    known = {(255, 255, 255): (100, 0, 0), (255, 0, 0): (53.24, 80.09, 67.20), (0, 0, 255): (32.30, 79.19, -107.86)}
    for rgb, lab in known.items():
        assert np.allclose(cielab(np.array(rgb)), lab, atol=0.05)


@pytest.mark.parametrize(
    "picture", [BLANK[:128], BLANK.astype(np.float32), BLANK[..., 0]], ids=["size", "type", "grey"]
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(ValueError, match=r"uint8 of shape \(256, 256, 3\)"):
        score(picture)


def test_counts_must_agree():
    with pytest.raises(ValueError, match="1 pictures, 2 scenes"):
        evaluate([BLANK], HELD_OUT[:2])
    with pytest.raises(ValueError, match="0 pictures, 0 scenes"):
        evaluate([], [])
