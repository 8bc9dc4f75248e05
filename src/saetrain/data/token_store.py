"""Tokens on disk: the folders that ``saetrain tokenize`` writes, and raw files of ids as nanoGPT-like tools write them.

A folder holds the tokenized rows as Arrow files that are memory-mapped, and FILE, which says what they were made of
and for. It is written beside its place and renamed, so that one cut short is never taken for whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.atomic_io import fsync_dir, write_json
from saetrain.data.sources import TextSource, explain_load_error
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import ROW_TOKENS, Framing, hash_json, ids_dtype, tokenizer_identity
from saetrain.errors import SaetrainError

METADATA_FILE = "saetrain_tokens.json"
FORMAT_VERSION = 1


def is_token_folder(name: str) -> bool:
    """Whether ``name`` is a folder that ``saetrain tokenize`` finished."""
    return Path(name, METADATA_FILE).is_file()


def stored_ctx_len(names: tuple[str, ...]) -> int | None:
    """The context length that the first token folder among ``names`` was made for."""
    return next((int(_read_metadata(Path(name))["ctx_len"]) for name in names if is_token_folder(name)), None)


def check_output_folder(out: Path) -> None:
    """SaetrainError unless a token folder may be written to ``out``."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SaetrainError(f"OUT {out}: exists already and is not empty; name another folder, or remove it by hand")


def save_tokens(out: Path, splits: dict[str, Any], metadata: dict[str, Any], tokenizer: Any, framing: Framing) -> None:
    """Write tokenized rows ({`train`, and `held_out` where it is set apart: rows}) to ``out``.

    SaetrainError when they can't be written; nothing is then at ``out``.
    """
    check_output_folder(out)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, rows in splits.items():
            rows.save_to_disk(str(temporary / name))
        _fsync_folder(temporary)
        write_json(
            temporary / METADATA_FILE, {"format": FORMAT_VERSION, **_tokenizer_metadata(tokenizer, framing), **metadata}
        )
        os.replace(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaetrainError(f"OUT {out}: can't be written: {error}") from error


def _fsync_folder(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb+") as handle:
                os.fsync(handle.fileno())


def _tokenizer_metadata(tokenizer: Any, framing: Framing) -> dict[str, Any]:
    return {
        "tokenizer": hash_json(tokenizer_identity(tokenizer)),
        "causal": framing.causal,
        "ctx_len": framing.ctx_len,
        "bos": framing.bos,
        "eos": framing.eos,
    }


def _read_metadata(folder: Path) -> dict[str, Any]:
    try:
        metadata = json.loads((folder / METADATA_FILE).read_text())
        found = metadata["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SaetrainError(f"token folder {folder}: its {METADATA_FILE} is broken; write the folder anew") from error
    if found != FORMAT_VERSION:
        raise SaetrainError(
            f"token folder {folder}: of format {found}, this version reads {FORMAT_VERSION}; write it anew"
        )
    return dict(metadata)


def open_tokens(folder: Path, tokenizer: Any, framing: Framing) -> tuple[dict[str, Any], dict[str, Any]]:
    """({split: memory-mapped rows}, what FILE says); SaetrainError when they were made for something else."""
    import datasets

    metadata, wanted = _read_metadata(folder), _tokenizer_metadata(tokenizer, framing)
    kinds = {True: "a causal model", False: "an encoder"}
    problem = None
    if metadata["causal"] != framing.causal:
        problem = f"was made for {kinds[metadata['causal']]}, and the model is {kinds[framing.causal]}"
    elif metadata["tokenizer"] != wanted["tokenizer"] or (metadata["bos"], metadata["eos"]) != (
        framing.bos,
        framing.eos,
    ):
        problem = f"was made with another tokenizer (that of {metadata['model']})"
    elif not framing.causal and metadata["ctx_len"] != framing.ctx_len:
        problem = f"was made for --ctx_len {metadata['ctx_len']}, and {framing.ctx_len} is asked for"
    if problem:
        raise SaetrainError(f"token folder {folder}: {problem}; write one by saetrain tokenize")
    try:
        return {name: datasets.load_from_disk(str(folder / name)) for name in metadata["splits"]}, metadata
    except Exception as error:  # a broken file raises whatever its reader does
        raise SaetrainError(explain_load_error(str(folder), error)) from error


def open_raw_ids(path: Path, tokenizer: Any, streaming: bool) -> TextSource:
    """A raw file of little-endian ids, of two bytes where the vocabulary fits, with an EOS behind each document."""
    import datasets
    from datasets import Features, List, Value

    dtype = ids_dtype(tokenizer)
    size = path.stat().st_size
    if size == 0 or size % np.dtype(dtype).itemsize:
        raise SaetrainError(
            f"data set {path}: {size} bytes are no file of {dtype} ids, which the vocabulary of {len(tokenizer)} needs"
        )
    head = np.fromfile(path, dtype="<u2", count=4096)
    if dtype == "uint16" and len(head) >= 16 and not head[1::2].any():
        raise SaetrainError(
            f"data set {path}: every second id of two bytes is 0, so it seems to hold ids of four; with a "
            f"vocabulary of {len(tokenizer)} they are read as two: write them as {dtype}"
        )
    generator_kwargs = {
        "path": str(path),
        "dtype": dtype,
        "eos": tokenizer.eos_token_id,
        "changed": (size, os.stat(path).st_mtime_ns),
    }
    features = Features({"input_ids": List(Value(dtype))})
    kind = datasets.IterableDataset if streaming else datasets.Dataset
    rows = kind.from_generator(_iterate_documents, features=features, gen_kwargs=generator_kwargs)
    column = TextColumn("ids", ("input_ids",), f"raw {dtype} ids")
    return TextSource(
        train=rows,
        held_out=None,
        held_out_split=None,
        description=f"local file {path}",
        text_column=None,
        deduplicate=False,
        column=column,
    )


def _iterate_documents(path: str, dtype: str, eos: int | None, changed: object) -> Iterator[dict[str, np.ndarray]]:
    ids = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    start = 0
    for chunk in range(0, len(ids), 1 << 24):
        ends = np.flatnonzero(ids[chunk : chunk + (1 << 24)] == eos) + 1 if eos is not None else np.zeros(0, int)
        for end in ends + chunk:
            yield {"input_ids": np.array(ids[start:end])}
            start = int(end)
    for first in range(start, len(ids), ROW_TOKENS):
        yield {"input_ids": np.array(ids[first : first + ROW_TOKENS])}
