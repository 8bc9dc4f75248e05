"""The step's own bookkeeping: normalisers that come from the step before, and spikes."""

from __future__ import annotations

import torch

from saetrain.coders.topk import TopK
from saetrain.optim import Optimizer, OptimSettings
from saetrain.training.engine import AutogradEngine
from saetrain.training.firing import FiringTracker
from saetrain.training.trainer import SaeTrainer, Trainer, TrainSettings

D, F, N = 6, 15, 40


def make(micro_steps: int = 1) -> Trainer:
    coder = TopK(D, F, 2, auxk_alpha=0.5, seed=3)
    optimizer = Optimizer(
        dict(coder.named_parameters()),
        OptimSettings(),
        project=coder.remove_parallel_gradient,
        renormalize=coder.renormalize_decoder,
    )
    engine = AutogradEngine(coder, optimizer)
    firing = FiringTracker(F, 30, 0.01, torch.device("cpu"))
    sae = SaeTrainer("h", coder, lambda x: x, engine, firing, data_variance=float(D), raw_mse=1.0, lr=0.01, seed=3)
    settings = TrainSettings(max_tokens=100 * N, grad_acc_steps=micro_steps)
    return Trainer({"h": sae}, settings, tokens=N, warmup=0)


def batch(step: int) -> torch.Tensor:
    return torch.randn(N, D, generator=torch.Generator().manual_seed(step)) + 1


def test_residual_variance_is_that_of_the_step_before() -> None:
    for micro_steps in (1, 4):
        trainer = make(micro_steps)
        sae = trainer.saes["h"]
        for step in range(3):
            x = batch(step)
            residual = (x - sae.coder.decode(sae.coder.encode(x))).detach()
            expected = (residual - residual.mean(dim=0)).pow(2).sum(dim=1).mean()
            parts = x.split(N // micro_steps)
            trainer.train_step(lambda micro, parts=parts, first=step * micro_steps: {"h": parts[micro - first]})  # type: ignore[misc]
            torch.testing.assert_close(sae.residual_variance, expected)


def test_a_perfect_reconstruction_leaves_a_floor() -> None:
    trainer = make()
    sae = trainer.saes["h"]
    x = sae.coder.b_dec.detach().expand(N, D)
    trainer.train_step(lambda micro: {"h": x})
    assert float(sae.residual_variance) >= 1e-6 * D * 0.99


def test_dead_latents_are_those_of_the_steps_before() -> None:
    trainer = make()
    sae = trainer.saes["h"]
    trainer.train_step(lambda micro: {"h": batch(0)})
    assert sae.firing.dead() is not None
    assert "loss_auxk" not in sae.metrics("fvu")
    trainer.train_step(lambda micro: {"h": batch(1)})
    assert sae.metrics("fvu")["loss_auxk"] > 0
