"""A run ends with its page, unless a flag refuses it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from saetrain.cli import main
from tests.report.conftest import OpenedPage

WORDS = "--layers 1 --k 4 --num_latents 64 --batch_size 2 --ctx_len 32 --eval_tokens 300 --max_tokens 640 --log_every 1"
WORDS += " --loss_tokens 0 --fit_tokens 300 --bootstrap 5 --device cpu --compute_dtype float32"


@pytest.mark.slow
def test_a_run_ends_with_its_page(
    open_page: Callable[..., OpenedPage], tmp_path: Path, tiny_bert: str, topics_jsonl: str
) -> None:
    run = tmp_path / "<b>run"
    words = [tiny_bert, topics_jsonl, *WORDS.split(), "--save_dir", str(tmp_path), "--run_name", run.name]
    main(words)
    opened = open_page(run / "report.html")
    opened.visit()
    text = opened.texts("main")[0]
    for shown in ("<b>run", "tiny-bert", "topics.jsonl", "Explained variance", "Training curves", "encoder.layer.1"):
        assert shown in text, shown
    main([*words, "--overwrite", "--report", "false"])
    assert not (run / "report.html").exists()
