"""Load the SAEs below a path, and find the run that they belong to."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeVar

from saetrain.coders import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.hub import download_files, list_files
from saetrain.interop.formats import (
    MISSING_MARKERS,
    ONLY_SAE,
    find_sae_folders,
    group_saes,
    load_sae,
    select_sae_files,
)
from saetrain.interop.metadata import SaeMetadata
from saetrain.runs.run_dir import CONFIG_FILE, is_run_dir
from saetrain.runs.share.local_paths import is_hub_id
from saetrain.untrusted import require_plain_text, show_value

SHARED_ENTRIES = (
    "model",
    "model_weights_sha256",
    "model_revision",
    "model_dtype",
    "dataset",
    "mix",
    "dataset_config",
    "split",
    "streaming",
    "skip_bad_rows",
    "text_columns",
    "held_out",
    "eval_tokens",
    "fingerprint",
    "ctx_len",
    "causal",
    "prepend_bos",
    "exclude_special_tokens",
    "exclude_sinks",
)
"""Entries of the metadata that an evaluation reads from the first SAE, so that all SAEs must agree on them."""
MAX_DOWNLOADED_SAES = 100
"""Repositories of Gemma Scope contain hundreds, of which each has up to a gigabyte."""
Place = TypeVar("Place", str, Path)
SEPARATELY = "evaluate each by its own folder"
"""Advice for SAEs that one evaluation can't score together."""


@dataclass(frozen=True)
class SavedSae:
    """A saved SAE: its coder, which takes raw activations, and its metadata."""

    folder: Path
    coder: SparseCoder
    metadata: SaeMetadata


@dataclass(frozen=True)
class LoadedSaes:
    """The SAEs below a path, {name: SAE}; ``run_dir``: the directory of their run, or None."""

    path: Path
    saes: dict[str, SavedSae]
    run_dir: Path | None

    @property
    def metadata(self) -> SaeMetadata:
        """Metadata of the first SAE; all SAEs have the same values of SHARED_ENTRIES."""
        return next(iter(self.saes.values())).metadata


def load_saes(path: str) -> LoadedSaes:
    """Load every SAE below ``path``, a folder or a repository on the hub.

    Raises SaetrainError if there is none, if one is broken, or if they differ in model, text or token policy.
    """
    found = locate_saes(path)
    folder, run_dir = (
        (Path(path), find_run_dir(Path(path))) if Path(path).is_dir() else (next(iter(found.values())), None)
    )
    saes = {name: _load_saved_sae(place) for name, place in found.items()}
    if list(saes) == [ONLY_SAE]:
        metadata = saes[ONLY_SAE].metadata
        saes = {metadata.hookpoint or metadata.hook_name or folder.name: saes[ONLY_SAE]}
    for name in saes:
        require_plain_text(name, f"{path}: SAE")
    _require_shared_entries(path, saes)
    return LoadedSaes(folder, saes, run_dir)


def _require_shared_entries(path: str, saes: Mapping[str, SavedSae]) -> None:
    """Raise SaetrainError if the SAEs differ in an entry that an evaluation reads from the first of them."""
    first_name, first = next((name, sae.metadata) for name, sae in saes.items())
    for name, sae in saes.items():
        for entry in SHARED_ENTRIES:
            own, expected = getattr(sae.metadata, entry), getattr(first, entry)
            if own != expected:
                raise SaetrainError(
                    f"{path}: {entry} is {show_value(own)} for {name} and {show_value(expected)} for {first_name}; "
                    f"{SEPARATELY}"
                )


def locate_saes(
    path: str, hookpoint: str | None = None, revision: str | None = None, *, only_one: bool = False
) -> dict[str, Path]:
    """Return {name: folder} of the SAEs in a local folder or in repository ``path`` of the hub, which are downloaded.

    ``hookpoint``: name of the one to return. ``revision``: branch, tag or commit on the hub. Raises SaetrainError if
    there is none, or if ``only_one`` is required and there are several.
    """
    is_local = Path(path).is_dir()
    if not is_local and (path.count("/") != 1 or not is_hub_id(path)):
        raise SaetrainError(
            f"{path}: there is no such folder; pass a run directory, the folder of one SAE, or USER/REPO on the hub"
        )
    if is_local and revision is not None:
        raise SaetrainError(
            f"revision {revision}: {path} is a local folder; only repositories on the hub have revisions"
        )
    if not is_local:
        return _download_saes(path, hookpoint, revision, only_one=only_one)
    found = find_sae_folders(Path(path))
    if not found and is_run_dir(Path(path)):
        raise SaetrainError(f"{path}: contains no SAE; its run is not finished: continue it with --resume")
    return _select_saes(path, found, hookpoint, only_one=only_one)


def _select_saes(path: str, found: dict[str, Place], hookpoint: str | None, *, only_one: bool) -> dict[str, Place]:
    """Return the SAEs among ``found`` that are wanted; SaetrainError as :func:`locate_saes` describes."""
    if not found:
        raise SaetrainError(f"{path}: contains no SAE ({MISSING_MARKERS})")
    if hookpoint is not None and list(found) != [ONLY_SAE]:
        if hookpoint not in found:
            raise SaetrainError(f"{path}: contains no SAE '{hookpoint}'; it contains {', '.join(found)}")
        found = {hookpoint: found[hookpoint]}
    if only_one and len(found) > 1:
        raise SaetrainError(f"{path}: contains {len(found)} SAEs; select one with hookpoint=: {', '.join(found)}")
    return found


def _download_saes(repo: str, hookpoint: str | None, revision: str | None, *, only_one: bool) -> dict[str, Path]:
    """Return {name: folder} of the SAEs in a repository, of which only the files of one format are downloaded."""
    listing = list_files(repo, revision)
    found = group_saes(listing.files)
    is_missing = not found or (ONLY_SAE not in found and hookpoint not in (None, *found))
    if is_missing and not listing.is_complete:
        wanted = "an SAE" if hookpoint is None else f"SAE '{hookpoint}'"
        raise SaetrainError(f"{repo}: {wanted} is not in the local cache, and the hub can't be reached (no network?)")
    found = _select_saes(repo, found, hookpoint, only_one=only_one)
    if len(found) > MAX_DOWNLOADED_SAES:
        raise SaetrainError(
            f"{repo}: contains {len(found)} SAEs, and at most {MAX_DOWNLOADED_SAES} are downloaded at once; download "
            "those that you want, and pass their folder"
        )
    patterns = []
    for place in found.values():
        inside = {path.name for path in map(PurePosixPath, listing.files) if path.parent == PurePosixPath(place)}
        # A name of a module may contain characters that patterns use.
        patterns += [glob.escape((PurePosixPath(place) / name).as_posix()) for name in select_sae_files(inside)]
    root = download_files(repo, revision, patterns)
    return {name: root / place for name, place in found.items()}


def _load_saved_sae(folder: Path) -> SavedSae:
    coder, metadata = load_sae(folder)
    return SavedSae(folder, coder, metadata)


def find_run_dir(folder: Path) -> Path | None:
    """Return the run directory that is ``folder`` or contains it, or None."""
    candidates = [folder.resolve(), *folder.resolve().parents[:3]]
    return next((place for place in candidates if is_run_dir(place) and (place / CONFIG_FILE).exists()), None)
