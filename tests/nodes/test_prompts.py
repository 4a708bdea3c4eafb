"""The node gives one entry of each list for each prompt, and reads nothing outside of the input folder."""

import json

import pytest

LINES = "a red cat\n\nbad --ar 3\n红色背景左边的熊猫 🐼 --ar 9:16\nlast --hw 40:96\n"


@pytest.fixture
def node(part):
    return part("nodes.prompts").SanaPromptsFromFile


@pytest.fixture
def folder(node, tmp_path, monkeypatch):
    """An input folder of its own, with a secret beside it."""
    import folder_paths

    monkeypatch.setattr(folder_paths, "input_directory", str(tmp_path / "input"))
    (tmp_path / "input").mkdir()
    (tmp_path / "secret.txt").write_text("not to be read")
    return tmp_path / "input"


@pytest.fixture
def run(node, folder):
    """Runs the node on a file of this content."""

    def run(content, **inputs):
        name = "prompts.txt" if isinstance(content, str) else "prompts.json"
        text = content if isinstance(content, str) else json.dumps(content)
        (folder / name).write_text(text, encoding="utf-8")
        return node.execute(name, **{"base_size": "1024"} | inputs)

    return run


def options_of(node):
    return node.define_schema().inputs[0].options


def test_every_output_is_a_list(node):
    assert all(output.is_output_list for output in node.define_schema().outputs)


def test_an_entry_for_each_prompt(run):
    """The official size nearest to 9:16 is 768 high and 1344 wide, half of that for a model of 512 px."""
    prompts, negatives, widths, heights, seeds, names = run(LINES, negative_prompt="blurry", seed=5).result
    assert prompts == ["a red cat", "红色背景左边的熊猫 🐼", "last"]
    assert negatives == ["blurry"] * 3 and seeds == [5] * 3
    assert list(zip(widths, heights, strict=True)) == [(1024, 1024), (1344, 768), (96, 32)]
    assert names == ["a_red_cat", "红色背景左边的熊猫_🐼", "last"]
    assert run(LINES, base_size="512").result[2:4] == ([512, 672, 96], [512, 384, 32])


def test_settings_of_an_entry_go_before_the_inputs(run):
    content = {"x": {"prompt": "a", "seed": 0, "negative_prompt": "", "width": 64}, "y": "b"}
    assert run(content, negative_prompt="blurry", seed=5).result == (
        ["a", "b"],
        ["", "blurry"],
        [64, 1024],
        [1024, 1024],
        [0, 5],
        ["x", "y"],
    )


@pytest.mark.parametrize("start, count, expected", [(1, 0, "abcd"), (2, 0, "bcd"), (2, 2, "bc"), (4, 9, "d")])
def test_a_part_of_the_file(run, start, count, expected):
    assert run("a\nb\nc\nd", start=start, count=count).result[0] == list(expected)


def test_a_start_beyond_the_end(run):
    with pytest.raises(ValueError, match="start is 5, but prompts.txt has 4 prompts"):
        run("a\nb\nc\nd", start=5)


def test_bad_lines_are_shown_and_logged(run, caplog):
    shown = run(LINES).ui.as_dict()["text"][0].splitlines()
    assert shown[0] == "3 of 3 prompts"
    assert shown[1].startswith("prompts.txt, line 3: '--ar 3' is not understood")
    assert shown[2:] == ["prompts.txt, line 5: the height of 40 becomes 32, the nearest multiple of 32"]
    assert caplog.messages == shown[1:]


def test_a_file_without_a_good_line_is_an_error(run):
    with pytest.raises(ValueError, match="(?s)No prompt of the file can be drawn.*line 1: .*line 2: "):
        run("a --ar 3\nb --hw 1\n")
    with pytest.raises(ValueError, match="it holds no prompt"):
        run("\n")


def test_the_choice_is_the_prompt_files_of_the_input_folder(node, folder):
    for name in ("b.txt", "a.JSON", "picture.png", "sub"):
        (folder / name).mkdir() if name == "sub" else (folder / name).write_text("a")
    assert options_of(node) == ["a.JSON", "b.txt"]
    folder.rename(folder.with_name("gone"))
    assert options_of(node) == []


@pytest.mark.parametrize(
    "name, message",
    [
        ("../secret.txt", "'../secret.txt' is no .txt or .json file in ComfyUI's input folder"),
        ("link.txt", "'link.txt' is no .txt or .json file"),
        ("picture.png", "'picture.png' is no .txt or .json file"),
        ("gone.txt", "'gone.txt' is not in ComfyUI's input folder: put it there"),
        ("", "No prompt file is chosen"),
        (None, "No prompt file is chosen"),
    ],
)
def test_other_files_are_refused(node, folder, name, message):
    (folder / "link.txt").symlink_to(folder.parent / "secret.txt")
    (folder / "picture.png").write_text("a")
    assert message in node.validate_inputs(name)
    with pytest.raises(ValueError):
        node.execute(name, base_size="1024")


def test_an_absolute_path_is_refused(node, folder):
    assert "is no .txt" in node.validate_inputs(str(folder.parent / "secret.txt"))


def test_an_edited_file_runs_again(node, folder):
    path = folder / "a.txt"
    path.write_text("a cat")
    assert node.validate_inputs("a.txt") is True
    before = node.fingerprint_inputs(file="a.txt", base_size="1024")
    path.write_text("a cat")
    assert node.fingerprint_inputs(file="a.txt", base_size="1024") == before
    path.write_text("a bat")
    assert node.fingerprint_inputs(file="a.txt", base_size="1024") != before
