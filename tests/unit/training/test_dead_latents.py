"""Dead counters against a brute-force count over every token."""

from __future__ import annotations

import pytest
import torch

from saetrain.training.dead_latents import DeadCountBound, DeadSettings, FiringTracker, min_dead_fraction
from saetrain.types import Codes

F, K = 13, 3


def batch(tokens: int, seed: int) -> Codes:
    """A sparse code in which some picked entries are zero, as where fewer than K are positive."""
    generator = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, F, generator=generator).topk(K, dim=1).indices
    values = torch.rand(tokens, K, generator=generator)
    return Codes(values * (values > 0.8), indices, F)


def observe(tracker: FiringTracker, codes: Codes) -> None:
    tracker.count_micro_batch(codes.firing_counts(), len(codes.values))


def test_since_fired_equals_brute_force_under_accumulation() -> None:
    tracker = FiringTracker(F, window_tokens=40, threshold=0.1, device=torch.device("cpu"))
    since = [0] * F
    seed = 0
    for sizes in [(5, 3, 2), (7,), (1, 1, 1, 1), (12, 8)] * 4:
        fired: set[int] = set()
        for size in sizes:
            seed += 1
            codes = batch(size, seed)
            observe(tracker, codes)
            fired |= {i for row in codes.to_dense().tolist() for i, value in enumerate(row) if value > 0}
        tracker.finish_step()
        since = [0 if i in fired else count + sum(sizes) for i, count in enumerate(since)]
        assert tracker.since_fired.tolist() == since
        dead = tracker.dead_mask_or_none()
        assert (dead.tolist() if dead is not None else [False] * F) == [count >= 40 for count in since]


def test_picks_with_value_zero_do_not_count_as_firing() -> None:
    codes = Codes(torch.zeros(4, K), torch.zeros(4, K, dtype=torch.long), F)
    tracker = FiringTracker(F, window_tokens=4, threshold=0.1, device=torch.device("cpu"))
    observe(tracker, codes)
    tracker.finish_step()
    assert tracker.compute_metrics()["dead_not_fired"] == 1.0


@pytest.mark.parametrize("micro", [1, 4, 10])
def test_rates_do_not_depend_on_the_micro_batch(micro: int) -> None:
    whole = FiringTracker(F, window_tokens=40, threshold=0.5, device=torch.device("cpu"))
    parts = FiringTracker(F, window_tokens=40, threshold=0.5, device=torch.device("cpu"))
    for seed in range(6):
        codes = batch(20, seed)
        observe(whole, codes)
        whole.finish_step()
        for start in range(0, 20, micro):
            assert codes.indices is not None
            observe(parts, Codes(codes.values[start : start + micro], codes.indices[start : start + micro], F))
        parts.finish_step()
    assert whole.compute_metrics() == parts.compute_metrics()
    assert torch.equal(whole.firing_rates()[0], parts.firing_rates()[0])


def test_rates_cover_the_last_one_to_two_blocks() -> None:
    tracker = FiringTracker(F, window_tokens=40, threshold=0.5, device=torch.device("cpu"))
    tracker._tokens_per_block = 30
    history = []
    for seed in range(20):
        codes = batch(20, seed)
        history.append((codes.to_dense() > 0).sum(dim=0))
        observe(tracker, codes)
        tracker.finish_step()
        rates, tokens = tracker.firing_rates()
        steps = tokens // 20
        assert 30 <= tokens <= 80 or seed < 2
        torch.testing.assert_close(rates, sum(history[-steps:]) / tokens)  # type: ignore[arg-type]


def test_state_goes_on_exactly() -> None:
    one, other = (FiringTracker(F, 40, 0.1, torch.device("cpu")) for _ in range(2))
    for seed in range(8):
        observe(one, batch(9, seed))
        one.finish_step()
        if seed == 3:
            other.load_state_dict({name: value.clone() for name, value in one.state_dict().items()})
        if seed > 3:
            observe(other, batch(9, seed))
            other.finish_step()
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in one.state_dict().items())


