"""Training on a real server: its results in the same graph, Cancel, and core's own nodes."""

import json

import pytest

from tests.comfy.graphs import finished, latent_of, sample, save, save_latent
from tests.training.pictures import picture, write

pytestmark = pytest.mark.server

STEPS = 3
STEPS_TO_CANCEL = 200
ENCODED = 9  # four pictures, their captions and the empty one: when that is shown, the first step is near


@pytest.fixture(scope="module")
def data(server):
    """Four pictures in a folder that was not there when the server started."""
    files = {f"{number}.png": picture(256, 256, number) for number in range(4)}
    return write(server.base / "input" / "cats", files | {f"{number}.txt": f"a cat {number}" for number in range(4)})


def train(graph, models, run_name, **options):
    model, clip, vae = models
    options = {
        "mode": "lora", "steps": STEPS, "batch_size": 2, "learning_rate": 0.01, "rank": 4, "seed": 0,
        "save_every": 100, "sample_every": 2, "sample_prompts": "a cat\na dog", **options,
    }  # fmt: skip
    dataset = graph.add("SanaDataset", folder="cats", resolution="256")
    trainer = graph.add("SanaTrainer", model=model, vae=vae, clip=clip, dataset=dataset, run_name=run_name, **options)
    return trainer[0], dataset[0]


def test_a_lora_is_trained_and_drawn_with(server, graph, models, data):
    save_latent(graph, sample(graph, models))
    plain = latent_of(server, graph)
    graph.remove("SaveLatent")
    trainer, dataset = train(graph, models, "drawn with")
    by_core = graph.add("LoraModelLoader", model=models[0], lora=[trainer, 0], strength_model=1.0, bypass=False)
    for model in (by_core, [trainer, 1]):
        save_latent(graph, sample(graph, (model, *models[1:])))
    graph.add("LossGraphNode", loss=[trainer, 2], filename_prefix="loss")
    run = finished(server, graph)

    by_core, by_us = server.latents(run)
    scale = plain.abs().max()
    assert (by_us - plain).abs().max() > 1e-3 * scale
    assert (by_us - by_core).abs().max() < 1e-5 * scale
    assert "4 pictures, in buckets of 256 px" in str(run.outputs[dataset]["text"])
    folder = server.base / "output" / "sana_training" / "drawn with"
    assert str(folder / "lora.safetensors") in str(run.outputs[trainer]["text"])
    assert f"step {STEPS} of {STEPS}, loss" in run.texts[trainer]
    assert run.previews >= 1
    (graph_picture,) = server.images(run)
    assert graph_picture.width > 400
    assert len(list((folder / "samples").glob("*.png"))) == 4


def test_all_weights_are_trained_and_drawn_with(server, graph, models, data):
    trainer, _ = train(graph, models, "full", mode="full", sample_every=0)
    save(graph, graph.add("VAEDecode", samples=sample(graph, ([trainer, 1], *models[1:])), vae=models[2]))
    run = finished(server, graph)
    assert len(server.images(run)) == 1
    assert (server.base / "output" / "sana_training" / "full" / "transformer.safetensors").is_file()


def test_cancel_saves_and_the_same_graph_goes_on(server, graph, models, data):
    trainer, _ = train(graph, models, "cancelled", steps=STEPS_TO_CANCEL, sample_every=0, save_every=1000)
    assert server.run(graph, interrupt_at=ENCODED).interrupted
    folder = server.base / "output" / "sana_training" / "cancelled"
    (state,) = folder.glob("step_*")
    assert 0 < int(state.name.removeprefix("step_")) < STEPS_TO_CANCEL
    assert (folder / "lora.safetensors").is_file()
    run = finished(server, graph)
    steps = [json.loads(line)["step"] for line in (folder / "log.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS_TO_CANCEL + 1))
    assert f"{STEPS_TO_CANCEL} steps" in str(run.outputs[trainer]["text"])
    assert f"Resuming from {state}" in server.text()


def test_a_name_that_is_no_folder_is_refused(server, graph, models, data):
    trainer, dataset = train(graph, models, "../elsewhere")
    graph.nodes[dataset]["inputs"]["resolution"] = "512"
    assert server.run(graph).ran == [dataset], "the data set is shown all the same"
    assert "expected the name of a folder" in server.text()
