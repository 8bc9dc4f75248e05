"""A run that is killed and resumed ends as if nothing had happened, to the bit."""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from saetrain.runs.train import setup
from tests.processes import POLL_INTERVAL_S, ForkedCommand, finish

TAIL_BYTES = 20_000
"""More than the longest line of a metrics file here."""
SAVE_EVERY = 40
STEPS, SHORT_STEPS = 400, 200
SETTINGS = (
    f"--k 4 --num_latents 64 --batch_size 4 --ctx_len 32 --eval_tokens 600 --eval_every 90 --log_every 1 "
    "--assess false "
    f"--max_tokens {STEPS * 128} --save_every {SAVE_EVERY} --buffer_tokens 4096 --dead_window_tokens 2000"
)


def calibrate_on_few_tokens() -> None:
    """Measure the normalizers on fewer tokens, because the model reads those one sequence at a time."""
    setup.CALIBRATION_TOKENS = 1024


def start(
    out: Path, name: str, words: Sequence[str], prepare: Callable[[], object] | None = None, **environment: str
) -> ForkedCommand:
    """Start the command line in a process, in which ``prepare`` is called before."""
    return ForkedCommand([*words, "--save_dir", str(out), "--run_name", name], environment, prepare=prepare)


def steps_done(run: Path) -> int:
    """Return the last step in the metrics file, counting whole lines only."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return 0
    with open(path, "rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().split(b"\n")[:-1]
    return int(json.loads(lines[-1])["step"]) if lines else 0


def wait_for_step(process: ForkedCommand, run: Path, step: int) -> None:
    """Wait until the metrics file contains ``step``."""
    while steps_done(run) < step:
        assert process.poll() is None, process.read_output()
        time.sleep(POLL_INTERVAL_S)


def last_checkpoint(run: Path) -> int:
    return max((int(path.name[5:]) for path in (run / "checkpoints").glob("step_*")), default=0)


def fingerprint(run: Path) -> dict[str, str]:
    """Hash of every weight file that the run left."""
    files = sorted((run / "sae").rglob("*.safetensors"))
    assert files
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def records(run: Path) -> list[dict[str, Any]]:
    """The metrics without timing figures."""
    out = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for record in out:
        record.pop("tokens_per_second", None)
        for metrics in record["saes"].values():
            metrics.pop("step_ms", None)
    return out


def kill_and_resume(out: Path, name: str, words: Sequence[str], kills: int, seed: int, steps: int) -> None:
    """Kill the run ``kills`` times at random steps, all but the first behind a checkpoint, and let it end."""
    run, generator = out / name, random.Random(seed)
    begin = partial(start, out, name, prepare=calibrate_on_few_tokens)
    process = begin(words)
    reached = behind_a_checkpoint = 0
    for number in range(kills):
        low = max(reached, SAVE_EVERY + 2 if number else 1)
        target = generator.randint(low, low + max(1, (steps - low) // (kills - number + 1)))
        wait_for_step(process, run, target)
        time.sleep(generator.random() * 0.05)
        process.kill()
        process.wait()
        reached, saved = steps_done(run), last_checkpoint(run)
        assert reached < steps
        process = begin([*words, "--resume"])
        if saved == 0:
            continue
        behind_a_checkpoint += 1
        resumed = int(process.wait_for_match(r"resumed from \S+ at step (\d+)")[1])
        # The folder may hold a newer checkpoint than the one seen, never an older one.
        assert resumed >= saved > 0
        assert reached - resumed <= SAVE_EVERY, "no more than save_every steps may be lost"
    assert behind_a_checkpoint >= kills - 1
    finish(process)


def words_of(model: str, layers: str, source: list[str], text: str) -> list[str]:
    """The command line of a variant."""
    texts = [text] * (2 if "--mix" in source else 1)
    return [model, *texts, *SETTINGS.split(), "--layers", *layers.split(), *source]


VARIANTS = pytest.mark.parametrize(
    ("model", "layers", "source"),
    [
        pytest.param(
            "tiny_bert",
            "2",
            ["--lr", "auto", "--dead_window_tokens", "256"],
            id="encoder-one-layer",
            marks=pytest.mark.soak,
        ),
        pytest.param(
            "tiny_gpt2",
            "0 2",
            ["--lr", "0.02", "--dead_window_tokens", "256", "--auxk_alpha", "0.03125"],
            id="decoder-two-layers",
        ),
        pytest.param("tiny_gpt2", "2", ["--streaming"], id="decoder-one-layer-streaming", marks=pytest.mark.soak),
        pytest.param(
            "tiny_bert",
            "0 2",
            ["--streaming", "--mix", "2", "1", "--data_shards", "4"],
            id="encoder-two-layers-streaming-mixed",
        ),
        pytest.param(
            "tiny_bert",
            "2",
            ["--batch_size", "2", "--grad_acc_steps", "2", "--init_seeds", "1", "2", "--optimizer", "sgd"],
            id="encoder-two-seeds-two-micro-steps-sgd",
        ),
    ],
)


@VARIANTS
def test_killed_at_random_moments_it_ends_with_the_same_bits(
    model: str, layers: str, source: list[str], request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    text = request.getfixturevalue("few_topics_jsonl" if "--streaming" in source else "topics_jsonl")
    words = [*words_of(request.getfixturevalue(model), layers, source, text), "--max_tokens", str(SHORT_STEPS * 128)]
    whole = start(tmp_path, "whole", words, calibrate_on_few_tokens)
    kill_and_resume(tmp_path, "killed", words, kills=2, seed=len(layers), steps=SHORT_STEPS)
    finish(whole)
    assert fingerprint(tmp_path / "killed") == fingerprint(tmp_path / "whole")
    assert records(tmp_path / "killed") == records(tmp_path / "whole")
    train = [r for r in records(tmp_path / "killed") if r["kind"] == "train"]
    assert [r["step"] for r in train] == list(range(1, SHORT_STEPS + 1))
    dead = max(sae["dead_not_fired"] for r in train for sae in r["saes"].values())
    assert dead > 0 or "--dead_window_tokens" not in source, "no latent's bias was lifted"
