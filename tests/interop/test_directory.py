"""The directory that a run leaves, read by the real SAELens and the real sparsify: `make test-interop`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import saetrain
from saetrain.cli import main
from saetrain.coders.topk import TopK
from saetrain.interop.formats import load_sae, save_sae
from saetrain.interop.metadata import SaeMetadata

pytestmark = pytest.mark.interop


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, minilm: str, topics_jsonl: str) -> Path:
    """The SAE folder of a short run on the trained encoder, with two hookpoints and a second seed."""
    out = tmp_path_factory.mktemp("run")
    main(
        f"{minilm} {topics_jsonl} --layers 1 3 --k 8 --num_latents 96 --max_tokens 8192 --batch_size 4 --ctx_len 64 "
        f"--init_seeds 42 43 --eval_tokens 2000 --assess false --save_dir {out} --run_name run".split()
    )
    return out / "run" / "sae"


@pytest.fixture(scope="module")
def activations(trained: Path, topics: list[str]) -> torch.Tensor:
    """Raw activations of layer 3 on real text, (N, 384)."""
    sae = saetrain.load(trained / "encoder.layer.3")
    _, tokenizer, capture, *_ = sae._loaded_model
    batch = tokenizer(topics[:4], return_tensors="pt", truncation=True, max_length=64, padding=True)
    values = capture(batch["input_ids"], batch["attention_mask"])["encoder.layer.3"]
    return values[batch["attention_mask"].bool()]


def agree(ours: torch.Tensor, theirs: torch.Tensor, x: torch.Tensor) -> None:
    """Equal to 1e-5 of the activations' root mean square."""
    assert (ours - theirs).abs().max() <= 1e-5 * x.pow(2).mean().sqrt()


def test_saelens_reads_it_and_agrees(trained: Path, activations: torch.Tensor) -> None:
    from sae_lens import SAE

    folder = trained / "encoder.layer.3"
    theirs, (ours, _) = SAE.load_from_disk(str(folder)), load_sae(folder)
    assert type(theirs).__name__ == "TopKSAE"
    code = theirs.encode(activations)
    assert ((code != 0).sum(dim=1) <= 8).all()
    agree(ours.encode(activations).to_dense(), code, activations)
    agree(ours.decode(ours.encode(activations)), theirs(activations), activations)
    assert theirs.cfg.metadata.model_name == json.loads((folder / "cfg.json").read_text())["saetrain"]["model"]


def test_sparsify_reads_it_and_agrees(trained: Path, activations: torch.Tensor) -> None:
    from sparsify import SparseCoder

    folder = trained / "encoder.layer.3"
    theirs, (ours, _) = SparseCoder.load_from_disk(str(folder)), load_sae(folder)
    agree(ours.decode(ours.encode(activations)), theirs(activations).sae_out, activations)


def test_sparsify_finds_all_hookpoints_of_the_folder(trained: Path) -> None:
    from sparsify import SparseCoder

    assert sorted(SparseCoder.load_many(str(trained), local=True)) == ["encoder.layer.1", "encoder.layer.3"]


def test_other_libraries_refuse_what_they_cannot_hold(tmp_path: Path) -> None:
    """A folder with the tensors of another architecture must not be loaded as a different SAE."""
    from sae_lens import SAE
    from sparsify import SparseCoder

    coder = TopK(16, 64, 4)
    coder.register_buffer("threshold", torch.zeros(64))
    assert save_sae(tmp_path, coder, SaeMetadata(model="m")).keys() == {"SAELens", "sparsify"}
    for load in (SAE.load_from_disk, SparseCoder.load_from_disk):
        with pytest.raises((KeyError, TypeError, ValueError, FileNotFoundError)):
            load(str(tmp_path))


def test_further_seeds_lie_in_folders_of_their_own(trained: Path) -> None:
    from sae_lens import SAE
    from sparsify import SparseCoder

    folder = trained / "encoder.layer.3" / "seed43"
    first = SAE.load_from_disk(str(trained / "encoder.layer.3"))
    assert not torch.equal(SAE.load_from_disk(str(folder)).W_dec, first.W_dec)
    assert SparseCoder.load_from_disk(str(folder)).num_latents == 96
