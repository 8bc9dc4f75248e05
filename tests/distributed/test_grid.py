"""A grid on two ranks: each SAE has the bits of a run on two ranks that trains it alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.conftest import STEPS, Launcher, bits, records, same_run

GRID = "--layers 0 2 --architecture topk batchtopk jumprelu --init_seeds 1 2"


def select(found: dict[str, str], point: str) -> dict[str, str]:
    """Return the entries of one point of the grid, with the names of a run that trains it alone."""
    return {name.replace(f"/{point}/", "/"): value for name, value in found.items() if f"/{point}/" in name}


@pytest.mark.parametrize("parallel", ["data", "hookpoints"])
def test_an_sae_of_a_grid_on_two_ranks_has_the_bits_of_a_run_alone(
    parallel: str, launcher: Launcher, topics_jsonl: str, tiny_bert: str, tmp_path: Path
) -> None:
    words = [tiny_bert, topics_jsonl, *GRID.split(), "--max_tokens", str(STEPS * 128), "--batch_size"]
    grid = launcher.run(2, "grid", [*words, "2", "--parallel", parallel])
    point = "batchtopk_seed2"
    settings = grid / "sae" / "encoder.layer.2" / point / "config.yaml"
    alone = launcher.run(2, "alone", ["--config", str(settings)])
    assert select(bits(grid), point) == bits(alone)
    one = launcher.run(1, "one", [*words, "4"])
    same_run(one, grid)


def test_the_seeds_of_one_site_are_placed_on_several_ranks(
    launcher: Launcher, topics_jsonl: str, tiny_bert: str
) -> None:
    words = [tiny_bert, topics_jsonl, "--layers", "1", "--k", "2", "4", "--init_seeds", "1", "2"]
    words += ["--max_tokens", str(STEPS * 128), "--batch_size", "2", "--parallel", "hookpoints", "--save_every", "15"]
    ranks = launcher.start(2, "placed", words)
    ranks.finish()
    run = launcher.folder / "placed"
    assert len([line for line in records(run) if line["kind"] == "train"][-1]["saes"]) == 4
    before = bits(run)
    (run / "sae").rename(run / "before")
    (run / "checkpoints" / f"step_{STEPS:09d}").rename(launcher.folder / "gone")
    assert f"at step 15 of {STEPS}" in launcher.start(2, "placed", [*words, "--resume"]).finish()
    assert bits(run) == before