@pytest.mark.parametrize(
    ("l0", "latents", "threshold", "expected"),
    [(32, 131072, 5e-4, 0.5117), (192, 24576, 5e-4, 0.0), (32, 24576, 0.1, 0.98698), (32, 200, 0.0, 0.0)],
)
def test_bound_of_the_rate_rule(l0: float, latents: int, threshold: float, expected: float) -> None:
    assert min_dead_fraction(l0, latents, threshold) == pytest.approx(expected, abs=1e-4)


def test_no_code_of_that_l0_beats_the_bound() -> None:
    """A code that spreads its firings evenly over as many latents as can reach the threshold meets the bound."""
    tokens, k, threshold = 1000, 2, 0.01
    latents = 1000
    indices = torch.arange(tokens * k).reshape(tokens, k) % int(k / threshold)
    rates = Codes(torch.ones(tokens, k), indices, latents).firing_counts() / tokens
    assert float((rates < threshold).float().mean()) == pytest.approx(min_dead_fraction(k, latents, threshold))


def test_the_window_follows_the_run_and_the_rate_at_which_latents_can_fire() -> None:
    assert DeadSettings().resolve_window(1_000_000, 3072, 32) == 10_000
    assert DeadSettings().resolve_window(10**10, 3072, 32) == 10_000_000
    # A latent of the mean rate fires ten times in it.
    assert DeadSettings().resolve_window(100_000, 12_288, 16) == 7_680
    assert DeadSettings().resolve_window(10, 100, 3) == 334
    assert DeadSettings(dead_feature_threshold=77).resolve_window(1_000_000, 3072, 32) == 77


@pytest.mark.parametrize("lag", [0, 2])
def test_no_more_are_dead_than_was_foreseen(lag: int) -> None:
    tracker = FiringTracker(F, window_tokens=40, threshold=0.1, device=torch.device("cpu"))
    ahead = DeadCountBound(tracker, lag)
    most, dead = [], []
    for step in range(30):
        if step == 11:
            # As behind a resume, from a checkpoint of other kernels.
            ahead = DeadCountBound(tracker, lag)
        most.append(ahead.max_dead_count(10))
        dead.append(int(tracker.dead_mask().sum()))
        codes = batch(10, step if step < 15 else step % 2)
        observe(tracker, codes)
        tracker.finish_step()
        ahead.update_after_step(10)
    assert all(count <= bound for count, bound in zip(dead, most, strict=True))
    assert max(dead) > 0
    assert most[0] == 0
    assert most == dead if lag == 0 else most != dead


@pytest.mark.parametrize("done", [0, 1, 5])
def test_what_is_foreseen_is_the_same_behind_a_resume(done: int) -> None:
    tracker = FiringTracker(F, window_tokens=40, threshold=0.1, device=torch.device("cpu"))
    whole, later = DeadCountBound(tracker, 2), DeadCountBound(tracker, 2)
    foreseen: list[tuple[int, int]] = []
    for step in range(12):
        if step == done:
            state = whole.state_dict()
            assert torch.equal(whole.state_dict(), state)
            later.load_state_dict(state)
        foreseen.append(
            (whole.max_dead_count(10), later.max_dead_count(10) if step >= done else whole.max_dead_count(10))
        )
        observe(tracker, batch(10, step % 2))
        tracker.finish_step()
        whole.update_after_step(10)
        if step >= done:
            later.update_after_step(10)
    assert all(one == other for one, other in foreseen)
    assert len({one for one, _ in foreseen}) > 1


def test_counts_go_on_where_they_were_and_older_ones_are_read() -> None:
    whole = FiringTracker(F, window_tokens=40, threshold=0.1, device=torch.device("cpu"))
    for step in range(6):
        observe(whole, batch(20_000, step))
        whole.finish_step(torch.tensor(step != 4))
    state = {name: value.clone() for name, value in whole.state_dict().items()}
    assert state["tokens"].tolist() == [40_000, 60_000, 60_000]
    later = FiringTracker(F, window_tokens=40, threshold=0.1, device=torch.device("cpu"))
    later.load_state_dict(state)
    assert torch.equal(later.firing_rates()[0], whole.firing_rates()[0])
    assert later.firing_rates()[1] == whole.firing_rates()[1] == 100_000
    later.load_state_dict({**state, "tokens": state["tokens"][:2]})
    assert later.state_dict()["tokens"].tolist() == [40_000, 60_000, 40_000]
