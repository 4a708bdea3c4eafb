"""Old classes become nodes that exist, whichever form they have and in whatever order core replaces them."""

import asyncio
from types import SimpleNamespace

import pytest

from tests import old_graphs

SIZE = ["width", "height", "batch_size"]
FORMS = {  # old class -> the inputs of each form, widgets in the order that files store them in
    "SanaCheckpointLoader": [
        ["ckpt_name", "model"],
        ["ckpt_name", "model", "dtype"],
        ["ckpt_name", "model", "dtype", "enable_cfg_passthrough"],
    ],
    "GemmaLoader": [["model_name", "device", "dtype"]],
    "ExtraVAELoader": [["vae_name", "vae_type", "dtype"]],
    "SanaTextEncode": [["text", "GEMMA"], ["text", "preset_styles", "GEMMA"]],
    "GemmaTextEncode": [["text", "GEMMA"]],
    "SanaResolutionSelect": [["model", "ratio"]],
    "SanaResolutionCond": [["width", "height", "cond"]],
    "EmptySanaLatentImage": [SIZE],
    "EmptyDCAELatentImage": [SIZE],
    "ScmModelSampling": [["zsnr", "model"], ["cfg_scale", "zsnr", "model"]],
}
SOCKETS = {"GEMMA", "cond"}  # inputs that no widget stands for
OUTPUTS = {  # in our types: CLIP was GEMMA
    "SanaCheckpointLoader": ["MODEL"],
    "GemmaLoader": ["CLIP"],
    "ExtraVAELoader": ["VAE"],
    "SanaTextEncode": ["CONDITIONING"],
    "GemmaTextEncode": ["CONDITIONING"],
    "SanaResolutionSelect": ["INT", "INT"],
    "SanaResolutionCond": ["CONDITIONING"],
    "EmptySanaLatentImage": ["LATENT"],
    "EmptyDCAELatentImage": ["LATENT"],
    "ScmModelSampling": ["MODEL"],
}


class Ranked(str):
    """A node's id, which a small set yields in the order of its rank."""

    def __new__(cls, text: str, rank: int):
        made = super().__new__(cls, text)
        made.rank = rank
        return made

    def __hash__(self):
        return self.rank

    __eq__ = str.__eq__


def ranked(prompt, readers_first):
    """The prompt with ids that make core, which goes through a set, begin at its end or at its beginning."""
    size = len(prompt)
    ids = {key: Ranked(key, size - int(key) if readers_first else int(key)) for key in prompt}
    for node in prompt.values():
        for name, value in node["inputs"].items():
            if isinstance(value, list):
                node["inputs"][name] = [ids[value[0]], value[1]]
    return {ids[key]: node for key, node in prompt.items()}


@pytest.fixture(scope="module")
def replacements(part):
    return part("nodes.replacements")


@pytest.fixture
def classes(part, tiny_models, monkeypatch):
    """ComfyUI's table of node classes, with ours and the tiny models."""
    import folder_paths

    from nodes import NODE_CLASS_MAPPINGS

    for node in part("nodes").NODES:
        monkeypatch.setitem(NODE_CLASS_MAPPINGS, node.GET_SCHEMA().node_id, node)
    for kind in ("diffusion_models", "text_encoders", "vae"):
        extensions = folder_paths.folder_names_and_paths[kind][1]
        monkeypatch.setitem(folder_paths.folder_names_and_paths, kind, ([str(tiny_models / kind)], extensions))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    return NODE_CLASS_MAPPINGS


@pytest.fixture
def replace(classes, replacements):
    """Core's own replacement of a prompt, in place."""
    from app.node_replace_manager import NodeReplaceManager

    manager = NodeReplaceManager()
    for replacement in replacements.REPLACEMENTS:
        manager.register(replacement)

    def replace(prompt):
        manager.apply_replacements(prompt)
        return prompt

    return replace


def errors_in(prompt):
    """What ComfyUI says against a prompt: {(class, input): message}."""
    import execution

    valid, _, _, found = asyncio.run(execution.validate_prompt("test", prompt, None))
    assert valid == (not found)
    return {
        (node["class_type"], error["extra_info"]["input_name"]): f"{error['message']}: {error['details']}"
        for node in found.values()
        for error in node["errors"]
    }


def test_every_old_class_has_one_replacement(replacements):
    old = [replacement.old_node_id for replacement in replacements.REPLACEMENTS]
    assert sorted(old) == sorted(old_graphs.OLD_CLASSES) == sorted(FORMS)


@pytest.mark.parametrize("old", sorted(FORMS))
def test_a_replacement_maps_what_all_forms_have_to_what_the_new_node_has(replacements, classes, old):
    (entry,) = [entry.as_dict() for entry in replacements.REPLACEMENTS if entry.old_node_id == old]
    new = classes[entry["new_node_id"]]
    inputs = new.INPUT_TYPES()
    taken = {each["new_id"]: each.get("old_id") for each in entry["input_mapping"]}
    assert inputs["required"].keys() <= taken.keys() <= inputs["required"].keys() | inputs.get("optional", {}).keys()
    mapped = {name for name in taken.values() if name}
    assert all(mapped <= set(form) for form in FORMS[old])

    widgets = entry["old_widget_ids"] or []
    assert all(form[: len(widgets)] == widgets for form in FORMS[old])
    assert mapped - SOCKETS - {"model" if old == "ScmModelSampling" else ""} <= set(widgets)

    assert list(new.RETURN_TYPES) == OUTPUTS[old]
    assert entry["output_mapping"] == [{"old_idx": place, "new_idx": place} for place in range(len(OUTPUTS[old]))]


