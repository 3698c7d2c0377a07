"""This package's own C++ for the CPU: compiled at its first use, kept beside PyTorch's extensions, and done without.

The sources have a plain C interface, so that they build in a second and without PyTorch's headers.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import subprocess
import tempfile
from pathlib import Path

import torch

logger = logging.getLogger(__name__)

#: No contraction: it would round by where vector loops begin and end.
_FLAGS = [
    "-std=c++17",
    "-O3",
    "-shared",
    "-fPIC",
    "-fopenmp",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
]
#: Further flags by what PyTorch finds that the CPU can do.
_VECTORS = {
    "AVX512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
    "AVX2": ["-mavx2", "-mfma"],
}


@functools.cache
def library(source: Path, without: str) -> ctypes.CDLL | None:
    """The compiled functions of a C++ file.

    Args:
        source: the file.
        without: what to say of working without it, where it can't be built.

    Returns:
        None where there is no compiler; a warning says so, once.
    """
    try:
        return ctypes.CDLL(str(_built(source)))
    except (OSError, subprocess.CalledProcessError) as error:
        reason = error.stderr if isinstance(error, subprocess.CalledProcessError) else error
        logger.warning("%s can't be compiled, so %s: %s", source.name, without, reason)
        return None


def _built(source: Path) -> Path:
    """Where the compiled file lies.

    It appears there whole, by a rename: PyTorch's builder would leave a lock behind if a rank is killed meanwhile, and
    every later run would wait for it.
    """
    flags = [*_FLAGS, *_VECTORS.get(torch.backends.cpu.get_cpu_capability(), [])]
    key = hashlib.sha256("\n".join([*flags, source.read_text()]).encode()).hexdigest()[:16]
    path = _root() / f"{source.stem}-{key}.so"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as directory:
            made = Path(directory) / path.name
            compiler = os.environ.get("CXX", "c++")
            subprocess.run([compiler, *flags, str(source), "-o", str(made)], check=True, capture_output=True, text=True)
            made.replace(path)
    return path


def _root() -> Path:
    from torch.utils.cpp_extension import get_default_build_root  # it imports setuptools

    return Path(os.environ.get("TORCH_EXTENSIONS_DIR") or get_default_build_root()) / "ds_sparkling"
