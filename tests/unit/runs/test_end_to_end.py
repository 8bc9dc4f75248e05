"""The end-to-end losses against transformers and autograd alone: one sequence at a time, a hook made by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from saetrain.activations.mlm_masking import select_masked_positions
from saetrain.activations.normalize import Normalizer
from saetrain.cli import parse_train
from saetrain.coders.topk import TopK
from saetrain.errors import SaetrainError
from saetrain.runs.train.batches import SequenceBatches, build_batch_source
from saetrain.runs.train.builders import build_trainer
from saetrain.runs.train.setup import RunContext, prepare_run
from saetrain.training.sae_state import SaeState
from saetrain.training.trainer import SiteBatches
from saetrain.types import Codes, TokenSequence

SIZES = "--layers 1 --k 4 --num_latents 64 --batch_size 3 --grad_acc_steps 2 --ctx_len 24 --max_tokens 2880"
SEED = 42
MODELS = pytest.mark.parametrize("model", ["tiny_gpt2", "tiny_mlm"])
LOSSES = pytest.mark.parametrize("loss", ["ce", "kl"])
WEIGHT = 0.3


class Ready:
    """A run up to its first step."""

    def __init__(self, model: str, text: str, *words: str) -> None:
        self.run: RunContext = prepare_run(parse_train([model, text, *SIZES.split(), *words]))
        self.trainer, normalizers = build_trainer(self.run, None)
        ((self.hookpoint, self.normalizer),) = normalizers.items()
        self.sae: SaeState = self.trainer.saes[self.hookpoint]
        self.feed = build_batch_source(self.run, normalizers)
        assert isinstance(self.feed, SequenceBatches)

    def batches(self, number: int) -> SiteBatches:
        """Micro-batches ``number`` of the run."""
        return self.feed.exchange_parts(number, self.feed.fetch_local_part(number))

    def gradients(self) -> dict[str, Tensor]:
        """Of the first step's loss, by both its micro-steps."""
        self.sae.coder.zero_grad()
        for number in range(2):
            batch: Any = self.batches(number)[self.hookpoint]
            self.sae.forward_backward(batch, self.sae.build_context(0, self.trainer.tokens_per_step, 1))
        return {name: p.grad.clone() for name, p in self.sae.coder.named_parameters() if p.grad is not None}

    def sequences(self) -> list[TokenSequence]:
        """The first step's: the first one of each shard in turn."""
        return [
            self.run.train_source.read(shard, self.run.train_source.start_cursor, 1)[0][-1][0] for shard in range(6)
        ]


@pytest.fixture
def ready(request: pytest.FixtureRequest, topics_jsonl: str) -> Callable[..., Ready]:
    return lambda model, *words: Ready(request.getfixturevalue(model), topics_jsonl, *words)


def module_of(model: Any, hookpoint: str) -> torch.nn.Module:
    return model.base_model.get_submodule(hookpoint)  # type: ignore[no-any-return]