@pytest.mark.parametrize("readers_first", [False, True])
@pytest.mark.parametrize("name", old_graphs.NAMES)
def test_an_old_prompt_asks_for_nothing_but_files_and_the_sprint_sampler(replace, name, readers_first):
    old = old_graphs.api(name)
    prompt = replace(ranked(old_graphs.api(name), readers_first))
    assert {node["class_type"] for node in prompt.values()}.isdisjoint(old_graphs.OLD_CLASSES)

    wanted = {
        ("SanaDiffusionModelLoader", "model_name"): old["1"]["inputs"]["ckpt_name"],
        ("SanaTextEncoderLoader", "text_encoder_name"): old["2"]["inputs"]["model_name"],
        ("SanaDCAELoader", "vae_name"): old["3"]["inputs"]["vae_name"],
    }
    wanted = {place: value for place, value in wanted.items() if "/" in value}  # others are files that are there
    if name in old_graphs.SPRINT:
        wanted["KSampler", "sampler_name"] = "scm"
    errors = errors_in(prompt)
    assert errors.keys() == wanted.keys()
    for place, value in wanted.items():
        assert errors[place].startswith("Value not in list") and f"'{value}'" in errors[place]


@pytest.mark.parametrize("readers_first", [False, True])
@pytest.mark.parametrize("name", old_graphs.NAMES)
def test_an_old_prompt_is_valid_once_these_are_chosen(replace, name, readers_first):
    prompt = old_graphs.pick_old_files(old_graphs.api(name), name)
    if name in old_graphs.SPRINT:
        prompt = old_graphs.use_sprint_sampler(prompt)
    assert errors_in(replace(ranked(prompt, readers_first))) == {}


def test_texts_and_sizes_are_kept(replace):
    prompt = replace(old_graphs.api("sana"))
    encode = {"class_type": "SanaPromptEncode", "_meta": prompt["4"]["_meta"]}
    text = "two green birds sleep under a warm yellow sun"
    assert prompt["4"] == encode | {"inputs": {"clip": ["2", 0], "text": text, "use_instruction": True}}
    text = {"text": "blue background", "use_instruction": False}
    assert prompt["5"]["inputs"] == {"clip": ["2", 0]} | text
    assert prompt["6"]["inputs"] == {"base_size": "512px", "aspect_ratio": "0.57"}
    assert prompt["7"]["inputs"] == {"width": ["6", 0], "height": ["6", 1], "batch_size": 1}


def test_an_unknown_size_is_refused(replace):
    prompt = old_graphs.pick_old_files(old_graphs.api("sana"), "sana")
    prompt["6"]["inputs"] |= {"model": "8K"}
    message = errors_in(replace(prompt))["SanaResolution", "base_size"]
    assert "base_size is '8K'; expected one of 256, 512, 1024, 2048, 4096" in message


def test_a_prompt_without_titles_is_completed(replace, replacements):
    prompt = old_graphs.pick_old_files(old_graphs.api("sana"), "sana")
    for node in prompt.values():
        del node["_meta"]
    replace(replacements.complete_old_nodes({"prompt": prompt})["prompt"])
    assert errors_in(prompt) == {}
    assert "_meta" not in prompt["8"], "ComfyUI's own nodes are none of our business"


@pytest.fixture
def registered(classes, replacements, monkeypatch):
    """Runs the registration at a server without a network; returns the old classes that it then knows."""
    import server
    from app.node_replace_manager import NodeReplaceManager

    def registered(instance=True):
        manager, handlers = NodeReplaceManager(), []
        fake = SimpleNamespace(node_replace_manager=manager, add_on_prompt_handler=handlers.append)
        monkeypatch.setattr(server.PromptServer, "instance", fake if instance else None, raising=False)
        asyncio.run(replacements.register_replacements())
        assert len(handlers) == instance
        return manager.as_dict().keys()

    return registered


def test_all_are_registered_where_the_old_pack_is_absent(registered):
    assert registered() == old_graphs.OLD_CLASSES


def test_a_class_that_exists_is_left_alone(registered, classes, monkeypatch):
    monkeypatch.setitem(classes, "SanaTextEncode", object)
    assert registered() == old_graphs.OLD_CLASSES - {"SanaTextEncode"}


def test_without_a_server_nothing_is_registered(registered):
    assert registered(instance=False) == set()


def test_the_fixtures_hold_every_form():
    prompts = [old_graphs.api(name) for name in old_graphs.NAMES]
    for old, forms in FORMS.items():
        found = {frozenset(node["inputs"]) for prompt in prompts for node in old_graphs.nodes_of(prompt, old)}
        assert found == {frozenset(form) for form in forms}, old
