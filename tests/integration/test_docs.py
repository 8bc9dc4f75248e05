"""README and docs say what is so: their commands and Python blocks run, their flags, links and figures exist."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser as torchrun_parser

from saetrain.cli import main
from saetrain.coders import CODERS
from saetrain.config import CompareConfig, EvaluateConfig, FeaturesConfig, PushConfig, config_class, flag_types
from saetrain.explore.settings import ExploreConfig

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
STARTS = (["python", "-m", "saetrain"], ["saetrain"])
TOKENS = ["--max_tokens", "512", "--batch_size", "2", "--ctx_len", "64", "--eval_tokens", "512"]
SMALL = [*TOKENS, "--buffer_tokens", "2048", "--device", "cpu"]
"""Appended to each command: of a flag that is given twice the last one counts."""
LATENTS = ["--num_latents", "256"]
OTHER_LIBRARIES = ("sae_lens", "sparsify")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(page: Path, *languages: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", page.read_text(), re.DOTALL | re.MULTILINE)
    return [content for language, content in fenced if language in languages]


def commands(page: Path) -> list[list[str]]:
    """Words behind the program's name, of each command that is ours."""
    lines = [line for block in blocks(page, "bash", "console") for line in block.replace("\\\n", " ").splitlines()]
    found = []
    for line in lines:
        words = shlex.split(line.removeprefix("$ "), comments=True)
        found += [words[len(start) :] for start in STARTS if words[: len(start)] == start]
    return found


@contextlib.contextmanager
def workplace(folder: Path, bert: str, gpt2: str, topics: list[str]) -> Iterator[None]:
    """A working directory with models and texts of the names that the pages use."""
    import datasets

    shutil.copytree(bert, folder / "bert-base-uncased")
    shutil.copytree(gpt2, folder / "gpt2")
    (folder / "wikitext").mkdir()
    rows = [part for text in topics[:30] for part in text.split("\n\n") if part.strip()]
    datasets.Dataset.from_dict({"text": rows}).to_parquet(folder / "wikitext" / "train-00000-of-00001.parquet")
    (folder / "texts.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run_page(page: Path, libraries: bool) -> list[str]:
    """Run a page's commands, then its Python blocks in one namespace; gives what the blocks print."""
    for words in commands(page):
        if words[0] in ("tokenize", "compare", "push"):
            main(words)
            continue
        if words[0] == "evaluate":
            main([*words, "--loss_tokens", "256", "--bootstrap", "10", "--device", "cpu"])
            continue
        if words[0] == "features":
            main([*words, "--device", "cpu"])
            continue
        size = [] if {"--expansion_factor", "--config", "--help"} & set(words) else LATENTS
        main([*words, *size, *SMALL])
    printed = []
    namespace: dict[str, object] = {}
    for block in blocks(page, "python"):
        if any(library in block for library in OTHER_LIBRARIES) == libraries:
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(block, named(page), "exec"), namespace)
            printed.append(out.getvalue())
            if libraries:
                assert hasattr(namespace["sae"], "W_dec")
    return printed


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=named)
def test_commands_and_python_blocks_run(
    page: Path, tmp_path: Path, tiny_bert: str, tiny_gpt2: str, topics: list[str]
) -> None:
    with workplace(tmp_path, tiny_bert, tiny_gpt2, topics):
        printed = run_page(page, libraries=False)
        finished = list(tmp_path.glob("output/*/sae/**/cfg.json"))
    assert finished
    if page.name == "README.md":
        assert len(finished) == 13, finished  # one layer, then twelve; the dry run leaves nothing
        assert "'[CLS]', 'the', 'cat'" in printed[0]


def test_readme_shows_the_files_that_a_run_leaves(
    tmp_path: Path, tiny_bert: str, tiny_gpt2: str, topics: list[str]
) -> None:
    page = ROOT / "README.md"
    tree = next(block for block in blocks(page, "") if "metrics.jsonl" in block)
    folder = re.match(r"output/(\S+)/\n", tree)
    assert folder is not None
    with workplace(tmp_path, tiny_bert, tiny_gpt2, topics):
        main([*commands(page)[0], *SMALL])
        left = {path.name for path in (tmp_path / "output" / folder[1]).rglob("*")}
    shown = {line.split()[0].rstrip("/").rsplit("/", 1)[-1] for line in tree.splitlines()[1:]}
    assert {name for name in shown if not name.startswith("step_")} <= left, left


@pytest.mark.interop
def test_blocks_of_other_libraries_run(tmp_path: Path, tiny_bert: str, tiny_gpt2: str, topics: list[str]) -> None:
    with workplace(tmp_path, tiny_bert, tiny_gpt2, topics):
        run_page(ROOT / "README.md", libraries=True)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_flags_exist(page: Path) -> None:
    lines = page.read_text().splitlines()
    # Flags of pip, of the benchmark, of torchrun and of SLURM are not ours.
    text = "\n".join(
        line for line in lines if not line.startswith(("pip ", "benchmarks/")) and "-m benchmarks" not in line
    )
    known = {
        *flag_types(config_class("topk")),
        *flag_types(EvaluateConfig),
        *flag_types(CompareConfig),
        *flag_types(FeaturesConfig),
        *flag_types(PushConfig),
        *flag_types(ExploreConfig),
        *(name for coder in CODERS.values() for name in flag_types(coder.Settings)),
        "config",
        "grid",
        "help",
        "version",
    }
    known |= {action.dest for action in torchrun_parser()._actions} | {"nodes"}
    used = {flag.replace("-", "_") for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", text)}
    assert used <= known, used - known


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_relative_links_exist(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


def test_defaults_in_the_readme_are_the_real_ones() -> None:
    from saetrain.cli import parse_train
    from saetrain.config import to_flat

    real = to_flat(parse_train(["model", "dataset"]))
    table = re.findall(r"^\| `--(\w+)` \| ([^|]+) \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert table
    for flag, shown in table:
        if isinstance(real.get(flag), (int, float)) and not isinstance(real[flag], bool):
            assert float(shown) == real[flag], flag


def test_every_logged_figure_is_defined(tmp_path: Path, tiny_bert: str, tiny_gpt2: str, topics: list[str]) -> None:
    page = (ROOT / "docs" / "metrics.md").read_text()
    command = ["bert-base-uncased", "wikitext", "--k", "4", "--dead_window_tokens", "128", "--log_every", "1"]
    command += ["--auxk_alpha", "0.03125"]
    with workplace(tmp_path, tiny_bert, tiny_gpt2, topics):
        main([*command, *SMALL, *LATENTS, "--run_name", "run"])
        lines = [json.loads(line) for line in (tmp_path / "output/run/metrics.jsonl").read_text().splitlines()]
        about = json.loads((tmp_path / "output/run/sae/encoder.layer.0/cfg.json").read_text())["saetrain"]
    logged = {name for line in lines for figures in line["saes"].values() for name in figures}
    logged |= {name for line in lines for name in line if name not in ("kind", "step", "saes")}
    assert "loss_auxk" in logged
    assert {name for name in logged if f"`{name}`" not in page} == set()
    output = (ROOT / "docs" / "output.md").read_text()
    assert {name for name in about if f"`{name}`" not in output} == set()
