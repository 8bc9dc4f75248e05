"""Grids on the command line and in files: which SAEs they name, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from saetrain.cli import parse_train
from saetrain.config import RunConfig, from_flat, to_flat
from saetrain.errors import SaetrainError
from saetrain.grid import expand_grid

BASE = ["model", "data"]


def expand(*words: str) -> dict[str, RunConfig]:
    """Return the SAEs of a command line; those of the settings file that the run would write must be the same."""
    config = parse_train([*BASE, *words])
    saes = expand_grid(config)
    assert expand_grid(from_flat(to_flat(config), "here")) == saes
    return saes


def test_several_values_are_combined_and_names_show_what_differs() -> None:
    saes = expand("--k", "16", "32", "--architecture", "topk", "batchtopk", "--init_seeds", "1", "2", "--lr", "auto")
    assert list(saes)[:3] == ["topk_k16_seed1", "topk_k16_seed2", "batchtopk_k16_seed1"]
    assert len(saes) == 8
    single = saes["batchtopk_k32_seed2"]
    assert (single.architecture, single.sae.k, single.optim.lr, single.train.init_seeds, single.grid) == (
        "batchtopk",
        32,
        "auto",
        (2,),
        (),
    )
    assert type(single.sae).__name__ == "BatchTopKSettings"


def test_rates_and_sizes_make_a_grid() -> None:
    assert list(expand("--num_latents", "256", "512", "--lr", "auto", "1e-3")) == [
        "f256_lrauto",
        "f256_lr0.001",
        "f512_lrauto",
        "f512_lr0.001",
    ]
    assert list(expand("--expansion_factor", "2", "4")) == ["x2", "x4"]


def test_without_several_values_the_first_seed_has_no_name() -> None:
    assert list(expand()) == [""]
    assert list(expand("--init_seeds", "3", "4")) == ["", "seed4"]


def test_a_flag_applies_to_the_architectures_that_have_it() -> None:
    flags = ["--architecture", "topk", "matryoshka", "--prefixes", "0.5", "1", "--auxk_alpha", "0.1"]
    saes = expand(*flags)
    assert saes["matryoshka"].sae.prefixes == (0.5, 1.0)  # type: ignore[attr-defined]
    assert {name: to_flat(each)["auxk_alpha"] for name, each in saes.items()} == {"topk": 0.1, "matryoshka": 0.1}
    assert "prefixes" not in to_flat(saes["topk"])
    with pytest.raises(SaetrainError, match="--prefixes: a flag of --architecture matryoshka only"):
        expand("--architecture", "topk", "jumprelu", "--prefixes", "0.5", "1")


def test_flags_may_precede_the_positionals() -> None:
    config = parse_train(["--architecture", "topk", "batchtopk", "model", "data", "--k", "8", "16"])
    assert (config.model, config.dataset, len(config.grid)) == ("model", ("data",), 4)
    config = parse_train(["--k", "8", "16", "model", "data"])
    assert (config.model, config.dataset, len(config.grid)) == ("model", ("data",), 2)
    config = parse_train(["model", "--architecture", "topk", "data", "--lr", "auto", "1e-3"])
    assert (config.model, config.dataset, len(config.grid)) == ("model", ("data",), 2)


@pytest.fixture
def grid_file(tmp_path: Path) -> Path:
    path = tmp_path / "grid.yaml"
    path.write_text("grid:\n- {architecture: jumprelu, k: 16}\n- {k: 32, lr: auto}\n- {k: 8, expansion_factor: 4}\n")
    return path


def test_a_file_lists_saes_by_hand(grid_file: Path) -> None:
    saes = expand("--grid", str(grid_file), "--num_latents", "256", "--k", "4")
    assert list(saes) == ["jumprelu_f256_k16_lr0.001", "topk_f256_k32_lrauto", "topk_x4_k8_lr0.001"]
    assert saes["topk_x4_k8_lr0.001"].sae.num_latents is None


def test_the_settings_file_of_a_run_holds_its_grid(tmp_path: Path, grid_file: Path) -> None:
    from saetrain.config import write_yaml

    config = parse_train([*BASE, "--grid", str(grid_file)])
    write_yaml(tmp_path / "config.yaml", config)
    again = parse_train(["--config", str(tmp_path / "config.yaml")])
    assert expand_grid(again) == expand_grid(config)
    for words in (["--k", "1", "2"], ["--grid", str(grid_file)]):
        with pytest.raises(SaetrainError, match=r"config.yaml: has a grid already; pass one value per flag"):
            parse_train(["--config", str(tmp_path / "config.yaml"), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--k 16 16", "--k 16 16: has a value twice; give different values"),
        ("--k 16 0", "--k 0: must be at least 1"),
        ("--architecture topk jumprel", "--architecture jumprel: no such architecture. Did you mean jumprelu?"),
        ("--architecture topk gated", "--architecture gated: saetrain reads and evaluates such SAEs"),
        ("--num_latents 8 16 --expansion_factor 2", "can't be given together"),
        ("--k 8 16 --loss_fn ce", "--loss_fn ce with 2 SAEs per hookpoint: each SAE needs its own forward"),
        ("--max_tokens 8 16", "--max_tokens 8 16: takes one number"),
        ("--lr auto 1e-3 --optimizer sgd", "--lr auto: the rule is for adam"),
    ],
)
def test_grids_that_make_no_sense_are_refused(words: str, message: str) -> None:
    with pytest.raises(SaetrainError) as caught:
        expand(*words.split())
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- {k: 3}\n", "must contain lines of the form 'setting: value'"),
        ("grid: []\n", "must contain 'grid:' and a list of SAEs, and nothing else"),
        ("grid: 3\n", "must contain 'grid:' and a list of SAEs, and nothing else"),
        ("grid:\n- {k: 3}\nk: 4\n", "must contain 'grid:' and a list of SAEs, and nothing else"),
        ("grid:\n- 3\n", "SAE 1 has 3; it can have values of architecture, num_latents"),
        ("grid:\n- {k: 3}\n- {max_tokens: 3}\n", "SAE 2 has 'max_tokens'; it can have values of"),
        ("grid:\n- {k: many}\n", "k: found 'many', must be a whole number"),
        ("grid:\n- {k: 3, num_latents: 8, expansion_factor: 2}\n", "SAE 1 has both num_latents and expansion_factor"),
        ("grid:\n- {architecture: nets}\n", "--architecture nets: no such architecture"),
        ("grid:\n- {architecture: my_code:Coder}\n", "your own code is not imported because a file names it"),
        ("grid:\n- {k: 3}\n- {k: 3}\n", "the grid has the same SAE twice (all settings are equal); remove one"),
        ("grid:\n- {k: 3}\n- {k: 4}\n- {k: 3}\n", "the grid has the same SAE twice (k3); remove one"),
    ],
)
def test_grid_files_that_make_no_sense_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "grid.yaml"
    path.write_text(text)
    with pytest.raises(SaetrainError) as caught:
        expand("--grid", str(path))
    assert message in str(caught.value)


def test_a_settings_file_can_differ_only_in_settings_of_a_grid(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("model: m\ndataset: d\ngrid:\n- {max_tokens: 3}\n")
    with pytest.raises(SaetrainError, match="grid: 'max_tokens' can't differ between the SAEs of a run"):
        parse_train(["--config", str(path)])


def test_a_missing_grid_file_is_named() -> None:
    with pytest.raises(SaetrainError, match=r"--grid: the file is missing; pass --grid FILE\.yaml"):
        parse_train([*BASE, "--grid"])
    with pytest.raises(SaetrainError, match=r"--grid nowhere\.yaml: can't be read"):
        parse_train([*BASE, "--grid", "nowhere.yaml"])
