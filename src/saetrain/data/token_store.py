"""Tokens on disk: folders that ``saetrain tokenize`` writes, and raw files of token ids in the format of nanoGPT.

A token folder contains the tokenized rows as Arrow files, which are memory-mapped, and METADATA_FILE, which describes
the text and the tokenizer. The folder is written under a temporary name and then renamed, so an incomplete folder is
never mistaken for a complete one.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.atomic_io import fsync_dir, fsync_files, write_json
from saetrain.data.sources import TextSource, explain_load_error
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import ROW_TOKENS, Framing, hash_json, ids_dtype, tokenizer_identity
from saetrain.errors import SaetrainError

METADATA_FILE = "saetrain_tokens.json"
FORMAT_VERSION = 1


def is_token_folder(name: str) -> bool:
    """Return whether ``name`` is a complete folder of ``saetrain tokenize``."""
    return Path(name, METADATA_FILE).is_file()


def stored_ctx_len(names: tuple[str, ...]) -> int | None:
    """Return the context length of the first token folder among ``names``, or None if there is none."""
    return next((int(_read_metadata(Path(name))["ctx_len"]) for name in names if is_token_folder(name)), None)


def check_output_folder(out: Path) -> None:
    """Raise SaetrainError if ``out`` is a file or a folder that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SaetrainError(f"OUT {out}: already exists and is not empty; use another folder, or delete this one")


def save_tokens(out: Path, splits: dict[str, Any], metadata: dict[str, Any], tokenizer: Any, framing: Framing) -> None:
    """Write tokenized rows to the folder ``out``.

    ``splits`` {split: rows}: `train`, and `held_out` if the data set has a held-out split. Raises SaetrainError when
    they can't be written; ``out`` then contains no token folder.
    """
    check_output_folder(out)
    temporary = out.with_name(f".{out.name}.writing")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, rows in splits.items():
            rows.save_to_disk(str(temporary / name))
        fsync_files(temporary)
        write_json(
            temporary / METADATA_FILE, {"format": FORMAT_VERSION, **_tokenizer_metadata(tokenizer, framing), **metadata}
        )
        os.replace(temporary, out)
        fsync_dir(out.parent)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise SaetrainError(f"OUT {out}: can't be written: {error}") from error


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
        raise SaetrainError(
            f"token folder {folder}: its {METADATA_FILE} is broken; write the folder again with saetrain tokenize"
        ) from error
    if found != FORMAT_VERSION:
        raise SaetrainError(
            f"token folder {folder}: it has format {found}, and this version reads format {FORMAT_VERSION}; write it "
            "again with saetrain tokenize"
        )
    return dict(metadata)


def open_tokens(folder: Path, tokenizer: Any, framing: Framing) -> tuple[dict[str, Any], dict[str, Any]]:
    """Open a token folder; return ({split: memory-mapped rows}, content of METADATA_FILE).

    Raises SaetrainError when the folder is broken, or was made with another tokenizer or framing.
    """
    import datasets

    metadata, wanted = _read_metadata(folder), _tokenizer_metadata(tokenizer, framing)
    kinds = {True: "a causal model", False: "an encoder"}
    problem = None
    if metadata["causal"] != framing.causal:
        problem = f"was made for {kinds[metadata['causal']]}, but the model is {kinds[framing.causal]}"
    elif metadata["tokenizer"] != wanted["tokenizer"] or (metadata["bos"], metadata["eos"]) != (
        framing.bos,
        framing.eos,
    ):
        problem = f"was made with another tokenizer (the one of {metadata['model']})"
    elif not framing.causal and metadata["ctx_len"] != framing.ctx_len:
        problem = f"was made for --ctx_len {metadata['ctx_len']}, but this command uses --ctx_len {framing.ctx_len}"
    if problem:
        raise SaetrainError(f"token folder {folder}: {problem}; write a matching folder with saetrain tokenize")
    try:
        return {name: datasets.load_from_disk(str(folder / name)) for name in metadata["splits"]}, metadata
    except Exception as error:  # the readers raise many unrelated types for broken files
        raise SaetrainError(explain_load_error(str(folder), error)) from error


def open_raw_ids(path: Path, tokenizer: Any, streaming: bool) -> TextSource:
    """Open a raw file of little-endian token ids, with an EOS after each document.

    Ids have two bytes if the vocabulary fits into them, else four. Raises SaetrainError when the size of the file is
    not a multiple of the id's size, or when two-byte ids are expected and the file seems to contain four-byte ids.
    """
    import datasets
    from datasets import Features, List, Value

    dtype = ids_dtype(tokenizer)
    size, id_bytes = path.stat().st_size, np.dtype(dtype).itemsize
    if size == 0 or size % id_bytes:
        raise SaetrainError(
            f"data set {path}: its size, {size} bytes, is not a positive multiple of {id_bytes}; with a vocabulary of "
            f"{len(tokenizer)} the file must contain {dtype} ids"
        )
    head = np.fromfile(path, dtype="<u2", count=4096)
    if dtype == "uint16" and len(head) >= 16 and not head[1::2].any():
        raise SaetrainError(
            f"data set {path}: every second 2-byte id is 0, so the file seems to contain 4-byte ids; with a "
            f"vocabulary of {len(tokenizer)} ids are read as 2 bytes: write them as {dtype}"
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
