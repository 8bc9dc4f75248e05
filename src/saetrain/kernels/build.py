"""Building the C++ kernels at first use, with the machine's own compiler, into a cache."""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("native.cpp")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC", "-std=c++17")


def build() -> Path:
    """Compile native.cpp unless a library of the same source, flags, compiler and processor is cached."""
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("c++")
    if compiler is None:
        raise OSError("no C++ compiler (g++, or the one that CXX names) was found")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    target = subprocess.run(
        [compiler, "-march=native", "-Q", "--help=target"], capture_output=True, text=True, check=False
    ).stdout
    key = hashlib.sha256("\0".join([SOURCE.read_text(), *FLAGS, version, target, torch.__version__]).encode())
    folder = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "saetrain" / "kernels"
    library = folder / f"native-{platform.machine()}-{key.hexdigest()[:16]}.so"
    if library.exists():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        unit, shared = Path(work, "native.o"), Path(work, "native.so")
        _run([compiler, *FLAGS, "-c", str(SOURCE), "-o", str(unit)])
        _run([compiler, "-shared", str(unit), "-o", str(shared), *_openmp()])
        os.replace(shared, library)
    return library


def _openmp() -> list[str]:
    """torch's own OpenMP library: a second one would bring a second set of threads."""
    folder = Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    return [f"-L{folder}", f"-l:{found[0].name}"] if found else ["-lgomp"]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"{' '.join(command[:1])} failed: {done.stderr.strip().splitlines()[:1]}")
