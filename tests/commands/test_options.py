"""What every command's help and every mistyped command look like."""

import pytest

from sana_core.__main__ import COMMANDS, main


@pytest.mark.parametrize("command", COMMANDS)
def test_help_names_no_empty_default(command, capsys):
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not any(f"(default: {nothing})" in text for nothing in ("", "None", "[]", "True", "False"))
    if command == "generate":
        assert "switches guidance off (default: 4.5)" in text


@pytest.mark.parametrize(
    "command, message, program",
    [
        (["generate", "--prompt", "a cat", "--stepz", "2"], "unrecognized arguments: --stepz 2", "sana_core"),
        (["generate", "--prompt", "a cat", "--steps", "two"], "invalid int value: 'two'", "sana_core generate"),
        (["paint"], "invalid choice: 'paint'", "sana_core"),
        ([], "the following arguments are required", "sana_core"),
    ],
)
def test_a_mistyped_command_is_one_line(command, message, program, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(command)
    error = capsys.readouterr().err
    assert exit_.value.code == 2 and error.startswith("error: ") and message in error
    assert error.count("\n") == 1 and error.endswith(f". See python -m {program} --help\n")
