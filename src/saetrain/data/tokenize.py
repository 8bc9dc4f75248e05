"""Documents -> token ids: every document is tokenized once, and the result is kept memory-mapped on disk."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np

from saetrain.data.text_column import Rows, TextColumn, build_renderer
from saetrain.errors import SaetrainError
from saetrain.hub import load_cached_or_fetch
from saetrain.types import shown_default

if TYPE_CHECKING:
    import datasets

CACHE_FORMAT_VERSION = 2
"""Part of the cache's fingerprint: raise it when what is stored changes."""
DEFAULT_CTX_LEN = 512
ROW_TOKENS = 4096
"""A causal model's longer documents are stored in several rows, so that a part of one can be held out."""


PART_CHARS = 200_000
"""Longer texts are tokenized in parts: a tokenizer takes about 200 bytes of memory for each character of a text, and
BPE's time per character grows on a line without a space."""
CALL_CHARS = 1_000_000
"""Characters that are handed to the tokenizer at once, for the same reason."""


@dataclass(frozen=True, kw_only=True)
class TokenSettings:
    """Tokens: how documents become sequences."""

    ctx_len: Annotated[int | None, shown_default("512, or the model's positions where fewer", "INT")] = None
    """Tokens of a sequence, its special tokens included."""
    exclude_special_tokens: bool = True
    """Leave CLS, SEP, BOS and EOS out of training and scores (padding always is)."""
    data_preprocessing_num_proc: int = 1
    """Processes that tokenize."""

    def __post_init__(self) -> None:
        if self.ctx_len is not None and self.ctx_len < 4:
            raise SaetrainError(f"--ctx_len {self.ctx_len}: must be at least 4 tokens")
        if self.data_preprocessing_num_proc < 1:
            raise SaetrainError(f"--data_preprocessing_num_proc {self.data_preprocessing_num_proc}: must be at least 1")


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """The fast tokenizer that belongs to model ``name``; SaetrainError when there is none."""
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)

    try:
        tokenizer = load() if os.path.isdir(name) else load_cached_or_fetch(f"model '{name}'", load)
    except SaetrainError:
        raise
    except Exception as error:  # the library raises many unrelated types for one cause: no usable tokenizer
        raise SaetrainError(
            f"model {name}: no tokenizer could be loaded from it: {str(error).splitlines()[0]}"
        ) from error
    # Where a model comes without one, the library makes up a tokenizer that knows its special tokens alone.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SaetrainError(f"model {name}: it comes without a tokenizer's vocabulary; a tokenizer.json is needed")
    if not tokenizer.is_fast:
        raise SaetrainError(f"model {name}: its tokenizer is a slow one; a tokenizer.json is needed")
    return tokenizer


@dataclass(frozen=True)
class Framing:
    """What a model expects around its text.

    A causal model reads documents packed end to end; an encoder reads one document, or a part of one, between
    its own special tokens.
    """

    causal: bool
    ctx_len: int
    bos: int | None
    """Put before each document and each packed window, where the tokenizer itself does so."""
    eos: int | None
    """Put behind each document."""

    @staticmethod
    def from_tokenizer(tokenizer: Any, causal: bool, ctx_len: int) -> Framing:
        """Read the framing off ``tokenizer``'s own behaviour."""
        if not causal:
            return Framing(False, ctx_len, None, None)
        own = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        return Framing(True, ctx_len, bos if bos is not None and own[:1] == [bos] else None, tokenizer.eos_token_id)

    def describe_packing(self, tokenizer: Any) -> str:
        """One line for the user."""
        if not self.causal:
            return f"one document or a part of one per sequence, up to {self.ctx_len} tokens with their special ones"
        marks = [
            f"{name} {tokenizer.decode([i])!r}" for name, i in (("BOS", self.bos), ("EOS", self.eos)) if i is not None
        ]
        return f"documents packed into sequences of {self.ctx_len} tokens, parted by {' and '.join(marks) or 'nothing'}"


