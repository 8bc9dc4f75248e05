"""Tokens on disk: folders that ``saetrain tokenize`` writes, and raw files of token ids in the format of nanoGPT.

A token folder contains the tokenized rows as Arrow files, which are memory-mapped, METADATA_FILE, which describes the
text and the tokenizer, and a manifest with the hash of each file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.atomic_io import write_json
from saetrain.data.sources import TextSource, explain_load_error
from saetrain.data.text_column import TextColumn
from saetrain.data.tokenize import ROW_TOKENS, CtxLen, Framing, hash_json, ids_dtype, tokenizer_identity
from saetrain.errors import SaetrainError
from saetrain.manifest import find_damage, replace_folder
from saetrain.small_files import read_json
from saetrain.typed_values import require_type
from saetrain.untrusted import show_value

METADATA_FILE = "saetrain_tokens.json"
FORMAT_VERSION = 2
SPLITS = ("train", "held_out")
REMEDY = "write the folder again with saetrain tokenize"


@dataclass(frozen=True, kw_only=True)
class TokenMetadata:
    """What METADATA_FILE records: the model, the text, and the tokenizer and framing of the ids."""

    model: str
    dataset: str
    split: str
    dataset_config: str | None
    text_columns: list[str]
    distinct: bool
    """Whether rows that repeat a text count once."""
    held_out_split: str | None
    format: int = FORMAT_VERSION
    tokenizer: str = ""
    causal: bool = False
    ctx_len: int = 0
    bos: int | None = None
    eos: int | None = None

    def with_framing(self, tokenizer: Any, framing: Framing) -> TokenMetadata:
        """Return the metadata of rows with this tokenizer and framing."""
        return dataclasses.replace(
            self,
            tokenizer=hash_json(tokenizer_identity(tokenizer)),
            causal=framing.causal,
            ctx_len=framing.ctx_len,
            bos=framing.bos,
            eos=framing.eos,
        )


def is_token_folder(name: str) -> bool:
    """Return whether ``name`` is a complete folder of ``saetrain tokenize``."""
    return Path(name, METADATA_FILE).is_file()


def stored_ctx_len(names: tuple[str, ...]) -> int | None:
    """Return the context length of the first token folder among ``names``, or None if there is none."""
    return next((_read_metadata(Path(name)).ctx_len for name in names if is_token_folder(name)), None)


def check_output_folder(out: Path) -> None:
    """Raise SaetrainError if ``out`` is a file or a folder that is not empty."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise SaetrainError(f"OUT {out}: already exists and is not empty; use another folder, or delete this one")


def save_tokens(out: Path, splits: dict[str, Any], metadata: TokenMetadata) -> None:
    """Write tokenized rows to the folder ``out``.

    ``splits`` {name in SPLITS: rows}; `held_out` if the data set has a held-out split. Raises SaetrainError when
    they can't be written; ``out`` then contains no token folder.
    """
    check_output_folder(out)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with replace_folder(out) as temporary:
            for name, rows in splits.items():
                rows.save_to_disk(str(temporary / name))
            write_json(temporary / METADATA_FILE, dataclasses.asdict(metadata))
    except OSError as error:
        raise SaetrainError(f"OUT {out}: can't be written: {error}") from error


def _read_metadata(folder: Path) -> TokenMetadata:
    path, label = folder / METADATA_FILE, f"token folder {folder}: its {METADATA_FILE} is broken"
    try:
        found = read_json(path, dict[str, Any], label).get("format")
        metadata = read_json(path, TokenMetadata, label) if found == FORMAT_VERSION else None
    except SaetrainError as error:
        raise SaetrainError(f"{error}; {REMEDY}") from error
    if metadata is None:
        raise SaetrainError(
            f"token folder {folder}: it has format {show_value(found)}, and this version reads format "
            f"{FORMAT_VERSION}; {REMEDY}"
        )
    require_type(metadata.ctx_len, CtxLen, f"token folder {folder}: ctx_len")
    return metadata


def open_tokens(folder: Path, tokenizer: Any, framing: Framing) -> tuple[dict[str, Any], TokenMetadata]:
    """Open a token folder; return ({split: memory-mapped rows}, its metadata).

    Raises SaetrainError when the folder is damaged, or was made with another tokenizer or framing.
    """
    import datasets

    metadata = _read_metadata(folder)
    wanted = metadata.with_framing(tokenizer, framing)
    kinds = {True: "a causal model", False: "an encoder"}
    problem = None
    if metadata.causal != framing.causal:
        problem = f"was made for {kinds[metadata.causal]}, but the model is {kinds[framing.causal]}"
    elif (metadata.tokenizer, metadata.bos, metadata.eos) != (wanted.tokenizer, wanted.bos, wanted.eos):
        problem = f"was made with another tokenizer (the one of {metadata.model})"
    elif not framing.causal and metadata.ctx_len != framing.ctx_len:
        problem = f"was made for --ctx_len {metadata.ctx_len}, but this command uses --ctx_len {framing.ctx_len}"
    if problem:
        raise SaetrainError(f"token folder {folder}: {problem}; write a matching folder with saetrain tokenize")
    damage = find_damage(folder)
    if damage:
        raise SaetrainError(f"token folder {folder}: is damaged ({damage}); {REMEDY}")
    try:
        return {
            name: datasets.load_from_disk(str(folder / name)) for name in SPLITS if (folder / name).is_dir()
        }, metadata
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


def _iterate_documents(path: str, dtype: str, eos: int | None, changed: object) -> Iterator[dict[str, list[int]]]:
    ids = np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r")
    start = 0
    for chunk in range(0, len(ids), 1 << 24):
        ends = np.flatnonzero(ids[chunk : chunk + (1 << 24)] == eos) + 1 if eos is not None else np.zeros(0, int)
        for end in ends + chunk:
            yield {"input_ids": ids[start:end].tolist()}
            start = int(end)
    for first in range(start, len(ids), ROW_TOKENS):
        yield {"input_ids": ids[first : first + ROW_TOKENS].tolist()}
