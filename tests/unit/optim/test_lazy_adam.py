"""LazyAdam: equal to AdamW where no latent is idle, no change of idle latents, and torch's API of an optimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from saetrain.optim import LazyAdam

D, F = 5, 9
DIMS = {"W_enc": 1, "b_enc": 0, "W_dec": 0, "threshold": 0}
Parameters = dict[str, nn.Parameter]


def make_parameters(latents: int = F, device: str = "cpu") -> Parameters:
    """Return the parameters of a coder that also has thresholds, a skip connection and a scalar."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"W_enc": (latents, D), "b_enc": (latents,), "W_dec": (latents, D), "threshold": (latents,), "b_dec": (D,)}
    values = {name: torch.randn(shape, generator=generator) for name, shape in {**shapes, "W_skip": (D, 3)}.items()}
    # As in a coder, the memory of W_enc (D, F) has one row per latent.
    values |= {"W_enc": values["W_enc"].T, "W_skip": values["W_skip"].T, "gain": torch.tensor(1.5)}
    return {name: nn.Parameter(value.to(device)) for name, value in values.items()}


def build_lazy_adam(parameters: Parameters, **options: float) -> LazyAdam:
    groups = [{"params": [(name, p)], "latent_dim": DIMS.get(name)} for name, p in parameters.items()]
    return LazyAdam(groups, lr=0.05, **options)  # type: ignore[arg-type]


def set_gradients(parameters: Parameters, seed: int, idle: Tensor | None = None) -> None:
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in parameters.items():
        gradient = torch.empty_like(parameter).copy_(torch.randn(parameter.shape, generator=generator))
        if idle is not None and name in DIMS:
            gradient.movedim(DIMS[name], 0)[idle] = 0
        parameter.grad = gradient


def snapshot(parameters: Parameters, optimizer: LazyAdam) -> dict[str, Tensor]:
    """Return copies of weights and moments, those with a row per latent as rows of latents."""
    found = {}
    for name, parameter in parameters.items():
        state = optimizer.state[parameter]
        for key, value in {"weight": parameter, "m": state["exp_avg"], "v": state["exp_avg_sq"]}.items():
            found[f"{name}.{key}"] = value.detach().movedim(DIMS[name], 0).clone() if name in DIMS else value.clone()
    return found


@pytest.mark.parametrize("latents", [F, D, 1])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_adamw_if_no_latent_is_idle(latents: int, weight_decay: float) -> None:
    mine, theirs = make_parameters(latents), make_parameters(latents)
    optimizer = build_lazy_adam(mine, weight_decay=weight_decay)
    reference = torch.optim.AdamW(theirs.values(), lr=0.05, weight_decay=weight_decay)
    for step in range(4):
        set_gradients(mine, step)
        set_gradients(theirs, step)
        optimizer.step()
        reference.step()
        assert optimizer.updated_latents is None
    for name, parameter in mine.items():
        torch.testing.assert_close(parameter, theirs[name])
        for key in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[parameter][key], reference.state[theirs[name]][key])


@pytest.mark.parametrize("latents", [F, D, 1])
def test_idle_latents_do_not_change(latents: int) -> None:
    parameters, idle = make_parameters(latents), torch.arange(latents) % 3 == 1
    optimizer = build_lazy_adam(parameters, weight_decay=0.1)
    for step in range(3):
        set_gradients(parameters, step, idle if step == 2 else None)
        before = snapshot(parameters, optimizer)
        optimizer.step()
    assert optimizer.updated_latents is None if latents == 1 else optimizer.updated_latents is not None
    for key, value in snapshot(parameters, optimizer).items():
        changed = (value != before[key]).reshape(len(value) if value.dim() else 1, -1)
        expected = ~idle if key.split(".")[0] in DIMS else torch.ones(len(changed), dtype=torch.bool)
        assert torch.equal(changed.any(dim=1), expected), key


def zero_scalars(parameters: Parameters) -> None:
    for name in ("b_enc", "threshold"):
        parameters[name].grad[:] = 0  # type: ignore[index]


def set_one_threshold(parameters: Parameters) -> None:
    zero_scalars(parameters)
    parameters["threshold"].grad[3] = 1.0  # type: ignore[index]


def remove_scalars(parameters: Parameters) -> None:
    for name in ("b_enc", "threshold"):
        parameters[name].grad = None
    for name in ("W_enc", "W_dec"):
        rows = parameters[name].grad.movedim(DIMS[name], 0)  # type: ignore[union-attr]
        rows[torch.arange(F) != 4] = 0


