"""The step's own bookkeeping: normalisers that come from the step before, and who waits for whom."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from saetrain.coders.topk import TopK
from saetrain.optim import OptimSettings, lr_factor
from saetrain.training.dead_latents import FiringTracker
from saetrain.training.preemption import Preempted
from saetrain.training.sae_state import SaeState
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.base import MicroBatch
from saetrain.training.trainer import SiteBatches, Trainer, TrainSettings
from saetrain.types import Site

D, F, N = 6, 15, 40


def make(micro_steps: int = 1, *, shared: bool = False, lift: float = 0.0, auxk_alpha: float = 0.5) -> Trainer:
    coder = TopK(D, F, 2, auxk_alpha=auxk_alpha, seed=3)
    step = AutogradStep(coder, OptimSettings(), is_plain=True)
    firing = FiringTracker(F, 30, 0.01, torch.device("cpu"))
    about = {"data_variance": float(D), "mse_per_fvu": 1.0, "peak_lr": 0.01}
    sae = SaeState(
        Site.of_sae("h"), coder, lambda x: x, lambda x: x, step, firing, **about, seed=3, dead_bias_lr_multiplier=lift
    )
    settings = TrainSettings(max_tokens=100 * N, grad_acc_steps=micro_steps)
    return Trainer({"h": sae}, settings, tokens_per_step=N, warmup_steps=0, is_data_parallel=shared)


def batch(step: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(step)) + 1


def batches(step: int) -> Iterator[SiteBatches]:
    return iter([{"h": MicroBatch.of_sae(batch(step))}])


def test_residual_variance_is_that_of_the_step_before() -> None:
    for micro_steps in (1, 4):
        trainer = make(micro_steps)
        sae = trainer.saes["h"]
        for step in range(3):
            x = batch(step)
            residual = (x - sae.coder.decode(sae.coder.encode(x))).detach()
            expected = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
            parts = x.split(N // micro_steps)
            trainer.train_step(iter([{"h": MicroBatch.of_sae(part)} for part in parts]))
            torch.testing.assert_close(sae.residual_variance, expected)


def test_a_perfect_reconstruction_leaves_a_floor() -> None:
    trainer = make()
    sae = trainer.saes["h"]
    x = sae.coder.b_dec.detach().expand(N, D)
    trainer.train_step(iter([{"h": MicroBatch.of_sae(x)}]))
    assert float(sae.residual_variance) >= 1e-6 * D * 0.99


def test_dead_latents_are_those_of_the_steps_before() -> None:
    trainer = make()
    sae = trainer.saes["h"]
    trainer.train_step(batches(0))
    assert sae.firing.dead_mask_or_none() is not None
    assert "loss_auxk" not in sae.compute_metrics("fvu")
    trainer.train_step(batches(1))
    assert sae.compute_metrics("fvu")["loss_auxk"] > 0


def test_the_bias_of_a_dead_latent_rises_until_it_fires() -> None:
    lifted, plain = make(lift=50.0, auxk_alpha=0.0), make(auxk_alpha=0.0)
    rises: list[float] = []
    for trainer in (lifted, plain):
        with torch.no_grad():
            trainer.saes["h"].coder.b_enc[4] = -9.0
    for step in range(40):
        before = {trainer: trainer.saes["h"].coder.b_enc.detach().clone() for trainer in (lifted, plain)}
        for trainer in (lifted, plain):
            trainer.train_step(batches(step))
        firing = lifted.saes["h"].firing
        rate = lr_factor(step, lifted.total_steps, 0) * 0.01
        if firing.since_fired[4] >= firing.window_tokens:
            rises.append(float(lifted.saes["h"].coder.b_enc.detach()[4] - before[lifted][4]))
            assert rises[-1] == pytest.approx(50 * rate, rel=1e-4), "Adam has no gradient for it"
        else:
            break
    assert 1 < len(rises) < 39
    assert int(firing.since_fired[4]) < firing.window_tokens <= int(plain.saes["h"].firing.since_fired[4])


def test_ranks_are_heard_before_sums_begin_and_other_work_is_done_behind() -> None:
    order: list[str] = []
    trainer = make(micro_steps=2, shared=True)
    sae = trainer.saes["h"]
    add_up, added_up = sae.add_to_buckets, sae.unpack_reduced
    sae.add_to_buckets = lambda reduction: (order.append("begin"), add_up(reduction))[1]  # type: ignore[method-assign,func-returns-value]
    sae.unpack_reduced = lambda tokens: (order.append("end"), added_up(tokens))[1]  # type: ignore[method-assign,func-returns-value]

    def read_batches() -> Iterator[SiteBatches]:
        for number in range(2):
            order.append(f"batch {number}")
            yield {"h": MicroBatch.of_sae(batch(number))}

    trainer.train_step(read_batches(), lambda: order.append("heed"), lambda: order.append("meanwhile"))
    assert order == ["batch 0", "batch 1", "heed", "begin", "meanwhile", "end"]


def test_a_step_that_is_given_up_before_its_sums_changes_nothing() -> None:
    trainer, other = make(shared=True), make(shared=True)

    def give_up() -> None:
        raise Preempted

    with pytest.raises(Preempted):
        trainer.train_step(batches(9), give_up)
    trainer.zero_grad()
    for each in (trainer, other):
        each.train_step(batches(0))
    for name, value in trainer.saes["h"].state_dict().items():
        assert torch.equal(value, other.saes["h"].state_dict()[name]), name
