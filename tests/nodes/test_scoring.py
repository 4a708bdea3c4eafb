"""Load Sana Scorer and Sana Pick Best: which pictures come out, and what cannot be chosen from."""

import numpy as np
import pytest
import torch

from sana_core.evaluation import load_scorer
from sana_core.evaluation.scenes import HELD_OUT, all_captions, draw
from sana_core.pictures import to_pictures
from tests.clip import save_clip


@pytest.fixture
def pick(part):
    return part("nodes.scoring").SanaPickBest.execute


@pytest.fixture
def loader(part):
    return part("nodes.scoring").SanaScorerLoader


@pytest.fixture
def clip_folder(part, tmp_path, monkeypatch):
    """A models/clip_vision with a CLIP model in a folder, and a vision model of ComfyUI's kind."""
    import folder_paths

    extensions = folder_paths.folder_names_and_paths["clip_vision"][1]
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "clip_vision", ([str(tmp_path)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / "clip_vision_g.safetensors").write_bytes(b"")
    return save_clip(tmp_path / "tiny-clip")


def batch(count=4):
    return torch.rand(count, 40, 48, 3, generator=torch.Generator().manual_seed(0))


def test_the_best_pictures_come_first(pick):
    images = batch()
    result = pick(images, lambda pictures, prompts: [1, 4, -2, 3], "a cat", 2)
    best, index, score = result.result
    assert torch.equal(best, images[[1, 3]]) and (index, score) == (1, 4.0)
    assert result.ui.as_dict()["text"] == ("1: 4.0000\n3: 3.0000\n0: 1.0000\n2: -2.0000",)


def test_the_scorer_gets_pictures_and_the_prompt(pick):
    given = []
    images = torch.cat([batch(2), torch.full((2, 40, 48, 1), 0.5)], dim=3) * 1.2  # alpha, and too bright in places
    pick(images, lambda *arguments: given.append(arguments) or [0, 0], "a cat", 1)
    ((pictures, prompts),) = given
    assert prompts == ["a cat", "a cat"]
    expected = (images[0, ..., :3].clamp(0, 1) * 255).round().byte().numpy()
    assert pictures[0].mode == "RGB" and np.array_equal(np.asarray(pictures[0]), expected)


def test_more_than_there_are_cannot_be_kept(pick):
    with pytest.raises(ValueError, match="The best 3 of 2 pictures asked for: lower count, or draw more"):
        pick(batch(2), lambda *_: [1, 2], "a cat", 3)


@pytest.mark.parametrize("scores, message", [([1.0], "1 scores for 2"), ([1.0, float("nan")], "nan for picture 1")])
def test_a_scorer_that_errs_is_reported(pick, scores, message):
    with pytest.raises(ValueError, match=message):
        pick(batch(2), lambda *_: scores, "a cat", 1)


def test_nano_picks_what_its_prompt_says(loader, pick):
    (scorer,) = loader.execute("sana-nano").result
    images = torch.from_numpy(np.stack([draw(scene) for scene in HELD_OUT[:3]])).float() / 255
    _, index, score = pick(images, scorer, all_captions(HELD_OUT[2])["emoji"][0], 1).result
    assert index == 2 and score > 3.9


def test_clip_folders_are_offered_and_score_as_the_core_does(loader, pick, clip_folder):
    (scorer_name,) = loader.define_schema().inputs
    assert scorer_name.options == ["sana-nano", "tiny-clip"]
    (scorer,) = loader.execute("tiny-clip").result
    images = batch(3)
    _, index, score = pick(images, scorer, "a red cat", 1).result
    expected = load_scorer(f"clip:{clip_folder}")(to_pictures(images.movedim(-1, 1)), ["a red cat"] * 3)
    assert score == pytest.approx(max(expected), abs=1e-4) and index == expected.index(max(expected))


def test_the_clip_model_is_under_comfyuis_management(loader, clip_folder, comfy):
    import comfy.model_management

    (scorer,) = loader.execute("tiny-clip").result
    scorer(to_pictures(batch(1).movedim(-1, 1)), ["a cat"])
    assert any(loaded.model is scorer.patcher for loaded in comfy.model_management.current_loaded_models)
    assert scorer.patcher.model_size() > 4 * 1000


def test_a_folder_outside_is_not_read(loader, clip_folder, tmp_path):
    save_clip(tmp_path.parent / f"{tmp_path.name}-outside")
    with pytest.raises(FileNotFoundError):
        loader.execute(f"../{tmp_path.name}-outside")
