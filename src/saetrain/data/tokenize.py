"""From documents to token ids: each document is tokenized once, and the ids are stored memory-mapped on disk."""

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

from saetrain.data.library_bars import enable_progress_bar
from saetrain.data.text_column import Rows, TextColumn, build_renderer, require_kind
from saetrain.distributed import record_progress
from saetrain.errors import SaetrainError
from saetrain.hub import load_cached_or_fetch
from saetrain.manifest import ensure_cached
from saetrain.settings import Range, Settings
from saetrain.types import shown_default

if TYPE_CHECKING:
    import datasets

IS_PARALLELISM_GIVEN = "TOKENIZERS_PARALLELISM" in os.environ
"""Whether the user has set the threads of the tokenizers library."""
CACHE_FORMAT_VERSION = 2
"""Part of the cache key: raise it when the stored rows change."""
DEFAULT_CTX_LEN = 512
ROW_TOKENS = 4096
"""Maximum number of tokens per stored row of a causal model. Longer documents have several rows, so that a part of a
document can be held out."""


PART_CHARS = 200_000
"""Maximum number of characters per text passed to the tokenizer; longer texts are cut into parts. A tokenizer needs
about 200 bytes of memory per character, and BPE's time per character grows on lines without spaces."""
CALL_CHARS = 1_000_000
"""Approximate number of characters per call of the tokenizer, which also limits its memory."""

CtxLen = Annotated[int, Range(4, 10**7)]
NumProc = Annotated[int, Range(1, 1024)]


@dataclass(frozen=True, kw_only=True)
class TokenSettings(Settings):
    """Tokens: how documents become sequences."""

    ctx_len: Annotated[CtxLen | None, shown_default("512, or the model's positions if fewer", "INT")] = None
    """Tokens per sequence, including special tokens."""
    exclude_special_tokens: bool = True
    """Exclude CLS, SEP, BOS and EOS from training and metrics. Padding is always excluded."""
    data_preprocessing_num_proc: NumProc = 1
    """Number of processes for tokenization."""


def load_tokenizer(name: str, revision: str | None, trust_remote_code: bool) -> Any:
    """Load the fast tokenizer of model ``name``; SaetrainError when there is none."""
    from transformers import AutoTokenizer

    def load() -> Any:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)

    try:
        tokenizer = load() if os.path.isdir(name) else load_cached_or_fetch(f"model '{name}'", load)
    except SaetrainError:
        raise
    except Exception as error:  # the library raises many unrelated types for an unusable tokenizer
        raise SaetrainError(
            f"model {name}: no tokenizer could be loaded from it: {str(error).splitlines()[0]}"
        ) from error
    # For a model without a tokenizer, the library creates one that contains only special tokens.
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise SaetrainError(f"model {name}: it comes without a tokenizer's vocabulary; add its tokenizer.json")
    if not tokenizer.is_fast:
        raise SaetrainError(f"model {name}: it has no fast tokenizer; add its tokenizer.json")
    return tokenizer


@dataclass(frozen=True)
class Framing:
    """How documents become the model's input.

    A causal model reads sequences of concatenated documents. An encoder reads one document, or a part of one, between
    its special tokens.
    """

    causal: bool
    ctx_len: int
    bos: int | None
    """Token id before each document and each packed window, if the tokenizer adds BOS itself; else None."""
    eos: int | None
    """Token id after each document, or None."""

    @staticmethod
    def from_tokenizer(tokenizer: Any, causal: bool, ctx_len: int) -> Framing:
        """Find the framing from what ``tokenizer`` adds to a text."""
        if not causal:
            return Framing(False, ctx_len, None, None)
        probe_ids = tokenizer("a")["input_ids"]
        bos = tokenizer.bos_token_id
        adds_bos = bos is not None and probe_ids[:1] == [bos]
        return Framing(True, ctx_len, bos if adds_bos else None, tokenizer.eos_token_id)

    def describe_packing(self, tokenizer: Any) -> str:
        """Return the line for the log."""
        if not self.causal:
            return f"one document (or part) per sequence, up to {self.ctx_len} tokens including special tokens"
        marks = [
            f"{name} {tokenizer.decode([i])!r}" for name, i in (("BOS", self.bos), ("EOS", self.eos)) if i is not None
        ]
        separator = " and ".join(marks) or "nothing"
        return f"documents packed into sequences of {self.ctx_len} tokens, separated by {separator}"


