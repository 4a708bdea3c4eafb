"""A prompt file on a real server: the rest of the graph runs once for each prompt."""

import pytest

from tests.comfy.graphs import finished, sample, save
from tests.comfy.server import Refused

pytestmark = pytest.mark.server


@pytest.fixture
def write(server):
    """Puts a prompt file into the server's input folder for one test."""
    folder = server.base / "input"
    folder.mkdir(exist_ok=True)
    written = []

    def write(content, name="prompts.txt"):
        (folder / name).write_text(content, encoding="utf-8")
        written.append(folder / name)
        return name

    yield write
    for path in written:
        path.unlink(missing_ok=True)


def draw(graph, models, file, **inputs):
    """Adds a whole graph for the prompts of a file; returns the node that reads it."""
    options = dict(base_size="256", negative_prompt="", seed=3, start=1, count=0) | inputs
    node, _ = graph.add("SanaPromptsFromFile", file=file, **options)
    prompt, negative, width, height, seed, name = ([node, index] for index in range(6))
    model, clip, vae = models
    positive = graph.add("SanaPromptEncode", clip=clip, text=prompt, use_instruction=True)
    negative = graph.add("SanaPromptEncode", clip=clip, text=negative, use_instruction=False)
    latent = graph.add("SanaEmptyLatent", width=width, height=height, batch_size=1)
    samples = graph.add(
        "SanaSampler", model=model, positive=positive, negative=negative, latent_image=latent, seed=seed, steps=2,
        cfg=4.5, sampler="flow_dpm-solver", shift=0.0, denoise=1.0,
    )  # fmt: skip
    image = graph.add("SanaDCAEDecode", samples=samples, vae=vae, tile_size=0, tiling="auto")
    graph.add("SaveImage", images=image, filename_prefix=name)
    return node


def names_of(run):
    entries = [entry for output in run.outputs.values() for entry in output.get("images", [])]
    return [entry["filename"] for entry in entries]


def test_a_picture_for_each_prompt(server, graph, models, write):
    """Each is the picture that its prompt, size and seed give on their own."""
    node = draw(graph, models, write("a red cat --hw 64:96\nbad --ar\n红色背景左边的熊猫 --hw 96:64\n"))
    run = finished(server, graph)
    assert names_of(run) == ["a_red_cat_00001_.png", "红色背景左边的熊猫_00001_.png"]
    assert "prompts.txt, line 2: '--ar' is not understood" in run.texts[node]
    cat, panda = server.images(run)
    assert (cat.size, panda.size) == ((96, 64), (64, 96))

    graph.nodes = {key: value for key, value in graph.nodes.items() if value["class_type"].endswith("Loader")}
    alone = sample(graph, models, seed=3, steps=2, text="a red cat")
    save(graph, graph.add("SanaDCAEDecode", samples=alone, vae=models[2], tile_size=0, tiling="auto"))
    (expected,) = server.images(finished(server, graph))
    assert cat.tobytes() == expected.tobytes()


def test_an_edited_file_is_read_again(server, graph, models, write):
    content = (
        '{"one": {"prompt": "a cat", "width": 64, "height": 64}, "two": {"prompt": "b", "width": 64, "height": 32}}'
    )
    draw(graph, models, write(content, "prompts.json"))
    assert len(server.images(finished(server, graph))) == 2
    write(content.replace("two", "three").replace('"b"', '"c"'), "prompts.json")
    run = finished(server, graph)
    assert [name.split("_")[0] for name in names_of(run)] == ["one", "three"]


def test_files_that_are_not_there_are_refused(server, graph, models):
    draw(graph, models, "../server.log")
    with pytest.raises(Refused, match="is no .txt or .json file in ComfyUI's input folder"):
        server.run(graph)


def test_a_file_without_a_good_line(server, graph, models, write):
    draw(graph, models, write("a --ar 3"))
    run = server.run(graph)
    assert run.error["node_type"] == "SanaPromptsFromFile"
    assert "No prompt of the file can be drawn" in run.error["exception_message"]
