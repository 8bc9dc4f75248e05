"""What the files of a run contain about one SAE: its configuration, the run's settings, and its assessment."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saetrain.interop.metadata import SaeMetadata
from saetrain.interop.schema import SAE_CONFIG_FILE, read_sae_config
from saetrain.runs.run_dir import ASSESSMENT_FILE, SAES_DIR, find_config_file
from saetrain.small_files import read_json_object, read_settings

REMEDY = "; write it again with `saetrain evaluate`"


@dataclass(frozen=True)
class SaeRecord:
    """The contents of the files of one SAE; ``assessment`` is None before the first evaluation.

    ``config``: cfg.json; ``settings``: its config.yaml; ``assessment``: final_assessment.json; ``judged``: the entry of
    the SAE in it.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    settings: dict[str, Any]
    assessment: dict[str, Any] | None
    judged: dict[str, Any] | None

    @property
    def metadata(self) -> SaeMetadata:
        """The metadata of the SAE."""
        return SaeMetadata.from_entry(self.folder / SAE_CONFIG_FILE, "saetrain", self.config.get("saetrain") or {})

    @property
    def coder(self) -> dict[str, Any]:
        """Architecture, sizes and settings of the SAE."""
        return (self.config.get("saetrain") or {}).get("coder") or self.config


def read_sae_record(run_dir: Path, folder: Path) -> SaeRecord:
    """Return the record of the SAE in ``folder``, with the newer one of its own assessment and that of its run.

    Raises SaetrainError if a file can't be read.
    """
    name = folder.relative_to(run_dir / SAES_DIR).as_posix()
    files = [path for path in (folder / ASSESSMENT_FILE, run_dir / ASSESSMENT_FILE) if path.exists()]
    newest = max(files, key=lambda path: path.stat().st_mtime_ns, default=None)
    assessment = read_json_object(newest, REMEDY) if newest is not None else None
    saes = assessment.get("saes", {}) if assessment is not None else {}
    # An evaluation of one SAE alone names it by its hookpoint.
    judged = saes.get(name) if newest is None or newest.parent == run_dir else next(iter(saes.values()), None)
    settings = read_settings(str(find_config_file(run_dir, name)), flag="")
    return SaeRecord(name, folder, read_sae_config(folder), settings, assessment if judged else None, judged)