@pytest.mark.parametrize(("change", "expected"), [(zero_scalars, []), (set_one_threshold, [3]), (remove_scalars, [4])])
def test_any_scalar_of_a_latent_makes_it_active(change: Callable[[Parameters], None], expected: list[int]) -> None:
    parameters = make_parameters()
    optimizer = build_lazy_adam(parameters)
    set_gradients(parameters, 0)
    change(parameters)
    before = snapshot(parameters, optimizer)
    optimizer.step()
    assert optimizer.updated_latents is not None
    assert optimizer.updated_latents.tolist() == expected
    changed = (snapshot(parameters, optimizer)["W_dec.weight"] != before["W_dec.weight"]).any(dim=1)
    assert changed.nonzero().squeeze(1).tolist() == expected


def test_groups_have_their_own_rate_and_decay() -> None:
    parameters = make_parameters()
    start = parameters["W_enc"].detach().clone()
    options = {"lr": 0.2, "lr_ratio": 0.5, "weight_decay": 0.1}
    optimizer = LazyAdam([{"params": [parameters["W_enc"]], **options}, {"params": [parameters["b_enc"]]}], lr=0.3)
    before = parameters["b_enc"].detach().clone()
    set_gradients(parameters, 0)
    optimizer.step()
    # Adam's first step has length lr, because the moments are g and g².
    sign = parameters["W_enc"].grad.sign()  # type: ignore[union-attr]
    torch.testing.assert_close(parameters["W_enc"].detach(), start * (1 - 0.1 * 0.1) - 0.1 * sign)
    torch.testing.assert_close((parameters["b_enc"].detach() - before).abs(), torch.full((F,), 0.3))


def test_large_parameters_are_updated_in_chunks_like_small_ones() -> None:
    """Both with and without idle latents; rows of 33 entries do not divide a chunk."""
    rows = 10_000
    weight, bias = nn.Parameter(torch.randn(rows, 33)), nn.Parameter(torch.randn(rows))
    expected = [nn.Parameter(p.detach().clone()) for p in (weight, bias)]
    optimizer, reference = LazyAdam([weight, bias], latent_dim=0), torch.optim.AdamW(expected, weight_decay=0)
    weight.grad, bias.grad = torch.randn(rows, 33), torch.randn(rows)
    for parameter, own in zip(expected, (weight, bias), strict=True):
        parameter.grad = own.grad.clone()  # type: ignore[union-attr]
    optimizer.step()
    reference.step()
    torch.testing.assert_close(weight, expected[0])
    bias.grad[::2] = 0
    before = weight.detach().clone()
    optimizer.step()
    assert torch.equal((weight != before).any(dim=1), torch.arange(rows) % 2 == 1)


def test_gradients_in_another_memory_order_are_read_as_they_are_meant() -> None:
    results = []
    for is_transposed in (False, True):
        parameters = make_parameters()
        set_gradients(parameters, 0)
        if is_transposed:
            gradient = parameters["W_enc"].grad
            assert gradient is not None
            assert not gradient.is_contiguous()
            parameters["W_enc"].grad = gradient.contiguous()
        build_lazy_adam(parameters).step()
        results.append(parameters["W_enc"].detach().clone())
    assert torch.equal(*results)


@pytest.mark.parametrize("is_row_major", [False, True])
@pytest.mark.parametrize("latents", [F, D, 1])
def test_a_loaded_state_gives_the_same_bits(latents: int, is_row_major: bool) -> None:
    """``is_row_major``: the tensors come from a file that does not store strides."""
    one, two = make_parameters(latents), make_parameters(latents)
    first, second = build_lazy_adam(one), build_lazy_adam(two)
    for step in range(6):
        if step == 3:
            state = copy.deepcopy(first.state_dict())
            if is_row_major:
                for entries in state["state"].values():
                    entries.update({key: value.contiguous() for key, value in entries.items()})
            second.load_state_dict(state)
            for parameter, loaded in zip(one.values(), two.values(), strict=True):
                loaded.data.copy_(parameter)
        for parameters, optimizer in ((one, first), (two, second)) if step >= 3 else ((one, first),):
            set_gradients(parameters, step, torch.arange(latents) % 3 == step % 3)
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(one.values(), two.values(), strict=True))


def test_schedulers_closures_and_zero_grad_work_as_in_torch() -> None:
    parameter = nn.Parameter(torch.ones(3))
    optimizer = LazyAdam([parameter], lr=0.1)
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=0.5, total_iters=2)

    def closure() -> float:
        optimizer.zero_grad()
        loss = parameter.sum()
        loss.backward()
        return float(loss.detach())

    assert [optimizer.step(closure), scheduler.step(), optimizer.step(closure)] == pytest.approx(
        [3.0, None, 3.0 * (1 - 0.05)]
    )
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.075)
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.05 - 0.075))
    optimizer.zero_grad()
    assert parameter.grad is None
    optimizer.step()
    torch.testing.assert_close(parameter.detach(), torch.full((3,), 1 - 0.05 - 0.075))
    optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], "lr": 0.5})
    assert [group["lr"] for group in optimizer.param_groups] == [pytest.approx(0.075), 0.5]
