"""Text sources: a hub data set, or a local folder or file of a common kind, loaded or streamed."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Annotated, Any

from saetrain.data.dataset_card import check_dataset_card, check_remote_card
from saetrain.data.json_depth import limit_json_depth
from saetrain.data.lenient_readers import (
    BadRow,
    choose_file_column,
    find_first_bad_row,
    find_split_files,
    load_leniently,
)
from saetrain.data.text_column import TextColumn
from saetrain.errors import SaetrainError, did_you_mean
from saetrain.hub import is_hub_reachable, offline_mode, refuse_missing_path, require_hub
from saetrain.settings import Settings
from saetrain.types import shown_default

HELD_OUT_SPLITS = ("validation", "valid", "val", "dev", "test")
FILE_KINDS = {
    ".parquet": "parquet",
    ".jsonl": "json",
    ".json": "json",
    ".ndjson": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".arrow": "arrow",
}


@dataclass(frozen=True, kw_only=True)
class SourceSettings(Settings):
    """Text: the part of the data set to read."""

    split: str = "train"
    """Split to train on. `train[:10%]` selects a part of it."""
    dataset_config: Annotated[str | None, shown_default("the only one", "NAME")] = None
    """Configuration of the data set, if it has several, such as `wikitext-103-raw-v1`."""
    text_column: Annotated[str | None, shown_default("detected", "NAME")] = None
    """Column that contains the text."""
    streaming: bool = False
    """Read the data set from start to end while training, instead of loading and tokenizing all of it first."""
    skip_bad_rows: bool = False
    """Skip rows of jsonl, csv and parquet files that can't be read, and log their number."""


@dataclass(frozen=True)
class DatasetAlias:
    """Data set that a short name stands for."""

    path: str
    config: str | None
    column: str
    deduplicate: bool = False


ALIASES = {
    "wikitext": DatasetAlias("Salesforce/wikitext", "wikitext-103-raw-v1", "text"),
    "squad": DatasetAlias("rajpurkar/squad", "plain_text", "context", deduplicate=True),
}


@dataclass(frozen=True)
class TextSource:
    """Training rows, the rows of the data set's own held-out split, and where they come from."""

    train: Any
    """A `datasets.Dataset`, or a `datasets.IterableDataset` if it is streamed."""
    held_out: Any
    """Rows of the split ``held_out_split``, of the type of ``train``; None without such a split."""
    held_out_split: str | None
    description: str
    text_column: str | None
    """Column that the user or the alias names; None: detect it."""
    deduplicate: bool
    """Whether rows repeat the same text by design (SQuAD has one row per question, with the paragraph repeated)."""
    column: TextColumn | None = None
    """The text column, if opening the files required to choose it; the rows of a lenient reader have BAD_ROW_COLUMN."""
    find_bad_row: Callable[[], BadRow | None] = lambda: None
    """Finds the first row that can't be read in local files."""


@dataclass(frozen=True)
class _LoadedSplits:
    train: Any
    held_out: Any
    held_out_split: str | None
    column: TextColumn | None
    find_bad_row: Callable[[], BadRow | None]


def open_dataset(name: str, settings: SourceSettings) -> TextSource:
    """Open data set ``name`` (local path or hub id).

    Raises SaetrainError when the data set, split or configuration does not exist, when a file is broken, or when the
    hub is needed and can't be reached.
    """
    for flag in ("streaming", "skip_bad_rows"):
        if "[" in settings.split and getattr(settings, flag):
            raise SaetrainError(
                f"--split {settings.split}: a part of a split can't be combined with --{flag}; pass a whole split"
            )
    if os.path.exists(name):
        return _open_local(Path(name), settings)
    refuse_missing_path("data set", name)
    alias = ALIASES.get(name)
    path = alias.path if alias else name
    config = settings.dataset_config or (alias.config if alias else None)
    loaded = _load_hub(path, config, settings, alias.column if alias else None)
    chosen = loaded.train.info.config_name
    return TextSource(
        **vars(loaded),
        description=f"hub data set {path}{f' ({chosen})' if chosen not in (None, 'default') else ''}",
        text_column=settings.text_column or (alias.column if alias else None),
        deduplicate=bool(alias and alias.deduplicate),
    )


def _open_local(path: Path, settings: SourceSettings) -> TextSource:
    saved = (path / "dataset_dict.json").exists() or (path / "state.json").exists()
    if settings.dataset_config is not None and (saved or path.is_file()):
        raise SaetrainError(f"--dataset_config {settings.dataset_config}: {path} has no configurations; omit the flag")
    if saved:
        loaded = _load_saved(path, settings)
    else:
        kind, options = _loader_options(path)
        loaded = _load_splits(kind, settings.dataset_config, settings, str(path), **options)
    return TextSource(
        **vars(loaded),
        description=f"local {'folder' if path.is_dir() else 'file'} {path}",
        text_column=settings.text_column,
        deduplicate=False,
    )


