"""The formats of saved SAEs, and the one function each that saves and loads an SAE."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

from saetrain.atomic_io import atomic_replace, write_json
from saetrain.coders import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.interop import saelens, saetrain_format, sparsify
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, read_sae_config


class Format(Protocol):
    """A format of saved SAEs; each is a module. The formats in one folder share ``cfg.json``."""

    NAME: str
    WEIGHTS_FILE: str

    def unsupported(self, coder: SparseCoder) -> str | None:
        """Return why the format cannot hold a coder, or None if it can."""

    def build_config(self, coder: SparseCoder, metadata: SaeMetadata) -> dict[str, Any]:
        """Return the format's keys of ``cfg.json``."""

    def write_weights(self, path: Path, coder: SparseCoder) -> None:
        """Write the weights to ``path``, which becomes WEIGHTS_FILE."""

    def read_sae(self, folder: Path, config: Mapping[str, Any]) -> tuple[SparseCoder, SaeMetadata] | None:
        """Return (coder of raw activations, metadata), or None if ``folder`` contains no SAE in this format.

        ``config``: contents of ``cfg.json``. Raises SaetrainError if the SAE is damaged or not supported.
        """


FORMATS: tuple[Format, ...] = (saetrain_format, saelens, sparsify)
"""The first one that a folder contains is read. A key or file that several formats write is that of the first."""


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
    reasons = {each.NAME: each.unsupported(coder) for each in FORMATS}
    supported = [each for each in FORMATS if reasons[each.NAME] is None]
    writers = {each.WEIGHTS_FILE: each for each in reversed(supported) if each.WEIGHTS_FILE not in skip_files}
    for file in {each.WEIGHTS_FILE for each in FORMATS} - writers.keys():
        (folder / file).unlink(missing_ok=True)
    for file, each in writers.items():
        with atomic_replace(folder / file) as path:
            each.write_weights(path, coder)
    config: dict[str, Any] = {}
    for each in supported:
        config = each.build_config(coder, metadata) | config
    write_json(folder / SAE_CONFIG_FILE, config)
    return {name: reason for name, reason in reasons.items() if reason is not None}


def load_sae(folder: Path) -> tuple[SparseCoder, SaeMetadata]:
    """Return (coder of raw activations, metadata) of the SAE in ``folder``, in any of the formats.

    Raises:
        SaetrainError: if ``folder`` contains no SAE, or if the SAE is damaged or its architecture is not supported.
    """
    config = read_sae_config(folder)
    for each in FORMATS:
        loaded = each.read_sae(folder, config)
        if loaded is not None:
            return loaded
    raise SaetrainError(f"{folder}: contains neither {saelens.WEIGHTS_FILE} nor {sparsify.WEIGHTS_FILE}")
