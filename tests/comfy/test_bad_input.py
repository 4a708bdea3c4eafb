"""Bad input gives a node error that names the problem, and the server lives on."""

import io
import pickle
import zipfile

import pytest
import torch
from safetensors.torch import load_file, save_file

from sana_core.checkpoint import dump_config, save_text_encoder
from tests import tiny
from tests.comfy.graphs import PROMPT, empty, finished, latent_of, pictures_of, sample, save, save_latent
from tests.comfy.server import Refused

pytestmark = pytest.mark.server


@pytest.fixture
def add_file(server, tiny_models):
    """Puts a file into a model folder for one test."""
    added = []

    def add(folder: str, name: str, content: bytes | dict, **metadata):
        path = tiny_models / folder / name
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(content, path, metadata=metadata or None)
        added.append(path)
        return name

    yield add
    for path in added:
        path.unlink()


def error_of(server, graph, models):
    """The error that a workflow ends with, after which an innocent one must still run."""
    run = server.run(graph)
    assert run.error is not None, "the workflow must not succeed"
    return run.error["node_type"], run.error["exception_message"]


@pytest.fixture(autouse=True)
def lives_on(server, request):
    yield
    from tests.comfy.server import Graph

    graph = Graph()
    save_latent(graph, empty(graph))
    finished(server, graph)


def tensors(tiny_models, folder):
    return load_file(tiny_models / folder / "tiny.safetensors")


class Evil:
    def __reduce__(self):
        return print, ("code from a pickle ran",)


def evil_checkpoint() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps({"x_embedder.proj.weight": Evil()}, protocol=2))
        archive.writestr("archive/version", "3")
    return data.getvalue()


LOADERS = [
    ("SanaDiffusionModelLoader", "model_name", "diffusion_models", "not a Sana transformer"),
    ("SanaTextEncoderLoader", "text_encoder_name", "text_encoders", "not a Gemma-2 text encoder"),
    ("SanaDCAELoader", "vae_name", "vae", "not a DC-AE"),
]


def load(graph, node, widget, name):
    loaded = graph.add(node, **{widget: name})
    if node == "SanaDiffusionModelLoader":
        graph.add("ModelSave", model=loaded, filename_prefix="unused")
    elif node == "SanaTextEncoderLoader":
        graph.add("CLIPSave", clip=loaded, filename_prefix="unused")
    else:
        graph.add("VAESave", vae=loaded, filename_prefix="unused")


@pytest.mark.parametrize("node, widget, folder, message", LOADERS)
def test_a_file_of_something_else(server, graph, models, add_file, node, widget, folder, message):
    name = add_file(folder, "foreign.safetensors", {"conv.weight": torch.zeros(3)})
    load(graph, node, widget, name)
    node_type, error = error_of(server, graph, models)
    assert node_type == node
    assert message in error and "foreign.safetensors" in error and "conv.weight" in error