def _load_saved(path: Path, settings: SourceSettings) -> _LoadedSplits:
    """Load a folder that `save_to_disk` wrote. Its files are memory-mapped, even with ``--streaming``."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # the readers raise many unrelated types for broken files
        raise SaetrainError(explain_load_error(str(path), error)) from error
    base = parse_split_names(settings.split)[0]
    splits = loaded if isinstance(loaded, datasets.DatasetDict) else {base: loaded}
    _check_split(settings.split, list(splits), str(path))
    if base != settings.split:
        raise SaetrainError(
            f"--split {settings.split}: {path} was written by `save_to_disk`, so a part of a split can't be selected; "
            f"pass one of {', '.join(splits)}"
        )
    name = _held_out_split_name(list(splits), settings.split)
    train, held_out = (
        (_to_iterable_dataset(splits[split], str(path)) if settings.streaming else splits[split]) if split else None
        for split in (base, name)
    )
    return _LoadedSplits(train, held_out, name, None, lambda: None)


def _to_iterable_dataset(rows: Any, display_name: str) -> Any:
    if not len(rows):
        raise SaetrainError(f"data set {display_name}: has no rows")
    return rows.to_iterable_dataset()


def _loader_options(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the `datasets` builder for ``path``, and its options."""
    if path.is_file():
        kind = FILE_KINDS.get(path.suffix.lower())
        if kind is None:
            raise SaetrainError(
                f"data set {path}: files ending in '{path.suffix}' can't be read; allowed are {', '.join(FILE_KINDS)}"
            )
        if not path.stat().st_size:
            raise SaetrainError(f"data set {path}: the file is empty")
        return kind, {"data_files": {"train": str(path)}, **_kind_options(kind, [path])}
    if not path.is_dir():
        raise SaetrainError(f"data set {path}: is neither a regular file nor a folder")
    check_dataset_card(path)
    files = [f for f in sorted(path.rglob("*")) if f.suffix.lower() in FILE_KINDS and f.is_file() and f.stat().st_size]
    texts = [f for f in files if f.suffix.lower() == ".txt"]
    if not files:
        raise SaetrainError(
            f"data set {path}: the folder contains no data; it must contain files ending in "
            f"{', '.join(FILE_KINDS)}, or be written by `save_to_disk` of `datasets`"
        )
    return str(path), _kind_options("text", texts) if len(texts) == len(files) else {}


def _kind_options(kind: str, files: list[Path]) -> dict[str, Any]:
    """Return the loader's options for ``files``.

    Documents of plain text are separated by blank lines, if there are any; otherwise each line is a document.
    """
    if kind != "text":
        return {"delimiter": "\t"} if files and files[0].suffix.lower() == ".tsv" else {}
    with open(files[0], encoding="utf-8", errors="replace") as handle:
        has_blank_lines = "\n\n" in handle.read(1 << 20)
    return {"sample_by": "paragraph" if has_blank_lines else "line"}


def _load_hub(path: str, config: str | None, settings: SourceSettings, column: str | None) -> _LoadedSplits:
    """Load from a local cache that contains the data set, else over the network."""
    prepared = _prepared_configs(path)
    if config in prepared or (config is None and prepared):
        with offline_mode():
            return _load_splits(path, config, settings, path, configs=prepared, column=column)
    downloaded = _find_downloaded(path)
    if downloaded is not None:
        check_dataset_card(Path(downloaded))
        try:
            return _load_splits(downloaded, config, settings, path, column=column)
        except SaetrainError:  # the cache may contain only a part of the data set
            if not is_hub_reachable():
                raise
    require_hub(f"data set '{path}'")
    check_remote_card(path)
    return _load_splits(path, config, settings, path, column=column)


def _prepared_configs(path: str) -> list[str]:
    """Return the configurations of hub data set ``path`` that `datasets` has prepared in its cache."""
    import datasets
    from datasets.naming import camelcase_to_snakecase

    *owner, name = path.split("/")
    folder = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)]))
    names = set()
    for info in folder.glob("*/*/*/dataset_info.json"):
        # The library reports a file whose end is missing, such as one of a process that was killed.
        with contextlib.suppress(OSError, ValueError, AttributeError):
            # The folder of a variant that was made with options does not have the configuration's name.
            if json.loads(info.read_text()).get("config_name") == info.parts[-4]:
                names.add(info.parts[-4])
    return sorted(names)


def _find_downloaded(path: str) -> str | None:
    """Return the folder of hub data set ``path`` in the hub's cache, or None."""
    from huggingface_hub import snapshot_download

    try:
        return str(snapshot_download(path, repo_type="dataset", local_files_only=True))
    except (OSError, ValueError):  # not in the cache, or not a valid name of a data set
        return None


