"""Load the SAEs below a path, and find the run that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.interop.load import load_any_format
from saetrain.interop.saetrain_format import CONFIG_FILE as SAE_CONFIG
from saetrain.runs.run_dir import CONFIG_FILE, SAES_DIR, is_run_dir


@dataclass(frozen=True)
class SavedSae:
    """A saved SAE: its coder, which takes raw activations, and its metadata."""

    folder: Path
    coder: TopK
    metadata: dict[str, Any]


@dataclass(frozen=True)
class LoadedSaes:
    """The SAEs below a path, {name: SAE}; ``run_dir``: the directory of their run, or None."""

    path: Path
    saes: dict[str, SavedSae]
    run_dir: Path | None

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of the first SAE; the SAEs of a run share all entries that an evaluation reads here."""
        return next(iter(self.saes.values())).metadata

    def get_metadata(self, key: str) -> Any:
        """Return an entry of :attr:`metadata`, or None if it is missing."""
        return self.metadata.get(key)


def load_saes(path: str) -> LoadedSaes:
    """Load every SAE below ``path``; SaetrainError if there is none, or if one is broken."""
    folder = Path(path)
    if not folder.is_dir():
        raise SaetrainError(f"{path}: there is no such folder; pass a run directory or the folder of one SAE")
    if (folder / SAE_CONFIG).exists():
        coder, metadata = load_any_format(folder)
        name = str(metadata.get("hookpoint") or metadata.get("hook_name") or folder.name)
        return LoadedSaes(folder, {name: SavedSae(folder, coder, metadata)}, find_run_dir(folder))
    inside = folder / SAES_DIR if (folder / SAES_DIR).is_dir() else folder
    folders = sorted(found.parent for found in inside.rglob(SAE_CONFIG))
    if not folders:
        unfinished = "; its run is not finished: continue it with --resume" if is_run_dir(folder) else ""
        raise SaetrainError(f"{path}: contains no SAE (no {SAE_CONFIG}){unfinished}")
    saes = {str(found.relative_to(inside)): SavedSae(found, *load_any_format(found)) for found in folders}
    first = next(iter(saes.values()))
    for name, sae in saes.items():
        for key in ("model", "model_weights_sha256"):
            if sae.metadata.get(key) != first.metadata.get(key):
                raise SaetrainError(
                    f"{path}: {name} was trained on {sae.metadata.get('model')} and {next(iter(saes))} on "
                    f"{first.metadata.get('model')}; evaluate each by its own folder"
                )
    return LoadedSaes(folder, saes, find_run_dir(folder))


def find_run_dir(folder: Path) -> Path | None:
    """Return the run directory that is ``folder`` or contains it, or None."""
    candidates = [folder.resolve(), *folder.resolve().parents[:3]]
    return next((place for place in candidates if is_run_dir(place) and (place / CONFIG_FILE).exists()), None)
