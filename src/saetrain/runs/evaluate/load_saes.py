"""Load the SAEs below a path, and find the run that they belong to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from saetrain.coders import SparseCoder
from saetrain.errors import SaetrainError
from saetrain.interop.formats import load_sae
from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE
from saetrain.runs.run_dir import CONFIG_FILE, SAES_DIR, is_run_dir


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
        """Metadata of the first SAE; the SAEs of a run share all entries that an evaluation reads here."""
        return next(iter(self.saes.values())).metadata


def load_saes(path: str) -> LoadedSaes:
    """Load every SAE below ``path``; SaetrainError if there is none, or if one is broken."""
    folder = Path(path)
    if not folder.is_dir():
        raise SaetrainError(f"{path}: there is no such folder; pass a run directory or the folder of one SAE")
    if (folder / SAE_CONFIG_FILE).exists():
        sae = _load_saved_sae(folder)
        name = sae.metadata.hookpoint or sae.metadata.hook_name or folder.name
        return LoadedSaes(folder, {name: sae}, find_run_dir(folder))
    inside = folder / SAES_DIR if (folder / SAES_DIR).is_dir() else folder
    folders = sorted(found.parent for found in inside.rglob(SAE_CONFIG_FILE))
    if not folders:
        unfinished = "; its run is not finished: continue it with --resume" if is_run_dir(folder) else ""
        raise SaetrainError(f"{path}: contains no SAE (no {SAE_CONFIG_FILE}){unfinished}")
    saes = {str(found.relative_to(inside)): _load_saved_sae(found) for found in folders}
    first_name, first = next((name, sae.metadata) for name, sae in saes.items())
    for name, sae in saes.items():
        own = sae.metadata
        if (own.model, own.model_weights_sha256) != (first.model, first.model_weights_sha256):
            raise SaetrainError(
                f"{path}: {name} was trained on {own.model} and {first_name} on {first.model}; evaluate each by its "
                "own folder"
            )
    return LoadedSaes(folder, saes, find_run_dir(folder))


def _load_saved_sae(folder: Path) -> SavedSae:
    coder, metadata = load_sae(folder)
    return SavedSae(folder, coder, metadata)


def find_run_dir(folder: Path) -> Path | None:
    """Return the run directory that is ``folder`` or contains it, or None."""
    candidates = [folder.resolve(), *folder.resolve().parents[:3]]
    return next((place for place in candidates if is_run_dir(place) and (place / CONFIG_FILE).exists()), None)
