"""Every node can be found, read about and translated."""

import asyncio
import json

import pytest

from tests.conftest import ROOT

NODE_IDS = {  # never change once released
    "SanaDiffusionModelLoader",
    "SanaTextEncoderLoader",
    "SanaDCAELoader",
    "SanaLoraLoader",
    "SanaDownloadModel",
    "SanaControlNetLoader",
    "SanaControlNetApply",
    "SanaPromptEncode",
    "SanaPromptsFromFile",
    "SanaEmptyLatent",
    "SanaResolution",
    "SanaDCAEEncode",
    "SanaDCAEDecode",
    "SanaSampler",
    "SanaFlowDPMSolver",
    "SanaScheduler",
    "SanaPAG",
    "SanaSprintSampler",
    "SanaScorerLoader",
    "SanaPickBest",
    "SanaXYValues",
    "SanaXYGrid",
    "SanaDataset",
    "SanaTrainer",
}
CATEGORIES = {"loaders", "conditioning", "latent", "sampling", "image", "training"}
LANGUAGES = ("en", "zh")
FOLDERS = ("diffusion_models", "text_encoders", "vae")


def translations(language):
    return json.loads((ROOT / "locales" / language / "nodeDefs.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def schemas(pack):
    async def load():
        extension = await pack.comfy_entrypoint()
        await extension.on_load()
        return await extension.get_node_list()

    return {node.GET_SCHEMA().node_id: node.GET_SCHEMA() for node in asyncio.run(load())}


@pytest.fixture(params=sorted(NODE_IDS))
def schema(request, schemas):
    return schemas[request.param]


def test_all_nodes_are_registered(schemas, pack):
    assert schemas.keys() == NODE_IDS
    assert not hasattr(pack, "NODE_CLASS_MAPPINGS"), "ComfyUI would then ignore comfy_entrypoint"


def test_a_node_describes_itself(schema):
    assert schema.display_name and schema.search_aliases
    assert len(schema.description) > 20
    assert schema.category in {
        "sana/loaders",
        "sana/conditioning",
        "sana/latent",
        "sana/sampling",
        "sana/image",
        "sana/training",
    }


def test_every_input_and_output_has_a_tooltip(schema):
    for entry in [*schema.inputs, *schema.outputs]:
        assert entry.tooltip and entry.tooltip.endswith("."), entry.id


def test_a_node_has_a_help_page_that_names_every_input(schema):
    page = (ROOT / "web" / "docs" / f"{schema.node_id}.md").read_text(encoding="utf-8")
    assert page.startswith(f"# {schema.display_name}\n")
    missing = [entry.id for entry in schema.inputs if f"**{entry.id}**" not in page]
    assert not missing


@pytest.mark.parametrize("language", LANGUAGES)
def test_a_node_is_translated(schema, language):
    entry = translations(language)[schema.node_id]
    inputs, outputs = entry.get("inputs", {}), entry["outputs"]
    assert inputs.keys() == {entry.id for entry in schema.inputs}
    assert outputs.keys() == {str(index) for index in range(len(schema.outputs))}
    texts = [entry["display_name"], entry["description"]]
    texts += [text for part in (*inputs.values(), *outputs.values()) for text in (part["name"], part["tooltip"])]
    assert all(texts)
    if language == "zh":
        tooltips = [part["tooltip"] for part in (*inputs.values(), *outputs.values())]
        assert all(any("\u4e00" <= sign <= "\u9fff" for sign in text) for text in [entry["description"], *tooltips])


def test_english_is_what_the_schema_says(schema):
    entry = translations("en")[schema.node_id]
    assert (entry["display_name"], entry["description"]) == (schema.display_name, schema.description)
    for part in schema.inputs:
        assert entry["inputs"][part.id] == {"name": part.display_name or part.id, "tooltip": part.tooltip}
    for index, part in enumerate(schema.outputs):
        assert entry["outputs"][str(index)] == {"name": part.display_name, "tooltip": part.tooltip}


@pytest.mark.parametrize("language", LANGUAGES)
def test_translations_and_help_pages_have_a_node(language):
    assert translations(language).keys() == NODE_IDS
    assert {path.stem for path in (ROOT / "web" / "docs").glob("*.md")} == NODE_IDS


def test_loaders_list_the_models_of_the_pack(schemas):
    import folder_paths

    for folder in FOLDERS:
        assert str(ROOT / "models" / folder) in folder_paths.get_folder_paths(folder)