def run_with(model: Any, hookpoint: str, ids: Tensor, replace: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits (S, V) with the hookpoint's output replaced by a hook made here."""

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (replace(output[0]), *output[1:])
        return replace(output)

    handle = module_of(model, hookpoint).register_forward_hook(hook)
    try:
        return model(input_ids=ids[None]).logits[0]
    finally:
        handle.remove()


def rebuilt(weights: dict[str, Tensor], x: Tensor, normalizer: Normalizer, k: int) -> tuple[Tensor, Tensor]:
    """(reconstruction, what the coder sees) of raw activations (N, D), by dense products."""
    inner = (x - normalizer.mean) / normalizer.scale @ normalizer.axes
    pre = (inner - weights["b_dec"]) @ weights["W_enc"] + weights["b_enc"]
    values, indices = pre.topk(k, dim=1)
    code = torch.zeros_like(pre).scatter(1, indices, values.relu())
    return code @ weights["W_dec"] + weights["b_dec"], inner


def loss_by_hand(ready: Ready, model: Any, weights: dict[str, Tensor], causal: bool) -> Tensor:
    """The step's loss, from the run's sequences and constants and nothing else of it."""
    loss_fn = ready.run.config.train.loss_fn
    limit = ready.run.extractor.norm_limits[ready.hookpoint]
    total, recon, scored, kept = torch.zeros(()), torch.zeros(()), 0, 0
    for number, sequence in enumerate(ready.sequences()):
        ids = torch.from_numpy(sequence.ids).long()
        asked = torch.from_numpy(select_masked_positions(sequence, (SEED << 40) + number))
        labels = torch.where(asked, ids, -100)
        if causal:
            labels = torch.cat([ids[1:], torch.tensor([-100])])
            asked = labels >= 0
        else:
            ids = ids.masked_fill(asked, 103)
        text = torch.from_numpy(sequence.kind == 0)
        seen: list[Tensor] = []

        def splice(x: Tensor, text: Tensor = text, seen: list[Tensor] = seen) -> Tensor:
            where = text & (x[0].norm(dim=1) <= limit)
            estimate, inner = rebuilt(weights, x[0][where].detach(), ready.normalizer, ready.sae.coder.k)  # type: ignore[arg-type]
            seen.append((inner - estimate).pow(2).sum())
            out = x.clone()
            out[0, where] = estimate @ ready.normalizer.axes.T * ready.normalizer.scale + ready.normalizer.mean
            return out

        logits = run_with(model, ready.hookpoint, ids, splice)
        if loss_fn == "ce":
            total = total + cross_entropy(logits, labels, reduction="sum")
        else:
            with torch.no_grad():
                clean = log_softmax(run_with(model, ready.hookpoint, ids, lambda x: x), dim=1)
            parts = kl_div(log_softmax(logits, dim=1), clean, log_target=True, reduction="none").sum(dim=1)
            total = total + parts[asked].sum()
        recon, scored, kept = recon + seen[0], scored + int(asked.sum()), kept + int(text.sum())
    return total / scored + WEIGHT * recon / (kept * ready.normalizer.scaled_variance)


@MODELS
@LOSSES
def test_loss_and_gradients_equal_those_computed_by_hand(model: str, loss: str, ready: Callable[..., Ready]) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForMaskedLM

    made = ready(model, "--loss_fn", loss, "--e2e_recon_weight", str(WEIGHT))
    causal = model == "tiny_gpt2"
    # Behind BERT's layer norm all activations are as long.
    if causal:
        made.run.extractor.norm_limits[made.hookpoint] = float(
            made.normalizer.mean.norm() + made.normalizer.variance**0.5
        )
    auto = AutoModelForCausalLM if causal else AutoModelForMaskedLM
    plain = auto.from_pretrained(made.run.model.name).eval().requires_grad_(False)
    weights = {name: p.detach().clone().requires_grad_() for name, p in made.sae.coder.named_parameters()}
    expected = loss_by_hand(made, plain, weights, causal)
    expected.backward()
    found = made.gradients()
    assert made.sae.stats is not None
    there = sum(int((s.kind == 0).sum()) for s in made.sequences())
    assert 0 < made.sae.stats.tokens < there or not causal, "the limit does act"
    assert float(sum(made.sae.stats.losses.values())) == pytest.approx(expected.item(), rel=1e-5)
    for name, weight in weights.items():
        assert weight.grad is not None
        assert weight.grad.abs().max() > 0
        scale = float(weight.grad.abs().max())
        torch.testing.assert_close(found[name], weight.grad, rtol=1e-3, atol=1e-4 * scale, msg=name)


def perfect(width: int) -> TopK:
    """f = (ReLU(x), ReLU(-x)), x̂ = x."""
    coder = TopK(width, 2 * width, 2 * width)
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    with torch.no_grad():
        coder.W_dec.copy_(both)
        coder.W_enc.copy_(both.T)
    return coder


def terms_of(made: Ready, coder: TopK) -> dict[str, float]:
    """The loss terms of the first micro-batch under another coder."""
    batch: Any = made.batches(0)[made.hookpoint]
    x = made.normalizer(batch.x_ND)
    with torch.no_grad():
        terms = batch.objective(coder.decode(coder.encode(x)), {"recon": torch.zeros(())})
        return {name: float(value) for name, value in terms.items()}


@MODELS
def test_the_kl_of_a_perfect_sae_is_zero_and_its_ce_the_model_s(model: str, ready: Callable[..., Ready]) -> None:
    one_step = ("--grad_acc_steps", "1")
    made = ready(model, "--loss_fn", "kl", *one_step)
    assert abs(terms_of(made, perfect(32))["kl"]) < 1e-6
    zero = perfect(32)
    with torch.no_grad():
        zero.W_dec.zero_()
    assert terms_of(made, zero)["kl"] > 1e-5, "not whatever is spliced in"
    made = ready(model, "--loss_fn", "ce", *one_step)
    lm_batch = made.feed._step_lm_batches[0] if made.batches(0) else None  # type: ignore[attr-defined]
    assert lm_batch is not None
    assert made.run.head is not None
    with torch.no_grad():
        logits = made.run.head.compute_logits(lm_batch.input_ids, lm_batch.attention_mask)[lm_batch.scored_mask]
    clean = cross_entropy(logits, lm_batch.targets)
    made.feed.load_state_dict({str(shard): [0] for shard in range(16)})
    assert terms_of(made, perfect(32))["ce"] == pytest.approx(float(clean), rel=1e-5)


@MODELS
def test_special_tokens_and_first_positions_keep_their_activation(model: str, ready: Callable[..., Ready]) -> None:
    made = ready(model, "--loss_fn", "kl")
    batch: Any = made.batches(0)[made.hookpoint]
    assert len(batch.x_ND) == sum(int((s.kind == 0).sum()) for s in made.sequences()[:3])
    assert batch.step_tokens == sum(int((s.kind == 0).sum()) for s in made.sequences())


def test_masks_differ_between_passes_over_the_text(ready: Callable[..., Ready]) -> None:
    made = ready("tiny_mlm", "--loss_fn", "kl")
    made.batches(0)
    first = [lm_batch.scored_mask for lm_batch in made.feed._step_lm_batches]  # type: ignore[attr-defined]
    made.feed.load_state_dict({str(shard): [0] for shard in range(16)})
    made.batches(0)
    again = [lm_batch.scored_mask for lm_batch in made.feed._step_lm_batches]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True)), "a function of the position alone"
    made.feed.load_state_dict({str(shard): [0] for shard in range(16)})
    made.batches(32)
    later = [lm_batch.scored_mask for lm_batch in made.feed._step_lm_batches]  # type: ignore[attr-defined]
    assert [s.shape for s in later] == [s.shape for s in first], "the same sequences"
    assert not all(torch.equal(a, b) for a, b in zip(first, later, strict=True))