def tokenize_rows(
    rows: datasets.Dataset,
    column: TextColumn,
    tokenizer: Any,
    framing: Framing,
    num_proc: int,
    log: Callable[[str], None] = print,
) -> datasets.Dataset:
    """Tokenize all ``rows``. The result is cached on disk, keyed by data, tokenizer and framing.

    The columns are ``ids`` (list of uint16 or uint32), ``special`` (list of bool), ``doc`` (int64, row of the data
    set) and ``text_hash`` (int64, hash of the normalized text). Rows of a causal model are documents, long ones in
    parts of ROW_TOKENS tokens. Rows of an encoder are parts of documents of at most ``framing.ctx_len`` tokens.

    A damaged cache is built again, which ``log`` is called with. Raises SaetrainError when the cache can't be written
    or the rows contain no text.
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
    if not IS_PARALLELISM_GIVEN:
        os.environ["TOKENIZERS_PARALLELISM"] = "false" if num_proc > 1 else "true"

    def write_tokens(folder: Path) -> None:
        with enable_progress_bar():
            tokenized = rows.map(
                build_row_encoder(column, tokenizer, framing),
                batched=True,
                with_indices=True,
                remove_columns=rows.column_names,
                features=features,
                num_proc=num_proc if num_proc > 1 else None,
                cache_file_name=str(folder / "tokens.arrow"),
                desc="tokenizing",
            )
        if not len(tokenized):
            raise SaetrainError(
                f"the data set contains no text: {len(rows)} rows, all empty in column {'+'.join(column.columns)}"
            )

    name = f"tokens-{_fingerprint_tokens(rows, column, tokenizer, framing)}"
    # The library's default is next to the rows' files, which may be a folder of the user.
    cached = Path(datasets.config.HF_DATASETS_CACHE, "saetrain", name)
    ensure_tokens_cached(cached, write_tokens, log)
    # Several processes write several files, whose names contain their numbers.
    parts = [datasets.Dataset.from_file(str(path)) for path in sorted(cached.glob("*.arrow"))]
    return datasets.concatenate_datasets(parts)


def ensure_tokens_cached(cached: Path, write_tokens: Callable[[Path], None], log: Callable[[str], None]) -> None:
    """Make sure that the folder ``cached`` is intact; SaetrainError if it can't be written, or a process was killed."""
    try:
        cached.parent.mkdir(parents=True, exist_ok=True)
        ensure_cached(cached, write_tokens, log)
    except RuntimeError as error:
        if "abruptly died" not in str(error):
            raise
        advice = "--data_preprocessing_num_proc: a process that tokenizes was killed; pass a smaller number"
        raise SaetrainError(advice) from error
    except (OSError, ValueError) as error:
        # After a failed write, the library writes to the closed file, which hides the cause.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError):
            raise
        raise SaetrainError(
            f"the tokens can't be written to {cached.parent}: {cause}; free disk space there, or choose another folder "
            "with the environment variable HF_DATASETS_CACHE"
        ) from error


def ids_dtype(tokenizer: Any) -> str:
    """Return the smallest type for all ids of the tokenizer's vocabulary, `uint16` or `uint32`."""
    return "uint16" if len(tokenizer) <= 1 << 16 else "uint32"


