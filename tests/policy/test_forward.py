"""The one forward pass against a naive computation, one unpadded sequence at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cases
from stepscope.errors import BatchError, MeasurementError
from stepscope.policy.forward import TokenBatch, TokenOutputs, forward, make_batch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.nested import SmoothActivations
from stepscope.policy.numerics.precision import lift_model, true_float64
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

PROMPTS = [(5, 6, 7, 8, 9, 3), (8, 9), (4,), (10, 11, 12), (6, 6, 6, 6)]
RESPONSES = [(10, 1), (15, 16, 17, 18, 19), (13, 14, 1), (1,), (20, 5, 6, 7)]


def naive(
    model: nn.Module, prompt: tuple[int, ...], response: tuple[int, ...], temperature: float
) -> TokenOutputs:
    """Full logits of one sequence without padding, mask or positions."""
    logits = model(torch.tensor([[*prompt, *response]])).logits[0] / temperature
    rows = logits[len(prompt) - 1 : -1]
    p = torch.softmax(rows, -1)
    chosen = p[torch.arange(len(response)), torch.tensor(response)]
    return TokenOutputs(torch.log(chosen), torch.distributions.Categorical(probs=p).entropy())


def make_rollouts(order: Sequence[int] = (*range(5),)) -> Rollouts:
    prompts, responses = ([ids[i] for i in order] for ids in (PROMPTS, RESPONSES))
    return cases.rollouts(prompts, responses, temperature=0.7)


def policy_of(model: nn.Module) -> Policy:
    return Policy(model=model, tokenizer=None, settings=StepSettings(temperature=0.7))


def test_padded_batch_agrees_with_unpadded_sequences(architecture: str) -> None:
    model = lift_model(cases.model(architecture))
    batch = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        outputs = forward(model, batch, temperature=0.7, keep_logits=True, keep_hidden=True)
    assert outputs.logits is not None
    assert outputs.hidden is not None
    assert outputs.logits.shape == (5, 5, 23)
    assert outputs.hidden.shape[:2] == (5, 5)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with torch.no_grad(), true_float64():
            expected = naive(model, prompt, response, 0.7)
        n = len(response)
        torch.testing.assert_close(outputs.logprobs[i, :n], expected.logprobs, rtol=0, atol=1e-12)
        torch.testing.assert_close(outputs.entropies[i, :n], expected.entropies, rtol=0, atol=1e-12)
        assert not outputs.logprobs[i, n:].any()
        assert not outputs.entropies[i, n:].any()


def test_sums_of_squares_are_there_on_request() -> None:
    model = lift_model(cases.model())
    batch = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        out = forward(model, batch, temperature=0.7, keep_logits=True, keep_squares=True)
        assert forward(model, batch, temperature=0.7).collisions is None
    assert out.logits is not None
    log_pi = torch.log_softmax(out.logits, -1)
    squares = torch.exp(2 * log_pi)
    mask = batch.response_mask
    inner = (squares * (log_pi + out.entropies.unsqueeze(-1))).sum(-1)
    assert out.collisions is not None
    assert out.discriminators is not None
    torch.testing.assert_close(out.collisions, squares.sum(-1) * mask, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(out.discriminators, inner * mask, rtol=1e-12, atol=1e-14)


def test_batch_size_order_and_padding_do_not_matter(architecture: str) -> None:
    policy = policy_of(lift_model(cases.model(architecture)))
    together, entropies = score_rollouts(policy, make_rollouts(), budget=Budget(max_sequences=8))
    order = [3, 1, 4, 0, 2]
    alone, entropies_alone = score_rollouts(policy, make_rollouts(order), budget=Budget(max_sequences=1))
    for place, i in enumerate(order):
        np.testing.assert_allclose(alone[place], together[i], rtol=0, atol=1e-13)
        np.testing.assert_allclose(entropies_alone[place], entropies[i], rtol=0, atol=1e-13)


def test_the_end_of_sequence_token_counts() -> None:
    model = cases.model()
    (logprobs, _) = score_rollouts(policy_of(model), make_rollouts())
    assert [len(row) for row in logprobs] == [len(r) for r in RESPONSES]
    with torch.no_grad():
        last = naive(model, PROMPTS[2], RESPONSES[2], 0.7).logprobs[-1]
    assert logprobs[2][-1] == pytest.approx(float(last), abs=1e-5)
    assert logprobs[2][-1] < -0.1


def test_what_stands_on_padding_changes_nothing() -> None:
    model = cases.model()
    found = []
    for pad in (0, 17):
        with torch.no_grad():
            found.append(forward(model, make_batch(PROMPTS, RESPONSES, pad_id=pad), temperature=1.0))
    mask = make_batch(PROMPTS, RESPONSES).response_mask
    torch.testing.assert_close(found[0].logprobs[mask], found[1].logprobs[mask], rtol=0, atol=1e-6)


def test_given_params_replace_the_models_own_and_lora_works() -> None:
    model = get_peft_model(
        cases.model(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    batch = make_batch(PROMPTS, RESPONSES)
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    with torch.no_grad():
        own = forward(model, batch, temperature=1.0).logprobs
        same = forward(model, batch, temperature=1.0, params=params).logprobs
        off = forward(model, batch, temperature=1.0, params={n: 0 * p for n, p in params.items()}).logprobs
        with model.disable_adapter():
            base = forward(model, batch, temperature=1.0).logprobs
    torch.testing.assert_close(own, same, rtol=0, atol=0)
    torch.testing.assert_close(off, base, rtol=0, atol=1e-6)
    assert float((own - base).abs().max()) > 1e-2


def test_bfloat16_logits_are_normalised_in_float32() -> None:
    model = cases.model().to(torch.bfloat16)
    batch = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        outputs = forward(model, batch, temperature=0.7, keep_logits=True)
    assert outputs.logits is not None
    assert outputs.logits.dtype == outputs.logprobs.dtype == outputs.entropies.dtype == torch.float32
    total = torch.logsumexp(outputs.logits.double(), -1)
    chosen = outputs.logits.double().gather(-1, batch.response_ids.unsqueeze(-1)).squeeze(-1) - total
    mask = batch.response_mask
    torch.testing.assert_close(outputs.logprobs[mask].double(), chosen[mask], rtol=0, atol=1e-6)


class Bare(nn.Module):
    """A model without logits_to_keep; with or without position_ids."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool
    ) -> Any:
        return SimpleNamespace(logits=self.model(input_ids, attention_mask, position_ids).logits)