@MODELS
def test_a_bfloat16_model_is_scored_in_float32(model: str, ready: Callable[..., Ready]) -> None:
    wide = ready(model, "--loss_fn", "kl")
    made = ready(model, "--loss_fn", "kl", "--dtype", "bfloat16")
    # Their principal axes differ, so the same SAE has other weights there.
    turn = made.normalizer.axes.T @ wide.normalizer.axes
    turned = Normalizer(torch.zeros(32), 1.0, turn, 1.0)
    same = wide.sae.coder.folded(turned, turned)
    made.sae.coder.load_state_dict(same.state_dict())
    found, expected = made.gradients(), wide.gradients()
    found |= {"W_enc": turn.T @ found["W_enc"], "W_dec": found["W_dec"] @ turn, "b_dec": found["b_dec"] @ turn}
    assert made.sae.stats is not None
    assert made.sae.stats.losses["kl"].dtype == torch.float32
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        cosine = torch.cosine_similarity(gradient.flatten(), expected[name].flatten(), dim=0)
        assert cosine > 0.9, (name, float(cosine))


def test_no_memory_for_the_model_is_said_with_what_to_lower(
    ready: Callable[..., Ready], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = ready("tiny_gpt2", "--loss_fn", "kl")

    def fail(head: Any, lm_batch: Any) -> Tensor:
        raise MemoryError

    monkeypatch.setattr("saetrain.runs.train.end_to_end.scored_log_probs", fail)
    with pytest.raises(SaetrainError, match="while the model read 3 x 24 tokens: lower --batch_size from 3 to 1"):
        made.batches(0)


def test_codes_are_those_of_the_coder(ready: Callable[..., Ready]) -> None:
    made = ready("tiny_gpt2", "--loss_fn", "kl")
    made.gradients()
    assert made.sae.stats is not None
    expected = torch.zeros(64, dtype=torch.long)
    for sequence in made.sequences():
        x = made.run.extractor.capture(torch.from_numpy(sequence.ids)[None].long(), torch.ones(1, len(sequence)).long())
        rows = made.normalizer(x[made.hookpoint][0][torch.from_numpy(sequence.kind == 0)])
        codes: Codes = made.sae.coder.encode(rows)
        expected += codes.firing_counts()
    assert torch.equal(made.sae.stats.fired, expected)
