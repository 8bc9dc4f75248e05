"""The formats of saved SAEs: which folders contain an SAE, and the one function each that saves and loads it."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from safetensors.torch import save_file
from torch import Tensor

from saetrain.atomic_io import atomic_replace, write_json
from saetrain.coders import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.interop import dictionary_learning, gemma_scope, saelens, saetrain_format, sparsify
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE

SAES_DIR = "sae"
"""Folder of a run that contains its SAEs."""
ONLY_SAE = "."
"""Name of an SAE whose folder is the given one itself."""


class Format(Protocol):
    """A format of saved SAEs; each is a module."""

    NAME: str
    MARKER_FILE: str
    """A folder that contains this file contains an SAE."""
    FILES: tuple[str, ...]
    """The files that are read, if they exist; the marker is one of them."""

    def read_sae(self, folder: Path) -> tuple[SparseCoder, SaeMetadata] | None:
        """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE in this format.

        Raises SaetrainError if the SAE is damaged or not supported.
        """


class WrittenFormat(Format, Protocol):
    """A format that saetrain also writes. The formats in one folder share ``cfg.json``."""

    WEIGHTS_FILE: str

    def unsupported(self, coder: SparseCoder) -> str | None:
        """Return why the format cannot hold a coder, or None if it can."""

    def build_config(self, coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
        """Return the format's keys of ``cfg.json``."""

    def build_tensors(self, coder: SparseCoder) -> dict[str, Tensor]:
        """Return the tensors of WEIGHTS_FILE, which is not written if there are none."""


WRITTEN_FORMATS: tuple[WrittenFormat, ...] = (saetrain_format, saelens, sparsify)
"""A key of ``cfg.json`` that several formats write is that of the first."""
FORMATS: tuple[Format, ...] = (*WRITTEN_FORMATS, dictionary_learning, gemma_scope)
"""The first one that a folder contains is read."""
MARKER_FILES = tuple(dict.fromkeys(each.MARKER_FILE for each in FORMATS))
MISSING_MARKERS = f"no {', '.join(MARKER_FILES[:-1])} or {MARKER_FILES[-1]}"


def save_sae(
    folder: Path, coder: SparseCoder, metadata: SaeMetadata, skip_files: Collection[str] = ()
) -> dict[str, str]:
    """Write a coder of raw activations to ``folder`` in all formats that can hold it.

    ``cfg.json`` is written last, so a folder that contains one is complete. The weights in ``skip_files`` are not
    written. Returns {format: why it cannot hold the coder}.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SAE_CONFIG_FILE).unlink(missing_ok=True)
    # A save that was killed leaves temporary files.
    for left_over in (*folder.glob(".tmp*"), *folder.glob(".*.tmp")):
        left_over.unlink()
    reasons = {each.NAME: each.unsupported(coder) for each in WRITTEN_FORMATS}
    config: dict[str, Any] = {}
    for each in WRITTEN_FORMATS:
        is_supported = reasons[each.NAME] is None
        tensors = each.build_tensors(coder) if is_supported and each.WEIGHTS_FILE not in skip_files else {}
        if tensors:
            with atomic_replace(folder / each.WEIGHTS_FILE) as path:
                save_file({name: value.cpu().contiguous() for name, value in tensors.items()}, path)
        else:
            (folder / each.WEIGHTS_FILE).unlink(missing_ok=True)
        if is_supported:
            config = each.build_config(coder, metadata) | config
    write_json(folder / SAE_CONFIG_FILE, config)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def load_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata]:
    """Return (coder of raw activations, metadata) of the SAE in ``folder``, in any of the formats.

    Raises:
        SaetrainError: if ``folder`` contains no SAE, or if the SAE is damaged or its architecture is not supported.
    """
    for each in FORMATS:
        loaded = each.read_sae(folder)
        if loaded is not None:
            return loaded
    marker = next((name for name in MARKER_FILES if (folder / name).exists()), None)
    if marker is not None:
        others = [name for each in FORMATS if marker == each.MARKER_FILE for name in each.FILES if name != marker]
        raise SaetrainError(f"{folder}: contains {marker}, but none of {', '.join(dict.fromkeys(others))}")
    places = [str(place) for place in find_sae_folders(folder).values()][:3]
    hint = f"; SAEs were found in {', '.join(places)}" if places else ""
    raise SaetrainError(f"{folder}: contains no SAE ({MISSING_MARKERS}){hint}")


def find_sae_folders(folder: Path) -> dict[str, Path]:
    """Return {name: folder} of the SAEs in a run directory, or below a folder; ONLY_SAE names ``folder`` itself."""
    if any((folder / name).exists() for name in MARKER_FILES):
        return {ONLY_SAE: folder}
    # Unlike rglob, os.walk skips folders that cannot be read or that disappear.
    files = [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, names in os.walk(folder)
        for name in MARKER_FILES
        if name in names
    ]
    return {name: folder / place for name, place in group_saes(files).items()}


def group_saes(files: Iterable[str]) -> dict[str, str]:
    """Return {name: folder} of the SAEs in a list of relative paths; folders are relative too."""
    places = sorted({path.parent for path in map(PurePosixPath, files) if path.name in MARKER_FILES})
    if PurePosixPath(ONLY_SAE) in places:
        return {ONLY_SAE: ONLY_SAE}
    of_run = [place for place in places if place.parts[0] == SAES_DIR]
    inside = SAES_DIR if of_run else ONLY_SAE
    return {place.relative_to(inside).as_posix(): place.as_posix() for place in of_run or places}


def select_sae_files(names: Collection[str]) -> tuple[str, ...]:
    """Return the files of an SAE, in the first format that its folder, which contains ``names``, has."""
    present = {each: [name for name in each.FILES if name in names] for each in FORMATS if each.MARKER_FILE in names}
    # A marker alone is an SAE only if the format has no other file.
    complete = [files for each, files in present.items() if len(files) >= min(2, len(each.FILES))]
    return tuple(next(iter(complete or present.values())))
