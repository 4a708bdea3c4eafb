"""The fused kernels on the CPU, in Triton's interpreter.

It has to be chosen before triton is imported, which other tests of this process may have done: so a process of its
own runs the files beside this one.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent


def test_fused_kernels_in_the_interpreter():
    pytest.importorskip("triton")
    files = sorted(str(path) for path in HERE.glob("test_fused_*.py"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= 30, done.stdout[-2000:]
