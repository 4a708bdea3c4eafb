"""Prompt files: what the official suffixes mean, and that one bad entry costs no other one."""

import json
import re
from dataclasses import astuple
from pathlib import Path

import pytest

from sana_core.prompts import PromptEntry, read_prompts, safe_name
from sana_core.resolution import Size

WORKFLOWS = Path(__file__).parents[1] / "workflows"
SQUARE = Size(1024, 1024)


@pytest.fixture
def read(tmp_path):
    """Reads what a file of this content holds."""

    def read(content, suffix=".txt"):
        path = tmp_path / f"prompts{suffix}"
        if not isinstance(content, bytes):
            content = (content if isinstance(content, str) else json.dumps(content)).encode("utf-8")
        path.write_bytes(content)
        return read_prompts(path)

    return read


def prompts_of(file):
    return [entry.prompt for entry in file.entries]


@pytest.mark.parametrize("start", [b"", b"\xef\xbb\xbf"], ids=["plain", "byte order mark"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_line_is_a_prompt(read, start, end):
    lines = ["a red cat", "", "  红色背景左边的熊猫 🐼 ", "   ", "one\u2028line\x0bstill", "the last"]
    file = read(start + end.join(lines).encode("utf-8"))
    assert prompts_of(file) == ["a red cat", "红色背景左边的熊猫 🐼", "one\u2028line\x0bstill", "the last"]
    assert [entry.where for entry in file.entries] == ["line 1", "line 3", "line 5", "line 6"]
    assert file.faults == file.notes == ()


@pytest.mark.parametrize(
    "suffixes, base_size, size",
    [  # the sizes are read off NVlabs/Sana ASPECT_RATIO_1024_TEST; a ratio is height : width
        ("--ar 1:1", 1024, Size(1024, 1024)),
        ("--ar 9:16", 1024, Size(768, 1344)),
        ("--aspect_ratio 16:9", 1024, Size(1344, 768)),
        ("--ar 2:3", 1024, Size(832, 1216)),
        ("--ar 2:3", 512, Size(416, 608)),
        ("--ar 2:3", 4096, Size(3328, 4864)),
        ("--ar 1:20", 1024, Size(512, 2048)),
        ("--ar=2:1", 1024, Size(1408, 704)),
        ("--ar 1:1 --aspect_ratio 2:1", 1024, Size(1408, 704)),  # the official order of precedence
        ("--ar 2:1 --ar 1:1", 1024, Size(1408, 704)),
        ("--hw 96:160 --ar 1:1", 1024, Size(96, 160)),
        ("--ar 1:1 --hw 96:160", 96, Size(96, 160)),
    ],
)
def test_official_suffixes(read, suffixes, base_size, size):
    (entry,) = read(f"a cat, --no-glasses --art {suffixes}\n").entries
    assert entry.prompt == "a cat, --no-glasses --art"
    assert entry.size(base_size, SQUARE) == size


def test_what_a_file_leaves_open_is_the_default(read):
    (entry,) = read("a cat").entries
    assert entry.size(96, SQUARE) == SQUARE
    (entry,) = read([{"prompt": "a cat", "width": 512}], ".json").entries
    assert entry.size(96, SQUARE) == Size(1024, 512)


def test_an_aspect_ratio_needs_a_table(read):
    (entry,) = read("a cat --ar 2:3").entries
    with pytest.raises(ValueError, match=r"none for a model of 96 px \(there are 256, 512, .*--hw height:width"):
        entry.size(96, SQUARE)


def test_sizes_are_brought_to_the_grid_and_told(read):
    file = read("a --hw 1024:1024\nb --hw 1080:1920\nc --hw 7:49")
    sizes = [(entry.height, entry.width) for entry in file.entries]
    assert sizes == [(1024, 1024), (1088, 1920), (32, 64)]
    assert [str(note) for note in file.notes] == [
        "line 2: the height of 1080 becomes 1088, the nearest multiple of 32",
        "line 3: the height of 7 becomes 32, the nearest multiple of 32",
        "line 3: the width of 49 becomes 64, the nearest multiple of 32",
    ]


@pytest.mark.parametrize(
    "line, message",
    [
        ("a cat --ar 3", "'--ar 3' is not understood"),
        ("a cat --ar 1.5:1", "'--ar 1.5:1' is not understood"),
        ("a cat --hw", "'--hw' is not understood"),
        ("a cat --ar 1:2 on a mat", "nothing after it"),
        ("a cat --ar 0:1", "a side of 0"),
        ("a cat --hw 64:0", "a side of 0"),
        ("a cat --hw 64:99999", "more than 16384 px"),
        ("--ar 1:2", "the prompt is empty"),
        (b"caf\xe9", "byte 0xe9 is no text in UTF-8"),
    ],
)
def test_one_bad_line_costs_no_other(read, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    file = read(b"first\n\n" + line + b"\nlast --ar 1:1\n")
    assert prompts_of(file) == ["first", "last"]
    (fault,) = file.faults
    assert fault.where == "line 3" and message in fault.text


def test_json_by_name_as_the_official_samples_have_it(read):
    content = {
        "0001": {"prompt": "a cat --ar 2:1", "category": "animals"},
        "猫/2": "another",
        "..": {"prompt": "third"},
    }
    file = read(content, ".json")
    assert [(entry.name, entry.prompt) for entry in file.entries] == [
        ("0001", "a cat"),
        ("猫_2", "another"),
        ("third", "third"),
    ]
    assert file.entries[0].aspect_ratio == (2, 1)
    assert file.entries[1].where == "entry '猫/2'"


def test_json_list_with_settings_of_its_own(read):
    settings = {"prompt": " b ", "negative_prompt": "", "seed": 0, "width": 64, "height": 96, "name": "mine"}
    file = read(["a", settings, {"prompt": "c", "seed": None}], ".json")
    assert [astuple(entry) for entry in file.entries] == [
        astuple(PromptEntry("a", "a", "entry 1")),
        ("mine", "b", "entry 2", "", 0, 96, 64, None),
        astuple(PromptEntry("c", "c", "entry 3")),
    ]


@pytest.mark.parametrize(
    "entry, message",
    [
        (3, 'an object with "prompt"'),
        ({"text": "a cat"}, 'an object with "prompt"'),
        ({"prompt": None}, 'an object with "prompt"'),
        ({"prompt": ["a"]}, '"prompt" is ["a"]: expected text'),
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a", "negative_prompt": 1}, '"negative_prompt" is 1: expected text'),
        ({"prompt": "a", "seed": "7"}, '"seed" is "7": expected a whole number from 0'),
        ({"prompt": "a", "seed": True}, '"seed" is true'),
        ({"prompt": "a", "seed": -1}, '"seed" is -1'),
        ({"prompt": "a", "width": 64.5}, '"width" is 64.5'),
        ({"prompt": "a", "height": 0}, '"height" is 0'),
        ({"prompt": "a --hw 64:64", "width": 64}, "the size stands there twice"),
    ],
)
def test_one_bad_entry_costs_no_other(read, entry, message):
    for content in (["first", entry, "last"], {"x": "first", "y": entry, "z": "last"}):
        file = read(content, ".json")
        assert prompts_of(file) == ["first", "last"]
        (fault,) = file.faults
        assert fault.where == ("entry 2" if isinstance(content, list) else "entry 'y'")
        assert message in fault.text


def test_a_name_that_stands_twice_is_told(read):
    file = read('{"a": "one", "b": "two", "a": "three"}', ".json")
    assert prompts_of(file) == ["three", "two"]
    assert [str(fault) for fault in file.faults] == [
        "entry 'a': the key stands there twice, and only the last one counts"
    ]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"\n \r\n", "it holds no prompt"),
        ("a.txt", "a cat".encode("utf-16"), "is text in UTF-16: save it as UTF-8"),
        ("a.csv", b"a cat", "is no prompt file: expected .txt with a prompt a line, or .json"),
        ("a.json", b"[]", "it holds no prompt"),
        ("a.json", b'"a cat"', "expected a list of prompts"),
        ("a.json", b'["a",\n "b"', "line 2, column 5 is no JSON"),
        ("a.json", b'["\xff"]', "can't decode byte 0xff"),
    ],
)
def test_a_file_that_is_none_says_so(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(str(path))) as error:
        read_prompts(path)
    assert message in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no prompt file"):
        read_prompts(tmp_path / "no.txt")


