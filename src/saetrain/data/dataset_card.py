"""The YAML that describes a data set, checked before the library `datasets` reads it without limits."""

from __future__ import annotations

import re
from pathlib import Path

from saetrain.errors import SaetrainError
from saetrain.small_files import MAX_JSON_BYTES, parse_yaml, read_small_file

MAX_CARD_BYTES = 1_000_000
"""Limit of the YAML that describes a data set; some on the hub have hundreds of configurations."""
CARD_FILES = ("README.md", ".huggingface.yaml")
"""Files with YAML that the library `datasets` reads in the folder of a data set."""


def check_dataset_card(folder: Path) -> None:
    """Raise SaetrainError if YAML that `datasets` reads in the folder of a data set is not valid or not allowed."""
    for name in CARD_FILES:
        if (folder / name).exists():
            label = f"{folder / name}"
            text = read_small_file(folder / name, label, MAX_JSON_BYTES)
            parts = re.split(rb"^---[ \t\r]*$", text, maxsplit=2, flags=re.MULTILINE)
            if name.endswith(".yaml"):
                parse_yaml(_require_card_size(text, label), label)
            elif len(parts) == 3 and not parts[0].strip():
                parse_yaml(_require_card_size(parts[1], label), f"{label}: the front matter")


def _require_card_size(text: bytes, label: str) -> bytes:
    if len(text) > MAX_CARD_BYTES:
        raise SaetrainError(f"{label}: its YAML is larger than {MAX_CARD_BYTES:,} bytes")
    return text


def check_remote_card(path: str) -> None:
    """Download the YAML that describes data set ``path`` on the hub, and check it before `datasets` reads it."""
    from huggingface_hub import snapshot_download

    try:
        folder = snapshot_download(path, repo_type="dataset", allow_patterns=list(CARD_FILES))
    except Exception:  # the libraries raise many unrelated types; what loads the data set reports the cause
        return
    check_dataset_card(Path(folder))