def _load_splits(
    path: str,
    config: str | None,
    settings: SourceSettings,
    display_name: str,
    *,
    configs: list[str] | None = None,
    column: str | None = None,
    data_files: dict[str, str] | None = None,
    **options: Any,
) -> _LoadedSplits:
    """Load the rows of the requested split and of the held-out split.

    ``configs``: the data set's configurations, if it is prepared in the library's cache. ``column``: the text column
    if the user does not name one.
    """
    import datasets

    limit_json_depth()
    options["data_files"] = data_files

    def find_bad_row() -> BadRow | None:
        files = find_split_files(path, config, "+".join(parse_split_names(settings.split)), **options)
        return find_first_bad_row(files) if files is not None and files.are_local else None

    try:
        if data_files is None:
            config = _pick_config(configs or datasets.get_dataset_config_names(path), config, display_name)
            names = datasets.get_dataset_split_names(path, config)
        else:
            names = list(data_files)
        _check_split(settings.split, names, display_name)
        held_out_name = _held_out_split_name(names, settings.split)
        splits = [split for split in (settings.split, held_out_name) if split]
        files = (
            [find_split_files(path, config, split, **options) for split in splits] if settings.skip_bad_rows else [None]
        )
        found = choose_file_column(files[0], settings.text_column or column) if files[0] else None
        rows = [
            load_leniently(file, found, settings.streaming)
            if file and found
            else _load_one_split(path, config, split, settings.streaming, configs is not None, options)
            for split, file in zip_longest(splits, files)
        ]
    except SaetrainError:
        raise
    except Exception as error:  # the libraries raise a dozen unrelated types here
        bad = _try_find_bad_row(find_bad_row)
        raise SaetrainError(
            f"data set '{display_name}' could not be read: {bad}; --skip_bad_rows skips such rows"
            if bad
            else explain_load_error(display_name, error)
        ) from error
    return _LoadedSplits(
        rows[0], rows[1] if held_out_name else None, held_out_name, found, partial(_try_find_bad_row, find_bad_row)
    )


def _load_one_split(
    path: str, config: str | None, split: str, streaming: bool, prepared: bool, options: dict[str, Any]
) -> Any:
    import datasets

    if streaming and prepared:  # the library can't stream a data set that it has prepared on disk
        return _to_iterable_dataset(datasets.load_dataset(path, config, split=split, **options), path)
    return datasets.load_dataset(path, config, split=split, streaming=streaming, **options)


def _try_find_bad_row(find_bad_row: Callable[[], BadRow | None]) -> BadRow | None:
    """Return the row that made loading fail, or None."""
    try:
        return find_bad_row()
    except Exception:  # the files may be unreadable for the reason that loading failed
        return None


def _pick_config(names: list[str], config: str | None, display_name: str) -> str:
    """Return the configuration to load.

    Raises SaetrainError when ``config`` is not in ``names``, or when it is None and ``names`` has several, none of them
    `default`.
    """
    if config is not None:
        if config not in names:
            raise SaetrainError(
                f"--dataset_config {config}: {display_name} has no such configuration.{did_you_mean(config, names)} "
                f"It has: {', '.join(names)}"
            )
        return config
    if len(names) > 1 and "default" not in names:
        raise SaetrainError(
            f"data set {display_name} has several configurations: choose one with --dataset_config. "
            f"It has: {', '.join(names)}"
        )
    return "default" if len(names) > 1 else names[0]


def parse_split_names(wanted: str) -> list[str]:
    """Return the names of the splits in an expression such as ``train[:10%]+test``."""
    return [part.split("[")[0].strip() for part in wanted.split("+")]


def _check_split(wanted: str, names: list[str], display_name: str) -> None:
    missing = [name for name in parse_split_names(wanted) if name not in names]
    if missing:
        raise SaetrainError(
            f"--split {wanted}: {display_name} has no split '{missing[0]}'.{did_you_mean(missing[0], names)} "
            f"It has: {', '.join(names)}"
        )


def _held_out_split_name(names: list[str], wanted: str) -> str | None:
    """Return the first of HELD_OUT_SPLITS that exists and is not trained on, or None."""
    return next((name for name in HELD_OUT_SPLITS if name in names and name not in parse_split_names(wanted)), None)


def explain_load_error(display_name: str, error: Exception) -> str:
    """Return one line that describes why a data set could not be opened, and what to do."""
    from datasets.data_files import EmptyDatasetError
    from datasets.exceptions import DataFilesNotFoundError, DatasetNotFoundError
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    gated = (
        f"data set '{display_name}' is gated: accept its terms on the hub and set HF_TOKEN to a token that has access"
    )
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, GatedRepoError):
            return gated
        if isinstance(cause, RepositoryNotFoundError):
            return f"data set '{display_name}' is not on the hub, or is private: check the name, or set HF_TOKEN"
        cause = cause.__cause__
    if isinstance(error, DatasetNotFoundError) and "gated" in str(error).replace(display_name, ""):
        return gated
    if isinstance(error, (DataFilesNotFoundError, EmptyDatasetError, DatasetNotFoundError)):
        return (
            f"data set '{display_name}' was not found: there is no local path of that name, and it is not on the hub "
            "(or it is private: set HF_TOKEN to a token that has access)"
        )
    detail = str(error.__cause__ or error).splitlines()
    return f"data set '{display_name}' could not be read: {detail[0] if detail else type(error).__name__}"
