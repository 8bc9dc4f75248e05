"""Grids: several values of a few settings, whose combinations are trained as several SAEs in one run.

The settings of a run hold a grid as a list of points. A point has the settings in which its SAE differs from the run's
own settings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from saetrain.config import RunConfig, config_class, from_flat, setting_types, settings_sections, to_flat
from saetrain.errors import SaetrainError
from saetrain.untrusted import show_text, show_value

GRID_FLAGS: dict[str, Callable[[Any], str]] = {
    "architecture": lambda value: str(value).rpartition(":")[2],
    "num_latents": "f{}".format,
    "expansion_factor": "x{}".format,
    "k": "k{}".format,
    "lr": "lr{}".format,
    "init_seeds": lambda value: f"seed{value[0]}",
}
"""{setting that may have several values: function from a value to its part of an SAE's name}."""


def join_configs(configs: Sequence[RunConfig]) -> RunConfig:
    """Return the settings of a run that trains an SAE for each of ``configs``, which differ only in such settings.

    The result has the values of the first, and a grid with a point for each.
    """
    base, flats = configs[0], [to_flat(config) for config in configs]
    if len(configs) == 1:
        return base
    shown = {name for name in GRID_FLAGS if any(flat[name] != flats[0][name] for flat in flats)}
    points = []
    for config, flat in zip(configs, flats, strict=True):
        # Settings of an architecture that the first one does not have are compared with their defaults.
        before = {**dataclasses.asdict(config.coder_class.Settings()), **flats[0]}
        points.append({name: value for name, value in flat.items() if name in shown or value != before[name]})
    return dataclasses.replace(base, grid=tuple(points))


def apply_point(config: RunConfig, point: Mapping[str, Any], origin: str = "grid") -> RunConfig:
    """Return ``config`` with the settings of a point, and without a grid; errors name ``origin``."""
    cls = config_class(str(point.get("architecture", config.architecture)))
    allowed = {*GRID_FLAGS, *(item.name for item in dataclasses.fields(settings_sections(cls)["sae"]))}
    for name in point:
        if name not in allowed:
            raise SaetrainError(f"{origin}: '{show_text(name)}' can't differ between the SAEs of a run")
    flat = {name: value for name, value in to_flat(config).items() if name in setting_types(cls)}
    if point.get("expansion_factor") is not None:
        flat["num_latents"] = None
    return from_flat({**flat, "grid": [], **point}, origin)


def parse_points(values: Mapping[str, Any], origin: str) -> list[dict[str, Any]]:
    """Return the points of a grid file, ``grid:`` and a list; raise SaetrainError that names ``origin`` otherwise."""
    points = values.get("grid")
    if set(values) != {"grid"} or not isinstance(points, list) or not points:
        raise SaetrainError(f"{origin}: must contain 'grid:' and a list of SAEs, and nothing else")
    for number, point in enumerate(points, 1):
        unknown = [name for name in point if name not in GRID_FLAGS] if isinstance(point, dict) else [point]
        if unknown:
            raise SaetrainError(
                f"{origin}: SAE {number} has {show_value(unknown[0])}; it can have values of {', '.join(GRID_FLAGS)}"
            )
        if point.get("num_latents") is not None and point.get("expansion_factor") is not None:
            raise SaetrainError(f"{origin}: SAE {number} has both num_latents and expansion_factor; choose one")
    return points


def expand_grid(config: RunConfig) -> dict[str, RunConfig]:
    """Return {name: settings of one SAE} of all SAEs that a run trains per site; the settings reproduce it alone.

    A name has the settings in which the SAEs differ. Without a grid, the SAE of the first seed has an empty name.
    Raises SaetrainError if two SAEs are the same.
    """
    points = [apply_point(config, point) for point in config.grid] or [config]
    singles = [
        dataclasses.replace(point, train=dataclasses.replace(point.train, init_seeds=(seed,)))
        for point in points
        for seed in point.train.init_seeds
    ]
    names = _name_configs(singles)
    if not config.grid:
        names[0] = ""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise SaetrainError(f"the grid has the same SAE twice ({twice or 'all settings are equal'}); remove one")
    if len(singles) > 1 and config.train.end_to_end:
        raise SaetrainError(
            f"--loss_fn {config.train.loss_fn} with {len(singles)} SAEs per hookpoint: each SAE needs its own forward "
            "and backward pass of the model, so the SAEs would share nothing; start one run per SAE"
        )
    return dict(zip(names, singles, strict=True))


def _name_configs(configs: Sequence[RunConfig]) -> list[str]:
    flats = [to_flat(config) for config in configs]
    for flat in flats:
        if flat["num_latents"] is not None:
            flat["expansion_factor"] = None
    varying = [name for name in GRID_FLAGS if len({str(flat[name]) for flat in flats}) > 1]
    return ["_".join(GRID_FLAGS[name](flat[name]) for name in varying if flat[name] is not None) for flat in flats]
