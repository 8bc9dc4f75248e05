"""The examples on a model card load the SAE from the hub in SAELens and sparsify."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

import saetrain
from saetrain import hub as saetrain_hub
from saetrain.cli import main
from tests.fake_hub import serve_hub, use_hub

SIZES = "--layers 1 --k 8 --num_latents 64 --ctx_len 32 --max_tokens 1280 --eval_tokens 400 --lr 4e-3 --assess false"


@pytest.mark.interop
@pytest.mark.parametrize(
    ("library", "architecture"), [("sae_lens", "topk"), ("sae_lens", "batchtopk"), ("sparsify", "topk")]
)
def test_examples_of_the_card_run(
    library: str, architecture: str, tmp_path: Path, tiny_gpt2: str, topics_jsonl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip(library)
    words = f"{tiny_gpt2} {topics_jsonl} --architecture {architecture} {SIZES} --save_dir {tmp_path} --run_name run"
    main(words.split())
    with serve_hub() as hub:
        use_hub(hub, monkeypatch, str(tmp_path / "cache"))
        main(["push", str(tmp_path / "run"), "me/saes"])
        card = hub.repos["me/saes"].files()["sae/h.1/README.md"].decode()
        (block,) = (each for each in re.findall(r"```python\n(.*?)```", card, re.DOTALL) if library in each)
        names: dict[str, torch.nn.Module] = {}
        exec(compile(block, "README.md", "exec"), names)
    saetrain_hub.is_hub_reachable.cache_clear()
    own = saetrain.load(tmp_path / "run" / "sae" / "h.1")
    assert torch.equal(names["sae"].W_dec.detach(), own.W_dec)
