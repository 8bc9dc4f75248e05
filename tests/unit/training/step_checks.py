"""Inputs of training steps, and the checks that every implementation must pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from saetrain.coders.topk import TopK
from saetrain.optim import OptimSettings
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.base import TrainStep
from saetrain.types import StepContext

Shape = tuple[int, int, int, int, int]
"""(tokens, width, latents, k, dead latents)."""
Batch = tuple[Tensor, StepContext]
CoderAndStep = tuple[TopK, TrainStep]


def build_reference(coder: TopK, settings: OptimSettings, no_accumulation: bool = False) -> TrainStep:
    return AutogradStep(coder, settings, is_plain=True)


def make_coder(shape: Shape) -> TopK:
    """Return a coder with random biases."""
    _, width, latents, k, _ = shape
    coder = TopK(width, latents, k, auxk_alpha=1 / 32, seed=1)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        coder.b_enc.copy_(torch.randn(latents, generator=generator) * 0.3)
        coder.b_dec.copy_(torch.randn(width, generator=generator) * 0.3)
    return coder


def make_data(tokens: int, width: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, width, generator=generator) + torch.randn(width, generator=generator)


def make_context(shape: Shape, step: int = 0) -> StepContext:
    count, width, latents, _, dead = shape
    mask = None
    if dead:
        mask = torch.zeros(latents, dtype=torch.bool)
        mask[torch.randperm(latents, generator=torch.Generator().manual_seed(step))[:dead]] = True
    return StepContext(step, count, mask, torch.tensor(float(width)), torch.tensor(width * 0.7))


def make_batch(shape: Shape, step: int = 0) -> Batch:
    """Return the activations and the context of one step."""
    return make_data(shape[0], shape[1], step), make_context(shape, step)


def relative_error(value: Tensor, expected: Tensor) -> float:
    """Return the norm of the error as a share of the norm of ``expected``."""
    return float((value - expected).norm() / expected.norm().clamp_min(1e-12))


def take_step(step: TrainStep, batch: Batch) -> Tensor:
    """Take a whole step; return the number of tokens on which each latent fired."""
    fired = step.forward_backward(*batch).fired
    step.norm_bound()
    step.optimizer_step(1e-2)
    return fired


def check_whole_steps(
    plain: CoderAndStep,
    tested: CoderAndStep,
    batches: Sequence[Batch],
    compare_results: Callable[[object, object], None] = lambda found, expected: None,
) -> None:
    """Gradient norms are the reference's, their bounds hold, and so do the updates of all parameters."""
    (plain_coder, one), (coder, two) = plain, tested
    start = {key: p.detach().clone() for key, p in plain_coder.named_parameters()}
    for batch in batches:
        compare_results(two.forward_backward(*batch), one.forward_backward(*batch))
        bound = two.norm_bound()
        one.norm_bound()
        expected, found = one.optimizer_step(1e-2), two.optimizer_step(1e-2)
        torch.testing.assert_close(found, expected.detach(), rtol=1e-3, atol=1e-7)
        assert bound >= float(found) * 0.9999
    parameters = dict(coder.named_parameters())
    for key, p in plain_coder.named_parameters():
        # Adam turns the rounding error of a zero gradient into a whole step, so single entries may differ.
        assert relative_error(parameters[key].detach() - start[key], p.detach() - start[key]) < 0.02, key
    torch.testing.assert_close(coder.W_dec.norm(dim=1), torch.ones_like(coder.b_enc))


def check_resume(whole: CoderAndStep, later: CoderAndStep, batches: Sequence[Batch], resume_at: int) -> None:
    """Steps after loading the state give the same bits as steps without a stop."""
    for number, batch in enumerate(batches):
        if number == resume_at:
            later[0].load_state_dict(whole[0].state_dict())
            later[1].load_state_dict({key: value.clone() for key, value in whole[1].state_dict().items()})
        for _, step in (whole, later) if number >= resume_at else (whole,):
            take_step(step, batch)
    for key, p in whole[0].named_parameters():
        assert torch.equal(dict(later[0].named_parameters())[key], p), key


def check_discarded_step(build: Callable[[], CoderAndStep], batch: Batch, discarded: Batch) -> None:
    """A forward and backward pass that ``zero_grad`` discards does not change the next step."""
    results = []
    for discards in (False, True):
        coder, step = build()
        if discards:
            step.forward_backward(*discarded)
            step.zero_grad()
        take_step(step, batch)
        results.append([p.detach().clone() for p in coder.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def check_latents_that_do_not_fire(tested: CoderAndStep, batches: Sequence[Batch], n_silent: int) -> None:
    """In the last step, exactly the latents that fire change: weights, bias and moments."""
    coder, step = tested
    for batch in batches[:-1]:
        take_step(step, batch)
    with torch.no_grad():
        coder.b_enc[:n_silent] = -100.0
    before = {key: value.clone() for key, value in {**step.state_dict(), **coder.state_dict()}.items()}
    fired = take_step(step, batches[-1])
    assert (fired[:n_silent] == 0).all()
    assert (fired[n_silent:] > 0).any()
    for key, value in {**step.state_dict(), **coder.state_dict()}.items():
        if not key.startswith("b_dec") and not key.endswith(".step"):
            rows, old = (value.T, before[key].T) if key.startswith("W_enc") else (value, before[key])
            assert torch.equal((rows == old).reshape(len(fired), -1).all(dim=1), fired == 0), key
