"""Who may import whom: nodes -> pipeline/training -> {checkpoint, text, sampler} -> models -> kernels.

`config`, `finite` and `resolution` are below all. The rule is read from the source by `ast`, so that an
import inside a function counts as well.
"""

import ast
import re
import sys
from pathlib import Path

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest

ROOT = Path(__file__).parents[1]
COMFY = {
    "app", "comfy", "comfy_api", "comfy_config", "comfy_execution", "comfy_extras", "execution", "folder_paths",
    "latent_preview", "node_helpers", "nodes", "server",
}  # fmt: skip
FROM_COMFYUI = {"torch", "torchvision", "torchaudio", "numpy"}  # the build that fits the machine: never ours to require

LOWEST = {"config", "kernels"}
MIDDLE = LOWEST | {"models"}
UPPER = MIDDLE | {
    "autoencoder", "captions", "checkpoint", "finite", "hub", "pictures", "processor", "published", "resolution",
    "sampler", "sampling", "source", "styles", "text",
}  # fmt: skip
MAY_IMPORT = {
    "autoencoder": {"finite", "models"},
    "captions": set(),
    "config": set(),
    "finite": set(),
    "hub": {"published"},
    "pictures": set(),
    "processor": set(),
    "prompts": {"resolution"},
    "published": {"config"},
    "resolution": set(),
    "kernels": {"config"},
    "models": LOWEST,
    "sampler": set(),  # a sampler receives a callable, never a model class
    "sampling": {"captions", "finite", "models", "sampler"},
    "source": {"autoencoder", "finite", "models", "pictures", "sampler"},
    "styles": set(),
    "text": {"config"},
    "checkpoint": MIDDLE | {"text"},  # load_text_encoder builds text.TextEncoder
    "pipeline": UPPER,
    "training": UPPER | {"lettering", "pipeline"},  # the loop draws samples of what it trains
    "lettering": set(),
    "grid": {"lettering"},
    "evaluation": {"pictures"},  # a pipeline to draw with is handed over
    "__init__": {"pipeline"},
    "commands": UPPER | {"evaluation", "grid", "pipeline", "prompts", "training"},
    "__main__": {"commands", "processor"},
}
CORE = sorted((ROOT / "sana_core").rglob("*.py"))
PACK = [ROOT / "__init__.py", *sorted((ROOT / "nodes").rglob("*.py")), *CORE]
SOURCES = [
    *PACK,
    *(path for folder in ("benchmarks", "scripts", "tests") for path in sorted((ROOT / folder).rglob("*.py"))),
]


def name_of(path):
    return path.relative_to(ROOT).as_posix()


def imports_of(path, source=None):
    """Yields (level, dotted name) of every import; relative ones are resolved to a name from the root of the pack."""
    package = path.relative_to(ROOT).parent.parts
    for node in ast.walk(ast.parse(source or path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((0, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            prefix = ".".join([*base, *([node.module] if node.module else [])])
            yield from ((node.level, f"{prefix}.{alias.name}".lstrip(".")) for alias in node.names)


def part_of(path):
    return path.relative_to(ROOT / "sana_core").parts[0].removesuffix(".py")


def violations(path, source=None):
    """Sentences that say which imports of a file of the pack break the rule."""
    in_core = path.is_relative_to(ROOT / "sana_core")
    fused = path.is_relative_to(ROOT / "sana_core" / "kernels" / "fused")
    found = []
    for level, name in imports_of(path, source):
        top, *rest = name.split(".")
        if level == 0 and top == "sana_core":
            found.append(f"imports {name} by its absolute name, which ComfyUI cannot resolve")
        if level == 0 and in_core and top in COMFY:
            found.append(f"imports {name}: only nodes/ may import ComfyUI")
        if top == "triton" and not fused:
            found.append(f"imports {name}: only sana_core/kernels/fused may import triton")
        if level and in_core:
            own, other = part_of(path), rest[0] if top == "sana_core" and rest else top
            if top != "sana_core" or other not in MAY_IMPORT[own] | {own}:
                found.append(f"imports {name}: {own} may import {sorted(MAY_IMPORT[own])}")
    return found


def test_every_part_has_its_place():
    assert {part_of(path) for path in CORE} <= set(MAY_IMPORT), "name the new part in MAY_IMPORT"
    assert {part_of(path) for path in CORE} >= {"config", "kernels", "models", "checkpoint", "sampler", "pipeline"}


@pytest.mark.parametrize("path", PACK, ids=name_of)
def test_imports_point_downwards(path):
    assert violations(path) == []


@pytest.mark.parametrize(
    "path, source",
    [
        ("sana_core/models/sana.py", "from ..checkpoint import load_transformer"),
        ("sana_core/models/sana.py", "def f():\n    import comfy.ops"),
        ("sana_core/models/sana.py", "from sana_core.config import SanaConfig"),
        ("sana_core/models/sana.py", "from .. import pipeline"),
        ("sana_core/models/sana.py", "from ...nodes import loaders"),
        ("sana_core/kernels/reference.py", "import triton.language as tl"),
        ("sana_core/sampler/flow.py", "from ..models.sana import SanaTransformer"),
        ("nodes/loaders.py", "from sana_core.config import SanaConfig"),
    ],
)
def test_a_violation_is_seen(path, source):
    assert len(violations(ROOT / path, source)) == 1


def test_the_root_imports_nothing_but_nodes():
    assert {name.split(".")[0] for level, name in imports_of(ROOT / "__init__.py") if level} == {"nodes"}


@pytest.mark.parametrize("path", SOURCES, ids=name_of)
def test_a_file_is_about_one_thing(path):
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= 400, f"{name_of(path)} has {lines} lines: what is its second subject?"
    assert path.stem not in {"utils", "helpers", "common", "misc"}


def test_requirements_are_what_the_pack_imports():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    required = [line for line in lines if line and not line.startswith("#")]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == required

    names = {re.split(r"[<>=~! ]", line)[0].replace("-", "_") for line in required}
    names = {"PIL" if name == "Pillow" else name for name in names}
    imported = {name.split(".")[0] for path in PACK for level, name in imports_of(path) if level == 0}
    optional = {re.split(r"[<>=~! ]", line)[0] for line in sum(project["optional-dependencies"].values(), [])}
    outside = imported - set(sys.stdlib_module_names) - COMFY - FROM_COMFYUI - optional - {"triton"}
    assert outside == names
