"""The node: where ComfyUI looks for the files, its bar, Cancel, and the names that it hands to the loaders."""

from dataclasses import replace

import pytest

from tests.hub_server import content, local_hub

MODEL = "Sana_600M_512px"
KINDS = ("diffusion_models", "text_encoders", "vae", "controlnet")


@pytest.fixture
def node(part):
    return part("nodes.download").SanaDownloadModel


@pytest.fixture
def published(part, monkeypatch):
    """The pack's table, with files of some bytes."""
    module = part("sana_core.published")
    for index, name in enumerate([MODEL, module.TEXT_ENCODER, module.AUTOENCODER]):
        monkeypatch.setitem(module.PUBLISHED, name, replace(module.PUBLISHED[name], size=30_000 + index))
    return module


@pytest.fixture
def server(published):
    with local_hub() as server:
        for name in (MODEL, published.TEXT_ENCODER, published.AUTOENCODER):
            server.publish(published.PUBLISHED[name], content(published.PUBLISHED[name].size))
        yield server


@pytest.fixture
def models(part, tmp_path, monkeypatch):
    """A models folder of its own, in which ComfyUI lists a folder of an older name first."""
    import folder_paths

    for kind in KINDS:
        extensions = folder_paths.folder_names_and_paths[kind][1]
        folders = [str(tmp_path / "old" / kind[:2]), str(tmp_path / kind)]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, (folders, extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return tmp_path


@pytest.fixture
def positions(comfy, monkeypatch):
    """What the front end is told of the bar."""
    import comfy.utils

    seen = []
    monkeypatch.setattr(comfy.utils, "PROGRESS_THROTTLE_MIN_INTERVAL", 0)
    hook = lambda value, total, preview, **_: seen.append((value, total))  # noqa: E731
    monkeypatch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
    return seen


def test_the_files_go_where_the_loaders_find_them(node, server, models, positions, part):
    import folder_paths

    result = node.execute(MODEL)
    names = ["Sana_600M_512px.safetensors", "gemma_2_2b_it_elm_bf16.safetensors", "dc-ae-f32c32-sana-1.1.safetensors"]
    assert list(result.result[:3]) == names
    for kind, name in zip(KINDS, names, strict=False):
        assert folder_paths.get_full_path_or_raise(kind, name) == str(models / kind / name)
        assert part("nodes.model_files").find_model(kind, name) == models / kind / name
        assert name in folder_paths.get_filename_list(kind)

    (text,) = result.ui.as_dict()["text"]
    assert all(str(models / kind / name) in text for kind, name in zip(KINDS, names, strict=False))
    assert "Gemma Terms of Use" in text and "Press R" in text


def test_the_bar_goes_over_all_files(node, server, models, positions):
    node.execute(MODEL)
    total = 30_000 + 30_001 + 30_002
    values = [value for value, _ in positions]
    assert {of for _, of in positions} == {total}
    assert values == sorted(values) and values[0] == 0 and values[-1] == total
    assert len(set(values)) > 10


def test_only_the_named_file(node, server, models, positions):
    name, *others = node.execute(MODEL, with_parts=False).result
    assert name == "Sana_600M_512px.safetensors"
    assert [path.name for path in models.rglob("*.safetensors")] == [name]
    assert all(
        f"no {output} for Load Sana" in blocker.message
        for output, blocker in zip(["text_encoder_name", "vae_name", "control_net_name"], others, strict=True)
    )


def test_a_file_in_another_folder_of_the_user_is_there(node, server, models, positions):
    shared = models / "old" / "di" / "Sana_600M_512px.safetensors"
    shared.parent.mkdir(parents=True)
    shared.write_bytes(content(30_000))
    result = node.execute(MODEL, with_parts=False)
    assert server.requests == []
    assert str(shared) in result.ui.as_dict()["text"][0]


def test_cancel_ends_it_and_the_next_run_goes_on(node, server, models, positions, comfy, monkeypatch):
    import comfy.model_management as management
    import comfy.utils

    monkeypatch.setattr(management, "interrupt_processing", False)
    hook = lambda value, *_, **__: management.interrupt_current_processing(value > 10_000)  # noqa: E731
    with monkeypatch.context() as patch:
        patch.setattr(comfy.utils, "PROGRESS_BAR_HOOK", hook)
        with pytest.raises(management.InterruptProcessingException):
            node.execute(MODEL)
    assert not management.interrupt_processing, "ComfyUI has taken note of it"
    (kept,) = models.rglob("*.part")
    size = kept.stat().st_size
    assert 10_000 < size < 30_000

    node.execute(MODEL)
    assert [headers.get("range") for headers in server.asked("GET")][1] == f"bytes={size}-"
    assert (models / "diffusion_models" / "Sana_600M_512px.safetensors").read_bytes() == content(30_000)
    assert not list(models.rglob("*.part"))


def test_what_stops_it_is_said(node, server, models, positions, published):
    server.refused[published.PUBLISHED[MODEL].repository] = (403, "GatedRepo")
    with pytest.raises(OSError, match="sign in and accept its licence"):
        node.execute(MODEL)


def test_nothing_is_asked_of_the_network_before_a_run(node, server, models):
    node.GET_SCHEMA()
    node.INPUT_TYPES()
    assert server.requests == [] and not any(models.iterdir())


def test_the_outputs_may_be_linked_to_the_loaders(node, part):
    from comfy_execution.validation import validate_node_input

    loaders = part("nodes.loaders")
    classes = (loaders.SanaDiffusionModelLoader, loaders.SanaTextEncoderLoader, loaders.SanaDCAELoader)
    for output, name, loader in zip(node.RETURN_TYPES, node.RETURN_NAMES, classes, strict=False):
        (wanted, *_) = loader.INPUT_TYPES()["required"][name]
        assert validate_node_input(output, wanted)
    assert node.OUTPUT_NODE