@pytest.mark.parametrize(
    "text, name",
    [
        ("a cat", "a_cat"),
        ('../up\\and: "away"?', "up_and_away"),
        ("红色 🐼", "红色_🐼"),
        (".hidden.", "hidden"),
        ("50% off", "50_off"),
        ("CON", "_CON"),
        ("nul.png", "_nul.png"),
        ("concert", "concert"),
        ("e\u0301", "\u00e9"),
        ("...", ""),
    ],
)
def test_names_that_every_system_takes(text, name):
    assert safe_name(text) == name


def test_names_are_short():
    assert safe_name("a" * 300) == "a" * 100
    assert len(safe_name("🐼" * 300).encode()) == 200


def test_no_two_names_are_alike(read):
    file = read("a cat\nA Cat --ar 1:2\na cat_2\na cat\n")
    assert [entry.name for entry in file.entries] == ["a_cat", "A_Cat_2", "a_cat_2_2", "a_cat_3"]


def test_the_shipped_prompts_are_those_that_the_note_shows():
    path = WORKFLOWS / "inputs" / "sana_prompts.txt"
    file = read_prompts(path)
    assert len(file.entries) == 3 and file.faults == file.notes == ()
    note = (WORKFLOWS / "notes" / "sana_prompts_from_file.md").read_text(encoding="utf-8")
    assert f"```\n{path.read_text(encoding='utf-8')}```" in note
