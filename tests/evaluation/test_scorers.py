"""Scorers against hand calculations and torchmetrics, and what a scorer of the user's own can get wrong."""

import sys
import types

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPModel, CLIPProcessor

from sana_core.evaluation import load_scorer, score_pictures
from sana_core.evaluation.nano import named_parts
from sana_core.evaluation.scenes import HELD_OUT, SIZES, Scene, all_captions, draw
from tests.clip import save_clip

PROMPTS = ["a red cat", "a dog on the moon"]


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    return save_clip(tmp_path_factory.mktemp("clip") / "tiny")


@pytest.fixture
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (40, side, 3), dtype=np.uint8)) for side in (40, 64)]


class FeatureModel(CLIPModel):
    """CLIP with the plain features that torchmetrics expects; transformers 5 wraps them in an output object."""

    def get_image_features(self, pixels):
        return super().get_image_features(pixels).pooler_output

    def get_text_features(self, tokens, mask):
        return super().get_text_features(tokens, mask).pooler_output


def scorer_module(monkeypatch, **members):
    monkeypatch.setitem(sys.modules, "my_scorer", types.SimpleNamespace(**members))


def test_clip_score_is_the_cosine_of_both_features(clip_folder, pictures):
    model, processor = CLIPModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder)
    means, deviations = processor.image_processor.image_mean, processor.image_processor.image_std
    picture = pictures[0].crop((0, 0, 32, 32))  # CLIP's own size: nothing is scaled
    pixels = (torch.from_numpy(np.array(picture)) / 255 - torch.tensor(means)) / torch.tensor(deviations)
    tokens = torch.tensor([processor.tokenizer(PROMPTS[0]).input_ids])
    with torch.no_grad():
        image = model.visual_projection(model.vision_model(pixels.permute(2, 0, 1)[None].float()).pooler_output)
        text = model.text_projection(model.text_model(tokens).last_hidden_state[:, -1])
    expected = 100 * (image @ text.T).item() / (image.norm() * text.norm()).item()
    (score,) = load_scorer(f"clip:{clip_folder}")([picture], PROMPTS[:1])
    assert abs(score - expected) < 1e-3
    assert abs(score) > 1


def test_clip_score_is_torchmetrics(clip_folder, pictures):
    multimodal = pytest.importorskip("torchmetrics.multimodal.clip_score")
    metric = multimodal.CLIPScore(
        lambda: (FeatureModel.from_pretrained(clip_folder).eval(), CLIPProcessor.from_pretrained(clip_folder))
    )
    scorer = load_scorer(f"clip:{clip_folder}")
    scores = scorer(pictures, PROMPTS)
    for picture, prompt, score in zip(pictures, PROMPTS, scores, strict=True):
        metric.reset()
        expected = metric(torch.from_numpy(np.array(picture)).permute(2, 0, 1), prompt).item()
        assert abs(max(score, 0) - expected) < 1e-3  # torchmetrics cuts a mean below 0


def test_clip_scores_do_not_depend_on_the_batch_and_long_prompts_are_cut(clip_folder, pictures):
    scorer = load_scorer(f"clip:{clip_folder}")
    alone = [scorer([picture], [prompt])[0] for picture, prompt in zip(pictures, PROMPTS, strict=True)]
    assert scorer(pictures * 10, PROMPTS * 10) == pytest.approx(alone * 10, abs=1e-3)
    long = "a cat " * 30
    assert scorer(pictures[:1], [long]) == pytest.approx(scorer(pictures[:1], [long + "and a dog"]))


def test_a_folder_without_a_clip_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no config.json.*openai/clip-vit-large-patch14"):
        load_scorer(f"clip:{tmp_path}")
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(FileNotFoundError, match="holds no whole CLIP model"):
        load_scorer(f"clip:{tmp_path}")


def test_nano_counts_what_is_right_and_prefers_the_clearer_picture():
    scene, other = HELD_OUT[0], HELD_OUT[1]
    right, wrong = (Image.fromarray(draw(item)) for item in (scene, other))
    faint = Image.blend(right, Image.new("RGB", right.size, scene.background.rgb), 0.3)
    faint = Image.fromarray(np.roll(np.array(faint), 3, axis=1))
    prompt = all_captions(scene)["zh"][0]
    clear, weak, bad = load_scorer("nano")([right, faint, wrong], [prompt] * 3)
    assert 3.98 < clear <= 4.001 and 3 < weak < clear
    same = sum(getattr(scene, part) == getattr(other, part) for part in ("background", "place", "subject"))
    assert same <= bad < same + 1.001


def test_every_caption_names_its_scene():
    for scene in HELD_OUT[::7]:
        for captions in all_captions(scene).values():
            for text in captions:
                assert named_parts(text) == [scene.subject, scene.background, scene.place], text


def test_a_longer_name_is_not_the_shorter_in_it():
    assert [part.name for part in named_parts("A carrot")] == ["carrot"]
    assert [part.name for part in named_parts("熊猫")] == ["panda"]
    assert [part.name for part in named_parts("the sunflower, bottom")] == ["sunflower", "bottom"]


def test_nano_knows_its_own_prompts_and_size_only():
    picture = Image.fromarray(draw(Scene(HELD_OUT[0].subject, HELD_OUT[0].background, HELD_OUT[0].place, SIZES[0])))
    with pytest.raises(ValueError, match="'a lighthouse at dusk' names no subject, background or place"):
        load_scorer("nano")([picture], ["a lighthouse at dusk"])
    with pytest.raises(ValueError, match="pictures of 256 x 256 pixels, and one has 64 x 48"):
        load_scorer("nano")([picture.resize((64, 48))], ["a panda"])


def test_a_function_of_the_users_is_a_scorer(monkeypatch, pictures):
    scorer_module(monkeypatch, width=lambda pictures, prompts: [picture.width for picture in pictures])
    assert score_pictures(load_scorer("my_scorer:width"), pictures, PROMPTS) == [40.0, 64.0]


@pytest.mark.parametrize(
    "name, message",
    [
        ("best", "there is no scorer 'best': expected nano, clip:FOLDER or module:function"),
        ("clip:", "there is no scorer 'clip:'"),
        (":judge", "there is no scorer ':judge'"),
        ("no_such_module:judge", "no_such_module:judge could not be imported"),
        ("my_scorer:nothing", "my_scorer:nothing could not be imported"),
        ("my_scorer:number", "my_scorer:number is a int: expected a function"),
    ],
)
def test_names_of_no_scorer_are_refused(monkeypatch, name, message):
    scorer_module(monkeypatch, number=3)
    with pytest.raises(ValueError, match=message):
        load_scorer(name)


@pytest.mark.parametrize(
    "scores, message",
    [
        ([1.0], "1 scores for 2 pictures"),
        ([1.0, 2.0, 3.0], "3 scores for 2 pictures"),
        ([1.0, float("nan")], "nan for picture 1"),
        ([float("-inf"), 0.0], "-inf for picture 0"),
    ],
)
def test_scores_that_are_not_one_number_a_picture_are_refused(pictures, scores, message):
    with pytest.raises(ValueError, match=message):
        score_pictures(lambda pictures, prompts: scores, pictures, PROMPTS)
