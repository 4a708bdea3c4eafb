"""Every shipped workflow runs as it is, but for its size, on tiny weights under the names of the published files."""

import json
import shutil
from pathlib import Path

import pytest

from tests import stand_ins
from tests.comfy.graphs import pictures_of
from tests.conftest import ROOT

pytestmark = pytest.mark.server

WORKFLOWS = sorted((ROOT / "workflows" / "api").glob("*.json"))
CAPABILITIES = {
    "nano_text_to_image", "text_to_image_1024", "text_to_image_2k", "text_to_image_4k", "1_5_text_to_image",
    "sprint_text_to_image", "controlnet", "lora", "image_to_image", "inpaint", "prompts_from_file", "pag",
    "train_lora", "train_full",
}  # fmt: skip


def test_every_capability_has_a_workflow():
    assert {path.stem.removeprefix("sana_") for path in WORKFLOWS} >= CAPABILITIES


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_shipped_workflows_run(server, tiny_models, path):
    workflow = json.loads(path.read_text(encoding="utf-8"))
    shutil.copytree(ROOT / "workflows" / "inputs", server.base / "input", dirs_exist_ok=True)
    stand_ins.make(workflow, tiny_models, server.base / "input")
    if not stand_ins.ships_with_the_pack(workflow):
        stand_ins.shrink(workflow)
    saved = server.base / "output"  # others are previews
    images = [image for image in pictures_of(server, workflow) if Path(image.filename).is_relative_to(saved)]
    assert len(images) == (3 if path.stem == "sana_prompts_from_file" else 1)
    for image in images:
        assert max(high for _, high in image.getextrema()) > 0
        assert image.info["prompt"], "the picture must hold its workflow"