def tokenize_rows(
    rows: datasets.Dataset, column: TextColumn, tokenizer: Any, framing: Framing, num_proc: int
) -> datasets.Dataset:
    """Tokenize all ``rows``; cached on disk under a fingerprint of data, tokenizer and framing.

    Gives columns ``ids`` (list of uint16 or uint32), ``special`` (list of bool), ``doc`` (int64, row of the data
    set) and ``text_hash`` (int64 of the normalised text). A causal model's rows are documents (the longest in
    parts), an encoder's are pieces that fit ``framing.ctx_len``.
    """
    import datasets
    from datasets import Features, List, Value

    features = Features(
        {
            "ids": List(Value(ids_dtype(tokenizer))),
            "special": List(Value("bool")),
            "doc": Value("int64"),
            "text_hash": Value("int64"),
        }
    )
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if num_proc > 1 else "true"
    progress = datasets.is_progress_bar_enabled()
    fingerprint = _fingerprint_tokens(rows, column, tokenizer, framing)
    # Beside the rows' own files, as the library would have it, may be a folder of the user's.
    folder = Path(datasets.config.HF_DATASETS_CACHE, "saetrain")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tokenized = rows.map(
            build_row_encoder(column, tokenizer, framing),
            batched=True,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            num_proc=num_proc if num_proc > 1 else None,
            new_fingerprint=fingerprint,
            cache_file_name=str(folder / f"tokens-{fingerprint}.arrow"),
            desc="tokenizing" if progress else None,
        )
    except OSError as error:
        raise SaetrainError(
            f"the tokens can't be written to {folder}: {error}; make room there, or name another folder by the "
            "variable HF_DATASETS_CACHE"
        ) from error
    if not len(tokenized):
        raise SaetrainError(
            f"the data set holds no text: {len(rows)} rows, all empty in column {'+'.join(column.columns)}"
        )
    return tokenized


def ids_dtype(tokenizer: Any) -> str:
    """The smallest type that holds every id of the tokenizer's vocabulary."""
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


def build_row_encoder(column: TextColumn, tokenizer: Any, framing: Framing) -> Callable[[Rows, list[int]], Rows]:
    """The function that tokenizes one batch of rows."""
    if column.kind == "ids":
        return _build_ids_encoder(column.columns[0], tokenizer, framing)
    render = build_renderer(column, tokenizer)
    # A chat template writes special tokens as text, so only there may text turn into special ids.
    literal = column.kind != "chat"
    special_ids = set() if literal else set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def encode_rows(batch: Rows, indices: list[int]) -> Rows:
        if literal:
            _require_strings(batch, column, indices)
        texts = render(batch)
        filled = [i for i, text in enumerate(texts) if text.strip()]
        out: Rows = {"ids": [], "special": [], "doc": [], "text_hash": []}
        if not filled:
            return out
        hashes = [hash_text(texts[i]) for i in filled]
        pieces = _tokenize_pieces([texts[i] for i in filled], tokenizer, framing, split_special_tokens=literal)
        for piece, ids, special in pieces:
            out["ids"].append(ids)
            out["special"].append(special | np.isin(ids, list(special_ids)) if special_ids else special)
            out["doc"].append(indices[filled[piece]])
            out["text_hash"].append(hashes[piece])
        return out

    return encode_rows


def _require_strings(batch: Rows, column: TextColumn, indices: list[int]) -> None:
    for name in column.columns:
        for index, value in zip(indices, batch[name], strict=True):
            if not isinstance(value, str) and value is not None:
                raise SaetrainError(
                    f"column {name}, row {index} (from 0): holds {type(value).__name__} {str(value)[:40]!r} and no "
                    "text; --skip_bad_rows leaves such rows out"
                )


def _tokenize_pieces(
    texts: list[str], tokenizer: Any, framing: Framing, **options: Any
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """(index into ``texts``, ids, special) of each stored row."""
    if not framing.causal:
        return [
            piece
            for call in _group_parts(texts)
            for piece in _tokenize_encoder_pieces(call, tokenizer, framing, options)
        ]
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, **options}
    documents: dict[int, list[np.ndarray]] = {}
    for call in _group_parts(texts):
        encoded = tokenizer([part for _, part in call], **options)["input_ids"]
        for (number, _), ids in zip(call, encoded, strict=True):
            documents.setdefault(number, []).append(np.asarray(ids, dtype=np.int64))
    joined = ((number, np.concatenate(parts)) for number, parts in documents.items())
    framed = ((number, *_add_special_tokens(ids, framing)) for number, ids in joined if len(ids))
    return [
        (number, ids[start : start + ROW_TOKENS], special[start : start + ROW_TOKENS])
        for number, ids, special in framed
        for start in range(0, len(ids), ROW_TOKENS)
    ]


