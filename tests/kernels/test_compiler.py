"""Without a C compiler, or with one that fails, there is a line in the log and no library."""

import logging

import pytest

from sana_core.kernels import compiler
from sana_core.kernels.compiler import compiled

CODE = """
#include <omp.h>
int threads(int wanted) {
    int count = 0;
#pragma omp parallel num_threads(wanted)
    {
#pragma omp atomic
        count++;
    }
    return count;
}
"""


@pytest.fixture
def write(tmp_path, caplog):
    """Writes a C file; log lines of the compiler are caught."""
    caplog.set_level(logging.INFO, compiler.log.name)

    def write(code):
        path = tmp_path / "code.c"
        path.write_text(code)
        return path

    return write


def test_functions_run_in_threads(write):
    library = compiled(write(CODE))
    if library is None:
        pytest.skip("this machine has no C compiler")
    assert library.threads(2) == 2


@pytest.mark.parametrize("broken", ["no gcc", "an error in the code", "no time", "no library"])
def test_without_functions_the_log_says_why(write, broken, monkeypatch, caplog):
    path = write("int 3;" if broken == "an error in the code" else CODE)
    if broken == "no gcc":
        monkeypatch.setattr(compiler, "COMPILER", "gcc-that-is-not-there")
    elif compiler.shutil.which(compiler.COMPILER) is None:
        pytest.skip("this machine has no C compiler")
    if broken == "no time":
        monkeypatch.setattr(compiler, "SECONDS", 0)
    if broken == "no library":
        monkeypatch.setattr(compiler, "FLAGS", ("-c",))
    assert compiled(path) is None
    (line,) = caplog.messages
    assert line.startswith("code.c is not compiled")
    assert {"no gcc": "gcc-that-is-not-there", "an error in the code": "error:"}.get(broken, "") in line
