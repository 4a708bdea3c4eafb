"""X/Y grids and best of N on a real server: what the graph draws is what the pipeline draws."""

import numpy as np
import pytest

from sana_core import SanaPipeline
from sana_core.evaluation import load_scorer, ranking
from tests import tiny
from tests.clip import save_clip
from tests.comfy.graphs import PROMPT, empty, encode, finished, latent_of, sample, save, save_latent

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def pipeline():
    return SanaPipeline(tiny.transformer(), tiny.dc_ae(), tiny.text_encoder())


def outputs(node, count=3):
    return [[node[0], index] for index in range(count)]


def decode(graph, models, latent):
    return graph.add("SanaDCAEDecode", samples=latent, vae=models[2])


def same_picture(ours, theirs):
    """Up to the rounding of different batch sizes."""
    return np.abs(np.asarray(ours).astype(int) - np.asarray(theirs).astype(int)).max() <= 1


def test_a_grid_of_numbers(server, graph, models, pipeline):
    node = graph.add("SanaXYValues", x_values="2, 4", y_values="1, 4.5", x_name="steps", y_name="cfg")
    x, y, layout = outputs(node)
    images = decode(graph, models, sample(graph, models, steps=x, cfg=y))
    save(graph, images)
    save(graph, graph.add("SanaXYGrid", images=images, layout=layout))
    *pictures, sheet = sorted(server.images(finished(server, graph)), key=lambda image: image.width)
    assert len(pictures) == 4
    sheet = np.asarray(sheet)
    drawn = []
    for row, scale in enumerate((1.0, 4.5)):
        for column, steps in enumerate((2, 4)):
            options = {"num_inference_steps": steps, "guidance_scale": scale, "height": 64, "width": 96}
            (expected,) = pipeline(PROMPT, seed=7, **options)
            bottom, right = sheet.shape[0] - 8 - (1 - row) * 72, sheet.shape[1] - 8 - (1 - column) * 104
            assert same_picture(sheet[bottom - 64 : bottom, right - 96 : right], expected), (row, column)
            drawn.append(expected.tobytes())
    assert len(set(drawn)) == 4


def test_a_grid_of_texts_and_choices(server, graph, models):
    node = graph.add("SanaXYValues", x_values="a cat, asleep | 一只狗 🐶", y_values="flow_euler, flow_dpm-solver")
    x, y, layout = outputs(node)
    latent = graph.add(
        "SanaSampler", model=models[0], positive=encode(graph, models[1], x), negative=encode(graph, models[1], ""),
        latent_image=empty(graph), sampler=y, shift=0.0, denoise=1.0, seed=7, steps=2, cfg=4.5,
    )  # fmt: skip
    images = decode(graph, models, latent)
    save(graph, images)
    save(graph, graph.add("SanaXYGrid", images=images, layout=layout))
    pictures = server.images(finished(server, graph))
    assert len(pictures) == 5 and len({picture.tobytes() for picture in pictures}) == 5


def test_a_list_that_lost_a_picture_is_refused(server, graph, models):
    node = graph.add("SanaXYValues", x_values="2, 4", y_values="1, 4.5")
    image = graph.add("EmptyImage", width=96, height=64, batch_size=1, color=0x3366CC)
    save(graph, graph.add("SanaXYGrid", images=image, layout=[node[0], 2]))
    assert "1 pictures came for 2 columns and 2 rows" in server.run(graph).error["exception_message"]


def test_the_best_of_a_batch_and_its_latent(server, graph, models, pipeline, tiny_models):
    folder = tiny_models / "clip_vision" / "tiny-clip"
    if not folder.exists():
        save_clip(folder)
    latent = sample(graph, models, empty(graph, batch_size=3))
    scorer = graph.add("SanaScorerLoader", scorer_name="tiny-clip")
    node = graph.add("SanaPickBest", images=decode(graph, models, latent), scorer=scorer, prompt="a red cat", count=1)
    save(graph, node)
    save_latent(graph, graph.add("LatentFromBatch", samples=latent, batch_index=[node[0], 1], length=1))
    run = finished(server, graph)
    options = {"num_inference_steps": 4, "guidance_scale": 4.5, "height": 64, "width": 96}
    pictures = pipeline([PROMPT] * 3, seed=7, **options)
    scores = load_scorer(f"clip:{folder}")(pictures, ["a red cat"] * 3)
    order = ranking(scores)
    shown = run.texts[node[0]]
    assert [int(line.split(":")[0]) for line in shown.splitlines()] == order
    assert [float(line.split(":")[1]) for line in shown.splitlines()] == pytest.approx(
        [scores[index] for index in order], abs=0.5
    )
    (picture,) = server.images(run)
    assert same_picture(picture, pictures[order[0]])
    (kept,) = server.latents(run)
    graph.remove("SaveImage")
    graph.remove("SaveLatent")
    save_latent(graph, latent)
    assert (latent_of(server, graph)[order[0]] == kept[0]).all()


def test_nano_knows_its_own_pictures_only(server, graph):
    image = graph.add("EmptyImage", width=96, height=64, batch_size=2, color=0x3366CC)
    scorer = graph.add("SanaScorerLoader", scorer_name="sana-nano")
    save(graph, graph.add("SanaPickBest", images=image, scorer=scorer, prompt="a panda", count=1))
    assert "one has 96 x 64" in server.run(graph).error["exception_message"]
