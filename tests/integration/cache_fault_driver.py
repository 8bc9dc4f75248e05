"""Run under the preloaded faults: for each system call of a write to a cache, fail or die there, and use the cache.

Arguments: the library of the faults, a folder to work in, the folder of a tokenizer, and n to take each n-th call.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import datasets
import torch

from saetrain.data.text_column import TextColumn
from saetrain.data.token_store import TokenMetadata, is_token_folder, open_tokens, save_tokens
from saetrain.data.tokenize import Framing, load_tokenizer, tokenize_rows
from saetrain.errors import SaetrainError
from saetrain.ops.native import compile

LIBRARY, WORK, MODEL, STRIDE = sys.argv[1:]
faults = ctypes.CDLL(LIBRARY)
faults.fault_seen.restype = ctypes.c_long
MODES = {"failed": 0, "killed": 1, "full disk": 2}
folder = Path(WORK, "cache")
datasets.disable_progress_bars()
datasets.config.HF_DATASETS_CACHE = str(folder)
os.environ["XDG_CACHE_HOME"] = str(folder)
tokenizer = load_tokenizer(MODEL, None, False)
framing = Framing.from_tokenizer(tokenizer, False, 32)
# Ids instead of text, because the threads of a tokenizer do not survive a fork.
rows = datasets.Dataset.from_dict({"input_ids": [[number, number + 1] for number in range(50)]})
COLUMN = TextColumn("ids", ("input_ids",), "")


def read_tokens() -> object:
    """Return the tokens, which are made and cached unless they are cached."""
    return tokenize_rows(rows, COLUMN, tokenizer, framing, 1, lambda line: None).to_dict()


whole_tokens = datasets.Dataset.from_dict(dict(tokenize_rows(rows, COLUMN, tokenizer, framing, 1).to_dict()))


def write_token_folder() -> object:
    """Write a token folder unless there is one, and return its rows."""
    about = TokenMetadata(
        model="m",
        dataset="d",
        split="train",
        dataset_config=None,
        text_columns=["text"],
        distinct=False,
        held_out_split=None,
    )
    if not is_token_folder(str(folder / "tokens")):
        save_tokens(folder / "tokens", {"train": whole_tokens}, about.with_framing(tokenizer, framing))
    return open_tokens(folder / "tokens", tokenizer, framing)[0]["train"].to_dict()


built = Path(WORK, "built.so")


def build_kernels() -> object:
    """Return the bytes of the C++ library; the compiler is replaced by a copy, because it takes about 20 s."""
    return compile.build_library().read_bytes()


def copy_built(command: list[str]) -> None:
    Path(command[command.index("-o") + 1]).write_bytes(built.read_bytes())


def attempt(write: Callable[[], object], call: int, mode: str) -> tuple[int, int]:
    """Write in a child with a fault at its ``call``-th system call: (exit code or -signal, calls seen)."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    read, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        faults.fault_arm(str(folder).encode(), ctypes.c_long(call), MODES[mode])
        status = 0
        try:
            write()
        except (SaetrainError, OSError):
            status = 2
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
            status = 1
        os.write(send, str(faults.fault_seen()).encode())
        os._exit(status)
    os.close(send)
    _, status = os.waitpid(pid, 0)
    seen = os.read(read, 20)
    os.close(read)
    return os.waitstatus_to_exitcode(status), int(seen or b"0")


def main() -> None:
    torch.set_num_threads(1)
    tempfile.tempdir = WORK
    subprocess.run(["cc", "-shared", "-x", "c", "/dev/null", "-o", str(built)], check=True)
    compile._run_command = copy_built
    for write in (read_tokens, write_token_folder, build_kernels):
        code, calls = attempt(write, 0, "failed")
        assert code == 0
        assert calls > 10, f"only {calls} calls of {write.__name__} were seen: the faults are not in the way"
        whole = write()
        for mode in MODES:
            wrong, n_ended = [], 0
            numbers = range(1, calls + 1, int(STRIDE))
            for call in numbers:
                code, _ = attempt(write, call, mode)
                n_ended += code != 0
                # The kernels are built in a temporary folder where the cache fails, and deletions may fail.
                if code not in ((-signal.SIGKILL,) if mode == "killed" else (0, 2)) or write() != whole:
                    wrong.append(call)
                left = [path for path in folder.rglob(".*") if path.name.startswith((".writing", ".tmp"))]
                assert not left, left
            assert not wrong, f"{write.__name__}, {mode} at calls {wrong} of {calls}"
            assert n_ended > len(numbers) / 3, (n_ended, len(numbers))
            print(f"{write.__name__}: {mode} at {len(numbers)} of {calls} calls")


main()
