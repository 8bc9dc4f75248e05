"""Compile the C++ kernels at first use with the machine's compiler, and cache the library."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILER_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC", "-std=c++17")


def build_library(rebuild: bool = False) -> Path:
    """Return the path of the compiled ``kernels.cpp``; compile it unless the cache contains a matching library.

    The cache key consists of source, flags, compiler, processor and the version of torch. ``rebuild`` ignores the
    cached library, for example because it could not be loaded. Raises OSError if the library can't be built.
    """
    compiler = _find_compiler()
    key_parts = [SOURCE.read_text(), *COMPILER_FLAGS, _describe_processor(), torch.__version__, *_openmp_flags()]
    folder, name = _open_cache_folder(), f"native-{platform.machine()}-{_hash_parts(key_parts)}"
    if compiler is None:
        # A library that was built while a compiler was installed can still be used.
        built = sorted(folder.glob(f"{name}-*.so"), key=lambda path: path.stat().st_mtime)
        if built and not rebuild:
            return built[-1]
        raise OSError("no C++ compiler was found: install g++, c++ or clang++, or name a compiler in the variable CXX")
    library = folder / f"{name}-{_hash_parts([_get_compiler_version(compiler)])}.so"
    if library.exists() and not rebuild:
        return library
    print(f"building the C++ kernels (only once); they are cached in {folder}", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        object_file, shared_object = Path(work, "native.o"), Path(work, "native.so")
        _run_command([*compiler, *COMPILER_FLAGS, "-c", str(SOURCE), "-o", str(object_file)])
        _run_command([*compiler, "-shared", str(object_file), "-o", str(shared_object), *_openmp_flags()])
        os.replace(shared_object, library)
    return library


def _hash_parts(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _find_compiler() -> list[str] | None:
    """Return the compiler's command, or None if there is no compiler."""
    named = shlex.split(os.environ.get("CXX", ""))
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    return named or ([found] if found else None)


def _get_compiler_version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        origin = " (named by CXX)" if os.environ.get("CXX") else ""
        raise OSError(f"the compiler {shlex.join(compiler)}{origin} can't be run") from error


def _open_cache_folder() -> Path:
    """Return the user's cache folder, or a temporary folder of this process if the cache is not writable."""
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = home / "saetrain" / "kernels"
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, RuntimeError):  # a read-only cache, or a user without a home folder
        folder = Path(tempfile.mkdtemp(prefix="saetrain-kernels-"))
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        return folder


def _describe_processor() -> str:
    """Return the processor's model and flags, which -march=native depends on; machines may share a home folder."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = ("model name", "flags", "Features", "CPU part")
    found = {line for line in lines if line.split(":")[0].strip() in names}
    return "\n".join(sorted(found)) or platform.processor()


def _openmp_flags() -> list[str]:
    """Return the flags that link torch's own OpenMP library; another one would start a second set of threads."""
    folder = Path(torch.__file__).parent / "lib"
    found = sorted(folder.glob("libgomp*.so*"))
    return [f"-L{folder}", f"-l:{found[0].name}"] if found else ["-fopenmp"]


def _run_command(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        first_line = (done.stderr.strip().splitlines() or ["the compiler printed no error"])[0]
        raise OSError(f"{command[0]} failed: {first_line}")
