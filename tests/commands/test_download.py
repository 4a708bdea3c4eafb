"""The command line: what it fetches, where to, and what it says when something is wrong."""

import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from huggingface_hub import constants

from sana_core.__main__ import main
from sana_core.published import AUTOENCODER, PUBLISHED, TEXT_ENCODER
from tests.hub_server import content, local_hub

ROOT = Path(__file__).parents[2]
MODEL = "Sana_600M_512px"
LARGE = 25_000_000
# The files of the table are too large for a test, hence another size. All else is the real command.
START = f"""
import sys
from dataclasses import replace
from sana_core.__main__ import main
from sana_core.published import PUBLISHED
PUBLISHED["{MODEL}"] = replace(PUBLISHED["{MODEL}"], size={LARGE})
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture
def server(monkeypatch):
    with local_hub() as server:
        for index, name in enumerate([MODEL, TEXT_ENCODER, AUTOENCODER, "dc-ae-f32c32-in-1.0"]):
            monkeypatch.setitem(PUBLISHED, name, replace(PUBLISHED[name], size=9000 + index))
            server.publish(PUBLISHED[name], content(9000 + index))
        yield server


def path_of(models, name):
    return models / PUBLISHED[name].folder / PUBLISHED[name].filename


def error_of(capsys, *argv):
    """The one line that a wrong call leaves on stderr, after the terms of the files."""
    assert main(["download", *map(str, argv)]) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_list_has_every_file_with_its_size_and_licence(capsys):
    assert main(["download", "--list"]) == 0
    listed = capsys.readouterr().out
    assert set(PUBLISHED) == set(re.findall(r"^(\S+)  ", listed, re.MULTILINE))
    assert re.search(r"^Sana_1600M_1024px_BF16 +3\.21 GB, 9\.69 GB with what it needs$", listed, re.MULTILINE)
    assert listed.count("Apache-2.0") == 9 and listed.count("Gemma Terms of Use") == 1


def test_a_model_comes_with_what_it_needs(server, tmp_path, capsys):
    paths = [path_of(tmp_path, name) for name in (MODEL, TEXT_ENCODER, AUTOENCODER)]
    assert main(["download", MODEL, "--to", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines() == [str(path) for path in paths]
    assert f"{MODEL}: NVIDIA" in said.err and "Gemma Terms of Use" in said.err, "the terms come before the files"
    assert [path.stat().st_size for path in paths] == [9000, 9001, 9002]

    server.requests.clear()
    assert main(["download", MODEL, "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [f"{path} (was there already)" for path in paths]
    assert server.requests == []


def test_what_two_models_share_comes_once(server, tmp_path, capsys):
    assert main(["download", MODEL, "dc-ae-f32c32-in-1.0", AUTOENCODER, "--to", str(tmp_path)]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 4


def test_only_leaves_out_what_it_needs(server, tmp_path, capsys):
    repository = f"Efficient-Large-Model/{MODEL}"
    assert main(["download", repository, "--only", "--to", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(path_of(tmp_path, MODEL))]


def test_a_whole_comfyui_may_be_named(server, tmp_path, capsys):
    (tmp_path / "models").mkdir()
    assert main(["download", AUTOENCODER, "--to", str(tmp_path)]) == 0
    assert path_of(tmp_path / "models", AUTOENCODER).is_file()


def test_the_comfyui_around_the_pack_is_found(server, tmp_path, capsys, monkeypatch):
    from sana_core import hub

    (tmp_path / "models").mkdir()
    monkeypatch.setattr(hub, "__file__", str(tmp_path / "custom_nodes" / "ComfyUI-Sana" / "sana_core" / "hub.py"))
    assert main(["download", AUTOENCODER]) == 0
    assert path_of(tmp_path / "models", AUTOENCODER).is_file()


@pytest.mark.parametrize(
    "argv, words",
    [
        (["Sana_600M_512"], "Did you mean Sana_600M_512px"),
        (["google/gemma-2-2b-it"], "not in the table of published files"),
        ([], "name what to download; --list shows what there is"),
        ([AUTOENCODER], "say with --to which models folder to fill"),
    ],
)
def test_wrong_calls_are_explained(server, capsys, argv, words):
    assert words in error_of(capsys, *argv)
    assert server.requests == []


def test_what_stops_a_download_is_one_line_without_the_token(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_a_secret")
    server.refused[PUBLISHED[TEXT_ENCODER].repository] = (403, "GatedRepo")
    line = error_of(capsys, MODEL, "--to", tmp_path)
    assert "https://huggingface.co/Comfy-Org/PixelDiT" in line and "hf_a_secret" not in line
    assert path_of(tmp_path, MODEL).is_file(), "what came before it stays"

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in error_of(capsys, MODEL, "--to", tmp_path)


def wait_for(condition, process):
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_ctrl_c_keeps_what_came_and_the_same_command_goes_on(tmp_path):
    """A process of its own, which finds the hub by HF_ENDPOINT."""
    with local_hub() as server:
        data = content(LARGE)
        server.publish(PUBLISHED[MODEL], data)
        server.pause_after = 15_000_000
        command = [sys.executable, "-c", START, "download", MODEL, "--only", "--to", str(tmp_path)]
        environment = {**os.environ, "HF_ENDPOINT": server.address, "HF_HOME": str(tmp_path / "home")}
        options = {"cwd": ROOT, "env": environment, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        folder = tmp_path / PUBLISHED[MODEL].folder
        with subprocess.Popen(command, **options) as process:
            wait_for(lambda: any(part.stat().st_size for part in folder.glob("*.part")), process)
            process.send_signal(signal.SIGINT)
            output, errors = process.communicate(timeout=60)
        assert process.returncode == 1 and output == ""
        assert errors.splitlines()[-1] == ("error: stopped. What has come is kept, the same command goes on from there")
        assert "Traceback" not in errors
        (part,) = folder.iterdir()
        kept = part.stat().st_size
        assert 0 < kept <= 15_000_000 and part.suffix == ".part"

        server.pause_after = None
        again = subprocess.run(command, **options, timeout=120)
        assert (again.returncode, again.stdout) == (0, f"{path_of(tmp_path, MODEL)}\n"), again.stderr
        assert server.asked("GET")[-1]["range"] == f"bytes={kept}-"
        assert path_of(tmp_path, MODEL).read_bytes() == data