class Positionless(Bare):
    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:  # type: ignore[override]
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


def test_models_with_fewer_arguments() -> None:
    model, batch = cases.model(), make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        full = forward(Bare(model), batch, temperature=1.0).logprobs
        torch.testing.assert_close(full, forward(model, batch, temperature=1.0).logprobs, rtol=0, atol=1e-6)
        own = forward(Positionless(model), batch, temperature=1.0).logprobs
        torch.testing.assert_close(own, full, rtol=0, atol=1e-5)
    with pytest.raises(MeasurementError, match="Positionless: its forward takes no position_ids and what it"):
        forward(Positionless(cases.model("gpt2")), batch, temperature=1.0)


def test_empty_prompt_or_response_is_refused() -> None:
    with pytest.raises(BatchError, match="sequence 1 has an empty response"):
        make_batch([(1,), (2,)], [(1,), ()])
    with pytest.raises(BatchError, match="sequence 0 has an empty prompt"):
        make_batch([()], [(1,)])


KEPT = 17
"""Tokens that the masked models below do not exclude; responses use none of the others."""


def masked(model: nn.Module, fill: float) -> nn.Module:
    """The model with the logits of all tokens from KEPT on set to ``fill``, as for a padded vocabulary."""

    def exclude(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        return torch.cat([output[..., :KEPT], torch.full_like(output[..., KEPT:], fill)], -1)

    model.get_submodule("lm_head").register_forward_hook(exclude)
    return model


def possible_batch() -> TokenBatch:
    rows = [tuple(t % KEPT for t in row) for row in RESPONSES]
    return make_batch(PROMPTS, rows)


def of_kept(outputs: TokenOutputs) -> tuple[Tensor, ...]:
    """The same functions of the logits of the kept tokens alone, by torch's own distribution."""
    assert outputs.logits is not None
    kept = torch.distributions.Categorical(logits=outputs.logits[..., :KEPT])
    p = kept.probs
    squares = p.square()
    entropies = kept.entropy()
    return entropies, squares.sum(-1), (squares * (p.log() + entropies.unsqueeze(-1))).sum(-1)


@pytest.mark.parametrize(
    ("fill", "temperature", "double"),
    [
        (-torch.inf, 0.7, True),
        (-torch.inf, 1.0, False),
        (torch.finfo(torch.float32).min, 1.0, False),
        (torch.finfo(torch.float32).min, 0.7, False),
        (torch.finfo(torch.bfloat16).min, 1.3, False),
        (torch.finfo(torch.float64).min, 0.7, True),
    ],
)
def test_excluded_tokens_add_nothing_in_any_order_and_mode(
    fill: float, temperature: float, double: bool
) -> None:
    model = lift_model(cases.model()) if double else cases.model()
    close: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12} if double else {"rtol": 1e-3, "atol": 2e-5}
    masked(model, fill)
    batch = possible_batch()
    mask = batch.response_mask
    options: dict[str, Any] = {"temperature": temperature, "keep_logits": True, "keep_squares": True}
    parameters = dict(model.named_parameters())
    generator = torch.Generator().manual_seed(1)
    tangent = {n: torch.randn(p.shape, generator=generator).to(p.dtype) for n, p in parameters.items()}

    def own(out: TokenOutputs) -> tuple[Tensor, ...]:
        assert out.collisions is not None
        assert out.discriminators is not None
        return out.entropies, out.collisions, out.discriminators

    def at(lr: Tensor, read: Callable[[TokenOutputs], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        moved = {n: p.detach() + lr * tangent[n] for n, p in parameters.items()}
        out = forward(model, batch, params=moved, **options)
        return (*(t * mask for t in read(out)), out.logprobs)

    zero = torch.zeros((), dtype=next(model.parameters()).dtype)
    one = torch.ones_like(zero)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), SmoothActivations():
        for read in (at, lambda e, r: torch.func.jvp(lambda x: at(x, r), (e,), (one,))[1]):
            values, slopes = torch.func.jvp(lambda e: read(e, own), (zero,), (one,))  # noqa: B023
            expected = torch.func.jvp(lambda e: read(e, of_kept), (zero,), (one,))  # noqa: B023
            for found, right in zip((*values, *slopes), (*expected[0], *expected[1]), strict=True):
                assert bool(found.isfinite().all())
                size = float(right.abs().max())
                torch.testing.assert_close(found / size, right / size, **close)
    gradients = []
    for read in (own, of_kept):
        out = forward(model, batch, **options)
        total = out.logprobs.sum() + sum(((t * mask).sum() for t in read(out)), torch.zeros(()))
        gradients.append(torch.autograd.grad(total, list(parameters.values())))
    for found, right in zip(*gradients, strict=True):
        assert bool(found.isfinite().all())
        torch.testing.assert_close(found, right, **close)


def test_uniform_over_the_possible_tokens() -> None:
    model = masked(lift_model(cases.model()), -torch.inf)
    with torch.no_grad():
        out = forward(model, possible_batch(), temperature=1e15, keep_squares=True)
    mask = possible_batch().response_mask
    assert out.collisions is not None
    assert out.discriminators is not None
    assert out.entropies[mask].tolist() == pytest.approx([float(np.log(KEPT))] * int(mask.sum()), rel=1e-12)
    assert out.logprobs[mask].tolist() == pytest.approx([-float(np.log(KEPT))] * int(mask.sum()), rel=1e-12)
    assert out.collisions[mask].tolist() == pytest.approx([1 / KEPT] * int(mask.sum()), rel=1e-12)
    assert out.discriminators[mask].abs().max() < 1e-14


def test_a_response_token_that_the_policy_excludes_is_named() -> None:
    model = masked(cases.model(), -torch.inf)
    with pytest.raises(MeasurementError, match=r"sequence 1, response token 2 \(id 17\): .* probability 0"):
        forward(model, make_batch(PROMPTS, RESPONSES), temperature=1.0)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_named(value: float) -> None:
    model = cases.model()

    def spoil(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = output.clone()
        output[4, -3, 7] = value
        return output

    model.get_submodule("lm_head").register_forward_hook(spoil)
    with pytest.raises(MeasurementError, match=r"sequence 4, response token 3 \(id 7\): .* not finite"):
        forward(model, make_batch(PROMPTS, RESPONSES), temperature=1.0)