@pytest.mark.parametrize("node, widget, folder, message", LOADERS)
def test_a_truncated_file(server, graph, models, add_file, tiny_models, node, widget, folder, message):
    whole = (tiny_models / folder / "tiny.safetensors").read_bytes()
    load(graph, node, widget, add_file(folder, "cut.safetensors", whole[: len(whole) // 2]))
    node_type, error = error_of(server, graph, models)
    assert node_type == node
    assert "cut.safetensors is truncated or damaged" in error


@pytest.mark.parametrize("node, widget, folder, message", LOADERS)
def test_a_pickle_with_code_in_it(server, graph, models, add_file, node, widget, folder, message):
    load(graph, node, widget, add_file(folder, "evil.pth", evil_checkpoint()))
    node_type, error = error_of(server, graph, models)
    assert node_type == node
    assert "could run code" in error
    assert "code from a pickle ran" not in server.text()


def test_a_path_outside_of_the_folder_is_refused(server, graph):
    load(graph, "SanaDCAELoader", "vae_name", "../../server.log")
    with pytest.raises(Refused, match="not in"):
        server.run(graph)


def test_a_text_encoder_without_tokenizer(server, graph, models, add_file, tiny_models):
    weights = tensors(tiny_models, "text_encoders")
    del weights["spiece_model"]
    load(graph, "SanaTextEncoderLoader", "text_encoder_name", add_file("text_encoders", "mute.safetensors", weights))
    assert "tokenizer.model" in error_of(server, graph, models)[1]


@pytest.mark.parametrize("width, height, nearest", [(100, 64, "96x64 or 128x64"), (64, 40, "64x32 or 64x64")])
def test_a_size_off_the_grid(server, graph, models, width, height, nearest):
    save_latent(graph, empty(graph, width, height))
    node_type, error = error_of(server, graph, models)
    assert node_type == "SanaEmptyLatent"
    assert f"{width}x{height}" in error and nearest in error


def test_a_picture_smaller_than_one_position(server, graph, models):
    image = graph.add("EmptyImage", width=100, height=20, batch_size=1, color=0)
    save_latent(graph, graph.add("SanaDCAEEncode", pixels=image, vae=models[2]))
    assert "100x20" in error_of(server, graph, models)[1]


def test_nan_of_the_transformer(server, graph, models, add_file, tiny_models):
    weights = tensors(tiny_models, "diffusion_models")
    weights["final_layer.linear.bias"][0] = float("nan")
    name = add_file("diffusion_models", "nan.safetensors", weights, sana_config=dump_config(tiny.TRANSFORMER))
    graph.nodes["1"]["inputs"]["model_name"] = name
    save(graph, graph.add("SanaDCAEDecode", samples=sample(graph, models), vae=models[2]))
    node_type, error = error_of(server, graph, models)
    assert node_type == "SanaSampler"
    assert "Sana transformer" in error and "NaN" in error


def test_nan_of_the_decoder(server, graph, models, add_file, tiny_models):
    weights = tensors(tiny_models, "vae")
    weights["decoder.project_in.main.conv.bias"][0] = float("nan")
    name = add_file("vae", "nan.safetensors", weights, sana_config=dump_config(tiny.DC_AE))
    graph.nodes["3"]["inputs"]["vae_name"] = name
    save(graph, graph.add("VAEDecode", samples=sample(graph, models), vae=models[2]))
    node_type, error = error_of(server, graph, models)
    assert node_type == "VAEDecode"
    assert "decoder" in error and "NaN" in error


def test_nan_of_the_text_encoder(server, graph, models, tiny_models):
    encoder = tiny.text_encoder()
    encoder.model.norm.weight.data[0] = float("nan")
    path = tiny_models / "text_encoders" / "nan.safetensors"
    save_text_encoder(encoder, path)
    graph.nodes["2"]["inputs"]["text_encoder_name"] = path.name
    save_latent(graph, sample(graph, models))
    node_type, error = error_of(server, graph, models)
    path.unlink()
    assert node_type == "SanaPromptEncode"
    assert "text encoder" in error and "NaN" in error


def test_empty_prompts_draw_something(server, graph, models):
    image = graph.add("VAEDecode", samples=sample(graph, models, text=""), vae=models[2])
    save(graph, image)
    assert pictures_of(server, graph)[0].size == (96, 64)


def test_a_prompt_that_is_too_long_is_cut_with_a_warning(server, graph, models):
    save_latent(graph, sample(graph, models, text=" ".join([PROMPT] * 100)))
    assert latent_of(server, graph).isfinite().all()
    assert "was left out" in server.text()


def test_a_variant_that_does_not_fit(server, graph, models):
    graph.nodes["1"]["inputs"]["variant"] = "Sana_600M_512px"
    save_latent(graph, sample(graph, models))
    node_type, error = error_of(server, graph, models)
    assert node_type == "SanaDiffusionModelLoader"
    assert "depth 2" in error and "Sana_600M_512px" in error


def test_layers_that_the_model_does_not_have(server, graph, models):
    patched = graph.add("SanaPAG", model=models[0], scale=2.0, layers="8")
    save_latent(graph, sample(graph, (patched, *models[1:])))
    node, message = error_of(server, graph, models)
    assert node == "SanaPAG" and "blocks [8]: expected one or more of 0 to 1" in message
    graph.nodes[patched[0]]["inputs"]["layers"] = "middle"
    with pytest.raises(Refused, match="expected numbers with commas"):
        server.run(graph)


def test_an_empty_guidance_interval(server, graph, models):
    save_latent(graph, sample(graph, models, guidance_interval_low=0.8, guidance_interval_high=0.2))
    node, message = error_of(server, graph, models)
    assert node == "SanaSampler" and "interval 0.8 to 0.2 is empty" in message
