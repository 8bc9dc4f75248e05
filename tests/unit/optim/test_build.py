"""The optimizer of a coder: rates and decay per parameter, and state by name as in checkpoints of earlier versions."""

from __future__ import annotations

import pytest
import torch

from saetrain.coders.topk import TopK
from saetrain.optim import ENCODER_LR_RATIO, LazyAdam, OptimSettings, build_optimizer, load_named_state, named_state

D, F = 5, 9


def build(coder: TopK, **settings: object) -> torch.optim.Optimizer:
    return build_optimizer(
        dict(coder.named_parameters()),
        OptimSettings(**settings),  # type: ignore[arg-type]
        encoder_parameters=coder.encoder_parameters,
        latent_dims=coder.latent_dims,
    )


def take_step(coder: TopK, optimizer: torch.optim.Optimizer, lr: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in coder.parameters():
        parameter.grad = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


@pytest.mark.parametrize(("name", "encoder_ratio"), [("adam", ENCODER_LR_RATIO), ("sgd", 1.0)])
def test_weight_decay_shrinks_only_the_encoder_and_is_decoupled(name: str, encoder_ratio: float) -> None:
    weights, states = {}, {}
    for decay in (0.0, 0.1):
        coder = TopK(D, F, 2, seed=1)
        start, optimizer = coder.W_enc.detach().clone(), build(coder, optimizer=name, weight_decay=decay)
        take_step(coder, optimizer, 0.5)
        weights[decay] = {key: p.detach().clone() for key, p in coder.named_parameters()}
        states[decay] = named_state(optimizer)
    expected = weights[0.0].pop("W_enc") - encoder_ratio * 0.5 * 0.1 * start
    torch.testing.assert_close(weights[0.1].pop("W_enc"), expected)
    assert all(torch.equal(weights[0.1][key], value) for key, value in weights[0.0].items())
    assert all(torch.equal(states[0.1][key], value) for key, value in states[0.0].items())


def test_state_has_the_names_and_shapes_of_checkpoints() -> None:
    for name, keys in (("adam", ("exp_avg", "exp_avg_sq")), ("sgd", ("momentum_buffer",))):
        coder = TopK(D, F, 2)
        optimizer = build(coder, optimizer=name)
        take_step(coder, optimizer, 0.1)
        shapes = {f"{each}.{key}": p.shape for each, p in coder.named_parameters() for key in keys}
        if name == "adam":
            shapes |= {f"{each}.step": torch.Size() for each, _ in coder.named_parameters()}
        assert {key: value.shape for key, value in named_state(optimizer).items()} == shapes


@pytest.mark.parametrize("latents", [F, D, 1])
@pytest.mark.parametrize("name", ["adam", "sgd"])
def test_a_loaded_state_gives_the_same_bits(name: str, latents: int) -> None:
    one, two = (TopK(D, latents, 1, seed=1) for _ in range(2))
    first, second = build(one, optimizer=name), build(two, optimizer=name)
    for step in range(6):
        take_step(one, first, 0.05, step)
        if step == 2:
            saved = {key: value.contiguous().clone() for key, value in named_state(first).items()}
            before = {key: value.clone() for key, value in saved.items()}
            two.load_state_dict(one.state_dict())
            load_named_state(second, saved)
        if step > 2:
            take_step(two, second, 0.05, step)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
    moments = [value for key, value in named_state(second).items() if key.startswith("W_enc") and value.dim()]
    assert all(value.stride() == two.W_enc.stride() for value in moments)
    assert all(torch.equal(saved[key], value) for key, value in before.items()), "loaded tensors must be copied"


def test_state_is_loaded_to_the_device_of_the_parameters() -> None:
    """A checkpoint is read on the CPU; the device meta represents a GPU."""
    coder, moved = TopK(D, F, 2), TopK(D, F, 2).to("meta")
    source, target = build(coder), build(moved)
    assert isinstance(target, LazyAdam)
    take_step(coder, source, 0.05)
    load_named_state(target, named_state(source))
    assert {value.device.type for value in named_state(target).values()} == {"meta"}
