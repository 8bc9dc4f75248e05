"""More than a hundred kills, `make test-soak`: at random steps, and at moments of starting, resuming and saving."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from tests.integration.test_resume import (
    VARIANTS,
    calibrate_on_few_tokens,
    fingerprint,
    finish,
    kill_and_resume,
    last_checkpoint,
    records,
    start,
    steps_done,
    words_of,
)

pytestmark = pytest.mark.soak
STEPS = 6000
KILLS_AT_STEPS, KILLS_AT_TIMES = 13, 12
"""Of each run."""


@VARIANTS
def test_twenty_five_kills_change_no_bit(
    model: str, layers: str, source: list[str], request: pytest.FixtureRequest, tmp_path: Path, topics_jsonl: str
) -> None:
    words = words_of(request.getfixturevalue(model), layers, source, topics_jsonl)
    words += ["--max_tokens", str(STEPS * 128), "--save_every", "20"]
    run, generator = tmp_path / "killed", random.Random(layers)
    finish(start(tmp_path, "whole", words, calibrate_on_few_tokens))
    for _ in range(KILLS_AT_TIMES):
        before = last_checkpoint(run)
        process = start(tmp_path, "killed", [*words, "--resume"], calibrate_on_few_tokens)
        time.sleep(generator.uniform(0.1, 3.0))
        process.kill()
        process.wait()
        assert last_checkpoint(run) >= before
        assert steps_done(run) < STEPS, "the run ended before all kills: give it more steps"
    kill_and_resume(tmp_path, "killed", [*words, "--resume"], KILLS_AT_STEPS, seed=7, steps=STEPS)
    assert fingerprint(run) == fingerprint(tmp_path / "whole")
    assert records(run) == records(tmp_path / "whole")
