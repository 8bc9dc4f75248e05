"""Compile the C++ kernels at first use with the machine's compiler, and cache the library."""

from __future__ import annotations

import atexit
import hashlib
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import partial
from pathlib import Path

import torch

from saetrain.atomic_io import hash_file
from saetrain.distributed import env
from saetrain.manifest import ensure_cached, find_damage
from saetrain.untrusted import escape_text

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILER_FLAGS = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-fPIC", "-std=c++17")


def build_library(rebuild: bool = False) -> Path:
    """Return the path of the compiled ``kernels.cpp``; compile it unless the cache contains an intact library.

    The cache key consists of source, flags, compiler, processor and the version of torch. ``rebuild`` ignores the
    cached library, for example because it could not be loaded. Raises OSError if the library can't be built.
    """
    compiler = _find_compiler()
    key_parts = [SOURCE.read_text(), *COMPILER_FLAGS, _describe_processor(), torch.__version__, *_openmp_flags()]
    folder, name = _open_cache_folder(), f"native-{platform.machine()}-{_hash_parts(key_parts)}"
    if compiler is None:
        # A library that was built while a compiler was installed can still be used.
        built = sorted(folder.glob(f"{name}-*"), key=lambda path: path.stat().st_mtime)
        usable = [path for path in built if not (rebuild or _find_problem(path))]
        if not usable:
            raise OSError(
                "no C++ compiler was found: install g++, c++ or clang++, or name a compiler in the variable CXX"
            )
        return _library_in(usable[-1])
    entry = folder / f"{name}-{_hash_parts([_get_compiler_version(compiler)])}"
    find_problem = _report_unusable if rebuild else _find_problem
    ensure_cached(entry, partial(_compile_into, compiler), _log_on_host, is_private=True, find_problem=find_problem)
    return _library_in(entry)


def _compile_into(compiler: list[str], folder: Path) -> None:
    _log_on_host(f"building the C++ kernels (only once); they are cached in {folder.parent}")
    with tempfile.TemporaryDirectory(dir=folder) as work:
        object_file, shared_object = Path(work, "native.o"), Path(work, "native.so")
        _run_command([*compiler, *COMPILER_FLAGS, "-c", str(SOURCE), "-o", str(object_file)])
        _run_command([*compiler, "-shared", str(object_file), "-o", str(shared_object), *_openmp_flags()])
        # The dynamic linker does not load another library from the path of one that it has loaded.
        os.replace(shared_object, folder / f"native-{hash_file(shared_object)[:16]}.so")


def _library_in(entry: Path) -> Path:
    return next(entry.glob("*.so"))


def _find_problem(entry: Path) -> str | None:
    """Return why the library in a cache entry must not be loaded, or None."""
    problem = find_untrusted(entry, entry.rglob("*")) or find_damage(entry)
    return problem or (None if any(entry.glob("*.so")) else "it contains no library")


def _report_unusable(entry: Path) -> str:
    return "its library could not be loaded"


def find_untrusted(folder: Path, files: Iterable[Path] = ()) -> str | None:
    """Return which of ``files``, ``folder`` and its parents another user than root could replace, or None.

    A parent that others may write to is trusted if it is sticky, as /tmp is, because they can't replace entries of the
    user in it.
    """
    for place in (*files, folder, *folder.parents):
        status = place.lstat()
        if status.st_uid not in (0, os.geteuid()):
            return f"{place} belongs to user {status.st_uid}"
        is_sticky = place in folder.parents and status.st_mode & stat.S_ISVTX
        if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH) and not is_sticky and not place.is_symlink():
            return f"others may write to {place} (mode {stat.S_IMODE(status.st_mode):o}; chmod go-w removes that right)"
    return None


def _log_on_host(text: str) -> None:
    if env.local_rank() == 0:
        print(escape_text(text), file=sys.stderr)


def _hash_parts(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _find_compiler() -> list[str] | None:
    """Return the compiler's command, or None if there is no compiler."""
    try:
        named = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise OSError(f"the variable CXX is no command: {error}") from error
    found = next((path for name in ("g++", "c++", "clang++") if (path := shutil.which(name))), None)
    return named or ([found] if found else None)


def _get_compiler_version(compiler: list[str]) -> str:
    try:
        return subprocess.run([*compiler, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        origin = " (named by CXX)" if os.environ.get("CXX") else ""
        raise OSError(f"the compiler {shlex.join(compiler)}{origin} can't be run") from error


def _open_cache_folder() -> Path:
    """Return the user's cache folder, or a temporary folder of this process if others could replace its files.

    The temporary folder is also used if the cache is not writable. Raises OSError if others could replace that, too.
    """
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        folder = (home / "saetrain" / "kernels").resolve()
        for missing in [path for path in (*reversed(folder.parents), folder) if not path.exists()]:
            missing.mkdir(0o700)
        problem = find_untrusted(folder)
        if problem is None:
            with tempfile.TemporaryFile(dir=folder):
                return folder
        _log_on_host(f"the cache of C++ kernels is not used, because {problem}")
    except (OSError, RuntimeError):  # a read-only cache, or a user without a home folder
        pass
    folder = Path(tempfile.mkdtemp(prefix="saetrain-kernels-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    problem = find_untrusted(folder)
    if problem:
        raise OSError(f"{problem}; name another folder in the variable TMPDIR")
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