def _tokenize_encoder_pieces(
    call: list[tuple[int, str]], tokenizer: Any, framing: Framing, options: dict[str, Any]
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    encoded = tokenizer(
        [part for _, part in call],
        truncation=True,
        max_length=framing.ctx_len,
        return_overflowing_tokens=True,
        return_special_tokens_mask=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        **options,
    )
    return [
        (call[source][0], np.asarray(ids), np.asarray(special, dtype=bool))
        for source, ids, special in zip(
            encoded["overflow_to_sample_mapping"],
            encoded["input_ids"],
            encoded["special_tokens_mask"],
            strict=True,
        )
        if not all(special)
    ]


def _group_parts(texts: list[str]) -> Iterator[list[tuple[int, str]]]:
    """The texts' parts, each with its text's index, in lists of about CALL_CHARS characters."""
    call: list[tuple[int, str]] = []
    held = 0
    for number, text in enumerate(texts):
        for part in split_text(text):
            call.append((number, part))
            held += len(part)
            if held >= CALL_CHARS:
                yield call
                call, held = [], 0
    if call:
        yield call


def split_text(text: str) -> Iterator[str]:
    """``text`` in parts of at most PART_CHARS characters, cut before a word where there is a white space.

    WordPiece and byte-level BPE give the same tokens for such parts as for the whole.
    """
    start = 0
    while len(text) - start > PART_CHARS:
        window = text[start : start + PART_CHARS + 1]
        # The white space right before a word belongs to the word.
        cut = next(
            (index - 1 for index in range(PART_CHARS, 1, -1) if window[index - 1].isspace() > window[index].isspace()),
            0,
        )
        start, previous = start + (cut or PART_CHARS), start
        yield text[previous:start]
    yield text[start:]


def _add_special_tokens(ids: np.ndarray, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
    # A chat template may have written them already.
    before = [] if framing.bos is None or ids[0] == framing.bos else [framing.bos]
    after = [] if framing.eos is None or ids[-1] == framing.eos else [framing.eos]
    framed = np.concatenate([np.array(before, dtype=np.int64), ids, np.array(after, dtype=np.int64)])
    special = np.zeros(len(framed), dtype=bool)
    special[0] = framing.bos is not None
    special[-1] = framing.eos is not None
    return framed, special


def _build_ids_encoder(name: str, tokenizer: Any, framing: Framing) -> Callable[[Rows, list[int]], Rows]:
    """Rows that hold ids already: special ones are known by their id, for nothing else tells."""
    special_ids = list(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    size = len(tokenizer)
    # Many decoders are padded with their EOS, which also parts documents.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None

    def encode_rows(batch: Rows, indices: list[int]) -> Rows:
        out: Rows = {"ids": [], "special": [], "doc": [], "text_hash": []}
        for position, (index, row) in enumerate(zip(indices, batch[name], strict=True)):
            ids = np.asarray(row or [], dtype=np.int64)
            if "attention_mask" in batch and len(batch["attention_mask"][position] or []) == len(ids):
                ids = ids[np.asarray(batch["attention_mask"][position], dtype=bool)]
            elif padding is not None:
                ids = ids[ids != padding]
            if ids.size and (ids.min() < 0 or ids.max() >= size):
                raise SaetrainError(
                    f"column {name}, row {index}: token id {ids.max() if ids.max() >= size else ids.min()} is not in "
                    f"the model's vocabulary of {size}; the data set was made with another tokenizer"
                )
            step = ROW_TOKENS if framing.causal else framing.ctx_len
            document = _hash_bytes(ids.tobytes())
            for start in range(0, len(ids), step):
                piece = ids[start : start + step]
                out["ids"].append(piece)
                out["special"].append(np.isin(piece, special_ids))
                out["doc"].append(index)
                out["text_hash"].append(document)
        return out

    return encode_rows


def hash_text(text: str) -> int:
    """Hash of a text without regard to case, width forms and white space, so that near copies agree; 0 to 2^63."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _hash_bytes(normal.encode("utf-8", "replace"))


def _hash_bytes(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """All that decides what ``tokenizer`` makes of a text."""
    machine = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        # Truncation and padding are traces of the last call, not part of the tokenizer.
        "tokenizer": {key: value for key, value in machine.items() if key not in ("truncation", "padding")},
        "special": sorted(tokenizer.all_special_ids),
    }


def _fingerprint_tokens(rows: datasets.Dataset, column: TextColumn, tokenizer: Any, framing: Framing) -> str:
    """Hash of all that decides the stored tokens: the rows, the column, the tokenizer's own file, the framing."""
    return hash_json(
        {
            "format": CACHE_FORMAT_VERSION,
            "rows": rows._fingerprint,
            "column": [column.kind, *column.columns],
            **tokenizer_identity(tokenizer),
            "chat_template": str(tokenizer.chat_template) if column.kind == "chat" else "",
            "framing": [framing.causal, framing.ctx_len if not framing.causal else 0, framing.bos, framing.eos],
        }
    )


def hash_json(value: Any) -> str:
    """Hash of what JSON can hold."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