def build_row_encoder(column: TextColumn, tokenizer: Any, framing: Framing) -> Callable[[Rows, list[int]], Rows]:
    """Return the function that tokenizes a batch of rows, given the rows and their row numbers."""
    if column.kind == "ids":
        return _build_ids_encoder(column, tokenizer, framing)
    render = build_renderer(column, tokenizer)
    # A chat template writes special tokens as text, so only chat text may be encoded to special ids.
    literal = column.kind != "chat"
    special_ids = set() if literal else set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}

    def encode_rows(batch: Rows, indices: list[int]) -> Rows:
        record_progress()
        require_kind(batch, column, indices)
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


def _tokenize_pieces(
    texts: list[str], tokenizer: Any, framing: Framing, **options: Any
) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Return (index into ``texts``, ids, special) of each stored row."""
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
    """Yield lists of (index of the text, part of the text), each with about CALL_CHARS characters."""
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
    """Yield ``text`` in parts of at most PART_CHARS characters, cut before a word if there is white space.

    With WordPiece and byte-level BPE, such parts have the same tokens as the whole text.
    """
    start = 0
    while len(text) - start > PART_CHARS:
        window = text[start : start + PART_CHARS + 1]
        # The white space directly before a word belongs to the word's token.
        cut = next(
            (index - 1 for index in range(PART_CHARS, 1, -1) if window[index - 1].isspace() > window[index].isspace()),
            0,
        )
        start, previous = start + (cut or PART_CHARS), start
        yield text[previous:start]
    yield text[start:]


def _add_special_tokens(ids: np.ndarray, framing: Framing) -> tuple[np.ndarray, np.ndarray]:
    # A chat template may have added them already.
    before = [] if framing.bos is None or ids[0] == framing.bos else [framing.bos]
    after = [] if framing.eos is None or ids[-1] == framing.eos else [framing.eos]
    framed = np.concatenate([np.array(before, dtype=np.int64), ids, np.array(after, dtype=np.int64)])
    special = np.zeros(len(framed), dtype=bool)
    special[0] = framing.bos is not None
    special[-1] = framing.eos is not None
    return framed, special


def _build_ids_encoder(column: TextColumn, tokenizer: Any, framing: Framing) -> Callable[[Rows, list[int]], Rows]:
    """Return the encoder of rows that already contain token ids; special tokens are recognized by their id."""
    name = column.columns[0]
    special_ids = list(set(tokenizer.all_special_ids) - {tokenizer.unk_token_id})
    size = len(tokenizer)
    # Many decoders use EOS for padding, and EOS also separates documents.
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id != tokenizer.eos_token_id else None

    def encode_rows(batch: Rows, indices: list[int]) -> Rows:
        record_progress()
        require_kind(batch, column, indices)
        out: Rows = {"ids": [], "special": [], "doc": [], "text_hash": []}
        for position, (index, row) in enumerate(zip(indices, batch[name], strict=True)):
            try:
                ids = np.asarray(row or [], dtype=np.int64)
            except OverflowError as error:
                raise SaetrainError(f"column {name}, row {index}: a token id has more than 63 bits") from error
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
    """Return a hash of a text in [0, 2^63) that ignores case, width forms and white space, so near copies are equal."""
    normal = " ".join(unicodedata.normalize("NFKC", text).casefold().split())
    return _hash_bytes(normal.encode("utf-8", "replace"))


def _hash_bytes(data: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little") >> 1


def tokenizer_identity(tokenizer: Any) -> dict[str, Any]:
    """Return everything that determines the tokens of a text, as JSON values."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    return {
        # Truncation and padding are left over from the last call and are not part of the tokenizer.
        "tokenizer": {key: value for key, value in backend.items() if key not in ("truncation", "padding")},
        "special": sorted(tokenizer.all_special_ids),
    }


def _fingerprint_tokens(rows: datasets.Dataset, column: TextColumn, tokenizer: Any, framing: Framing) -> str:
    """Return a hash of everything that determines the stored tokens: rows, column, tokenizer and framing."""
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
    """Return a hash of ``value``, which JSON can represent."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
