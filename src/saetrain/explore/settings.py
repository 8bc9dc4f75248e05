"""Settings of ``saetrain explore``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

import tyro

from saetrain.activations.model import ModelSettings
from saetrain.settings import Range, Settings
from saetrain.types import shown_default

DEFAULT_PORT = 8765


@dataclass(frozen=True, kw_only=True)
class ExploreConfig(Settings):
    """Serve the report of RUN on this machine, with a view that runs the model and its SAEs on your prompts."""

    run: tyro.conf.Positional[Annotated[str, tyro.conf.arg(metavar="RUN")]]
    """Directory of a finished run."""
    port: Annotated[
        Annotated[int, Range(0, 65535)] | None, shown_default(f"{DEFAULT_PORT}, or the next free one", "INT")
    ] = None
    """Port on 127.0.0.1; 0 selects any free one."""
    model: Annotated[str | None, shown_default("the SAE's", "MODEL")] = None
    """Hub id or local folder of the model, if the SAE does not name it or if it has moved."""
    base: ModelSettings = field(default_factory=ModelSettings)
    debug: bool = False
    """Show the traceback of an error."""
