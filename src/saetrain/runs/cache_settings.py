"""Settings of ``saetrain cache``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from saetrain.activations.cache_files import CacheSettings, parse_size
from saetrain.settings import Settings
from saetrain.types import shown_default


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """Show, check or shrink the cache of activations that --cache_activations fills."""

    action: tyro.conf.Positional[Annotated[Literal["list", "verify", "prune"], tyro.conf.arg()]]
    """`list` shows what is stored, `verify` checks every file, `prune` deletes what was not used for longest."""
    cache_dir: Annotated[str | None, shown_default("~/.cache/saetrain/activations", "DIR")] = None
    """Folder of the cache."""
    cache_size: str = CacheSettings.cache_size
    """Size to which `prune` shrinks the cache, such as 500MB or 50GB; 0 deletes everything."""
    debug: bool = False
    """Show the traceback of an error."""

    def __post_init__(self) -> None:
        super().__post_init__()
        parse_size(self.cache_size)
