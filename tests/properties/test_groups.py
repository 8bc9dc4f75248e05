"""Coders that select in groups of tokens: the result does not depend on micro-batches, ranks or the order of rows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import pytest
import torch
from torch import Tensor

from saetrain.coders import CODERS, GroupSettings, SparseCoder
from saetrain.coders.batchtopk import BatchTopK
from saetrain.ops import select_largest
from saetrain.optim import OptimSettings
from saetrain.training.steps import native
from saetrain.training.steps.autograd import AutogradStep
from saetrain.training.steps.base import StepStats
from saetrain.training.steps.native import NativeStep
from saetrain.types import StepContext, TokenGroups
from tests.properties.test_coders import GROUP, D, F, K, N, build, draw

Result = TypeVar("Result")

CLASSES = {name: cls for name, cls in CODERS.items() if issubclass(cls.Settings, GroupSettings)}


@pytest.fixture(params=CLASSES)
def architecture(request: pytest.FixtureRequest) -> type[SparseCoder]:
    return CLASSES[request.param]


def context(groups: TokenGroups, step: int = 0) -> StepContext:
    return StepContext(step, N, None, torch.tensor(float(D)), torch.tensor(0.7 * D), total_steps=10, groups=groups)


def whole_groups(n_tokens: int) -> TokenGroups:
    return TokenGroups(torch.arange(n_tokens), GROUP, n_tokens // GROUP)


@torch.no_grad()
def brute_force_code(coder: SparseCoder, x_ND: Tensor) -> Tensor:
    """The k·G largest ReLU pre-activations of each group by sorting, in float64."""
    pre = ((x_ND - coder.b_dec).double() @ coder.W_enc.double() + coder.b_enc.double()).relu()
    limit = torch.stack([part.flatten().sort(descending=True).values[K * GROUP - 1] for part in pre.split(GROUP)])
    return pre * (pre >= limit.repeat_interleave(GROUP).unsqueeze(1))


def share_sums(n_ranks: int) -> list[Callable[[Tensor], None]]:
    """All-reduce of one tensor per rank, for ranks that are threads."""
    barrier, tensors = threading.Barrier(n_ranks, timeout=20), {}

    def make(rank: int) -> Callable[[Tensor], None]:
        def add_up(tensor: Tensor) -> None:
            tensors[rank] = tensor.clone()
            barrier.wait()
            total = torch.stack([tensors[each] for each in range(n_ranks)]).sum(dim=0)
            barrier.wait()
            tensor.copy_(total)

        return add_up

    return [make(rank) for rank in range(n_ranks)]


def test_training_keeps_the_largest_of_each_group(architecture: type[SparseCoder]) -> None:
    coder, x = build(architecture), draw(N, D)
    encoded = coder.encode_train(x, context(whole_groups(N)))
    code, expected = encoded.codes.to_dense(), brute_force_code(coder, x)
    torch.testing.assert_close(code.double(), expected, rtol=1e-4, atol=1e-5)
    assert int((code != 0).sum()) == K * N
    assert len({int(count) for count in encoded.codes.l0_per_token()}) > 1, "every token has the same number"
    smallest = torch.stack([part[part > 0].min() for part in expected.split(GROUP)])
    assert float(encoded.sums["smallest"]) == pytest.approx(float(smallest.sum()), rel=1e-5)
    assert float(encoded.sums["groups"]) == N // GROUP


def test_the_floor_of_the_search_changes_nothing(architecture: type[SparseCoder]) -> None:
    coder, x = build(architecture), draw(N, D)
    codes = []
    for threshold in (0.0, 0.3, 1e6):
        coder.get_buffer("threshold").fill_(threshold)
        codes.append(coder.encode_train(x, context(whole_groups(N))).codes.to_dense())
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_fewer_positive_entries_than_wanted_are_all_kept(architecture: type[SparseCoder]) -> None:
    coder, x = build(architecture), draw(N, D)
    with torch.no_grad():
        coder.b_enc.fill_(-0.6)
    encoded = coder.encode_train(x, context(whole_groups(N)))
    positive = (coder.pre_activations(x) > 0).sum(dim=1)
    assert 0 < int(positive.sum()) < K * N
    assert torch.equal(encoded.codes.l0_per_token(), positive)
    assert float(encoded.sums["smallest"]) == 0
    with torch.no_grad():
        coder.b_enc.fill_(-1e3)
    step = AutogradStep(coder, OptimSettings())
    stats = step.forward_backward(x, context(whole_groups(N)))
    assert int(stats.fired.sum()) == 0
    assert torch.isfinite(stats.losses["recon"])


def run_rank(coder: SparseCoder, x_ND: Tensor, groups: TokenGroups) -> tuple[StepStats, dict[str, Tensor], Tensor]:
    step = AutogradStep(coder, OptimSettings())
    stats = step.forward_backward(x_ND, context(groups))
    code = coder.encode_train(x_ND, context(groups)).codes.to_dense().detach()
    return stats, {name: p.grad.clone() for name, p in coder.named_parameters() if p.grad is not None}, code


def build_with_ties(architecture: type[SparseCoder]) -> SparseCoder:
    """Return a coder whose pre-activations of whole numbers are whole numbers."""
    coder = build(architecture)
    with torch.no_grad():
        coder.W_enc.copy_((4 * coder.W_enc).round())
        coder.b_enc.zero_()
        coder.b_dec.zero_()
    return coder


def run_native(coder: SparseCoder, x_ND: Tensor, groups: TokenGroups) -> StepStats:
    assert isinstance(coder, BatchTopK)
    step = NativeStep(coder, OptimSettings(), use_bf16=False, no_accumulation=True)
    return step.forward_backward(x_ND, context(groups))


def run_ranks(
    run: Callable[[SparseCoder, Tensor, TokenGroups], Result],
    architecture: type[SparseCoder],
    x_ND: Tensor,
    rows: Sequence[Tensor],
    group_tokens: int,
) -> list[Result]:
    """Return the results of ranks, which are threads; ``rows``: the rows of each."""
    sums = share_sums(len(rows))
    with ThreadPoolExecutor(len(rows)) as pool:
        running = [
            pool.submit(
                run,
                build_with_ties(architecture),
                x_ND[own],
                TokenGroups(own, group_tokens, N // group_tokens, sums[rank], rank == 0, is_shared=len(rows) > 1),
            )
            for rank, own in enumerate(rows)
        ]
        return [each.result(timeout=60) for each in running]


@pytest.mark.parametrize("n_ranks", [1, 2, 3])
@pytest.mark.parametrize("group_tokens", [1, GROUP, N])
def test_native_ranks_that_share_groups_equal_autograd(
    architecture: type[SparseCoder], n_ranks: int, group_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with fewer tokens per group than ranks, and with rows that are not in the sample order."""
    # The ranks are threads, which must not share the memory that the steps of one process share.
    monkeypatch.setattr(native, "get_workspace", native.Workspace)
    x, generator = draw(N, D).round(), torch.Generator().manual_seed(4)
    rows = torch.randperm(N, generator=generator).tensor_split(n_ranks)
    expected = run_rank(
        build_with_ties(architecture), x, TokenGroups(torch.arange(N), group_tokens, N // group_tokens)
    )[0]
    ranks = run_ranks(run_native, architecture, x, rows, group_tokens)
    fired = torch.stack([each.fired for each in ranks]).sum(dim=0)
    torch.testing.assert_close(fired, expected.fired)
    for name, value in expected.sums.items():
        assert float(sum(each.sums[name] for each in ranks)) == pytest.approx(float(value)), name
    for name, loss in expected.losses.items():
        assert float(sum(each.losses[name] for each in ranks)) == pytest.approx(float(loss), rel=1e-4), name


@pytest.mark.parametrize("n_ranks", [2, 3])
@pytest.mark.parametrize("group_tokens", [GROUP, N])
def test_ranks_that_share_groups_equal_one(architecture: type[SparseCoder], n_ranks: int, group_tokens: int) -> None:
    """The ranks' rows alternate in the sample order and are shuffled within a rank; many values are equal."""
    x, generator = draw(N, D).round(), torch.Generator().manual_seed(4)
    rows = [torch.arange(rank, N, n_ranks) for rank in range(n_ranks)]
    rows = [each[torch.randperm(len(each), generator=generator)] for each in rows]

    one = run_rank(build_with_ties(architecture), x, TokenGroups(torch.arange(N), group_tokens, N // group_tokens))
    ranks = run_ranks(run_rank, architecture, x, rows, group_tokens)
    code = torch.zeros(N, F)
    for (_, _, own_code), own in zip(ranks, rows, strict=True):
        code[own] = own_code
    assert torch.equal(code, one[2])
    values = code[code != 0]
    assert int((values == values.min()).sum()) > 1, "there are no ties"
    for name, value in one[1].items():
        torch.testing.assert_close(sum(rank[1][name] for rank in ranks), value, rtol=1e-4, atol=1e-5, msg=name)
    for name, value in one[0].sums.items():
        assert float(sum(rank[0].sums[name] for rank in ranks)) == float(value), name


def test_ties_are_broken_in_the_given_order() -> None:
    values, groups = torch.tensor([2.0, 1.0, 1.0, 1.0, 3.0, 1.0]), torch.tensor([0, 0, 0, 0, 1, 1])
    order = torch.tensor([5, 4, 0, 1, 3, 2])
    found = select_largest(values, groups, order, torch.tensor([3, 1]), 6)
    assert found.mask_P.tolist() == [True, False, True, True, True, False]
    assert found.smallest_G.tolist() == [1.0, 3.0]
    empty = select_largest(values[:0], groups[:0], order[:0], torch.tensor([2, 0]), 6)
    assert (empty.mask_P.tolist(), empty.smallest_G.tolist()) == ([], [0.0, 0.0])


def test_the_threshold_is_an_average_over_groups(architecture: type[SparseCoder]) -> None:
    coder = build(architecture)
    found = []
    for step, (smallest, groups) in enumerate([(6.0, 2.0), (10.0, 2.0), (3.0, 1.0)]):
        sums = {"smallest": torch.tensor(smallest).double(), "groups": torch.tensor(groups).double()}
        coder.after_step(sums, context(whole_groups(N), step))
        found.append(float(coder.get_buffer("threshold")))
    assert found == pytest.approx([3.0, 4.0, 4.0 - 1 / 3])
    coder.after_step(sums, context(whole_groups(N), 5000))
    assert float(coder.get_buffer("threshold")) == pytest.approx(0.99 * found[-1] + 0.03)


@pytest.mark.parametrize("threshold", [0.0, 0.2, 1e6])
def test_a_calibrated_coder_has_a_mean_l0_of_k(architecture: type[SparseCoder], threshold: float) -> None:
    coder = build(architecture)
    coder.get_buffer("threshold").fill_(threshold)
    batches = [draw(70, D, seed=seed) for seed in (1, 2)]
    coder.calibrate(iter(batches), context(whole_groups(N)))
    codes = coder.encode(torch.cat(batches))
    assert int(codes.firing_counts().sum()) == K * 140
    with torch.no_grad():
        coder.b_enc.fill_(-1e3)
    coder.calibrate(iter(batches), context(whole_groups(N)))
    assert float(coder.get_buffer("threshold")) == 0
