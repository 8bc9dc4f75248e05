"""The SAEs of a run: one per site and point of the grid, each with the settings that reproduce it alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from saetrain.config import RunConfig
from saetrain.errors import SaetrainError
from saetrain.grid import expand_grid
from saetrain.types import Site


@dataclass(frozen=True)
class SaePlan:
    """An SAE of a run: ``site``, and ``config``, the settings of a run that trains this SAE without a grid."""

    site: Site
    config: RunConfig

    @property
    def seed(self) -> int:
        """Seed of the initial weights."""
        (seed,) = self.config.train.init_seeds
        return seed


def plan_saes(config: RunConfig, hookpoints: Sequence[str]) -> dict[str, SaePlan]:
    """Return {SAE: its plan} of a run over ``hookpoints``, which its flags select.

    Raises SaetrainError if two architectures reconstruct the same activations from different ones.
    """
    plans: dict[str, SaePlan] = {}
    sites: dict[str, Site] = {}
    configs = expand_grid(config)
    for point, single in configs.items():
        for site in single.coder_class.build_sites(hookpoints):
            if sites.setdefault(site.name, site) != site:
                raise SaetrainError(
                    f"--architecture: two architectures reconstruct {site.name} from different activations "
                    f"({site.x_name} and {sites[site.name].x_name}); start one run for each"
                )
            plans[f"{site.name}/{point}" if point else site.name] = SaePlan(site, single)
    # The SAEs of a site follow one another, because they share its activations.
    order = list(sites)
    return dict(sorted(plans.items(), key=lambda item: order.index(item[1].site.name)))
