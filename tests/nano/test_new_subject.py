"""From pictures to a picture: a LoRA of nano on a subject that it never saw, trained by the command line."""

import pytest

from sana_core.__main__ import main
from sana_core.evaluation import scenes
from scripts.nano.new_subject import HELD_OUT, PUMPKIN, TRAINED, draw, score
from scripts.nano.score import load_nano

SETTINGS = "--steps 400 --batch 8 --targets attention+feed-forward --learning-rate 1e-3 --schedule cosine"


def test_half_of_the_combinations_are_trained_on():
    assert len({(scene.background, scene.place) for scene in TRAINED + HELD_OUT}) == 40
    assert len(TRAINED) == len(HELD_OUT) == 20
    assert PUMPKIN not in scenes.SUBJECTS
    for half in (TRAINED, HELD_OUT):
        assert {scene.background for scene in half} == set(scenes.BACKGROUNDS)
        assert {scene.place for scene in half} == set(scenes.PLACES)


@pytest.mark.slow
def test_a_lora_teaches_a_new_subject_and_keeps_the_old(tmp_path, one_thread):
    nano = load_nano("cpu")
    new, old = list(HELD_OUT), list(scenes.HELD_OUT[::10])
    assert score(nano, new, "en")[1].subject < 0.2
    before = score(nano, old, "zh")[1]

    pictures, run = tmp_path / "pictures", tmp_path / "run"
    draw(pictures, nano)
    arguments = ["--data", str(pictures), "--resolution", "256", "--output", str(run), "--device", "cpu"]
    assert main(["train", *arguments, *SETTINGS.split()]) == 0

    nano.load_lora(run / "lora.safetensors")
    for language in scenes.LANGUAGES:
        scores = score(nano, new, language)[1]
        assert scores.background >= 0.95 and scores.place >= 0.95 and scores.subject >= 0.8, f"{language}: {scores}"
    after = score(nano, old, "zh")[1]
    assert after.background >= 0.95 and after.place >= 0.9, f"{before}; {after}"
    assert after.subject >= before.subject - 0.1, f"{before}; {after}"
