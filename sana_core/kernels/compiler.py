"""The machine's C compiler."""

import ctypes
import logging
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

# OpenMP of GCC is what PyTorch's threads come from: with another, two sets of threads would wait for the same cores.
COMPILER = "gcc"
FLAGS = ("-O3", "-march=native", "-fopenmp", "-shared", "-fPIC")
SECONDS = 60


def compiled(source: Path) -> ctypes.CDLL | None:
    """The functions of a C file, for this very processor; None, and a line in the log, where they cannot be had.

    Compiling takes less than a second and leaves no file behind.
    """
    if sys.platform != "linux" or shutil.which(COMPILER) is None:
        log.info("%s is not compiled: this needs Linux and %s. PyTorch's functions do the work.", source.name, COMPILER)
        return None
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, source.stem + ".so")
        command = [COMPILER, *FLAGS, str(source), "-lm", "-o", str(library)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=SECONDS)
            return ctypes.CDLL(str(library))
        except (OSError, subprocess.SubprocessError) as error:
            reason = (getattr(error, "stderr", None) or str(error)).strip()
            log.info("%s is not compiled; PyTorch's functions do the work. %s", source.name, reason)
            return None
