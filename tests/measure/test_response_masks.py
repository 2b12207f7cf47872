"""Tool use in two turns: tokens that the policy did not write are context, and every figure is the hand's."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
from stepscope.errors import BatchError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.criteria.facts import token_facts
from stepscope.measure.criteria.ground_truth import ground_truths
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.kernel.fisher import fisher_kernel, split_tokens
from stepscope.measure.noise.scale import noise_scale
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.loss.surrogate import token_weights
from stepscope.policy.numerics.precision import matching_precision
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted
from stepscope.report.sections.responses import join_tokens, shown_responses
from stepscope.results import FloatArray, Rollouts, RolloutTokens

PROMPTS = [(2, 3), (2, 3), (4, 5, 6), (4, 5, 6)]
RESPONSES = [(7, 8, 9, 10, 11, 3, 1), (5, 1), (6, 2, 2, 4, 1), (3, 3, 8, 9, 10)]
CALLS = [[1, 1, 0, 0, 0, 1, 1], [1, 1], [1, 0, 0, 1, 1], [1, 1, 1, 0, 0]]
"""1 where the policy wrote the token; the last response was cut behind what the tool said."""
REWARDS = np.array([1.0, 0.0, 0.3, 0.1])
ADVANTAGES = np.array([0.5, -0.5, 0.1, -0.1])


def masks(rows: list[list[int]]) -> tuple[Any, ...]:
    return tuple(np.array(row, dtype=bool) for row in rows)


def tool_use(policy: Policy, name: str = "p", **fields: Any) -> Rollouts:
    drawn = cases.rollouts(
        PROMPTS,
        RESPONSES,
        prompt_ids=tuple(f"{name}{p}" for p in PROMPTS),
        rewards=REWARDS,
        correct=REWARDS > 0.5,
        truncated=np.array([False, False, False, True]),
        advantages=ADVANTAGES,
        response_masks=masks(CALLS),
        temperature=policy.settings.temperature,
        max_response_tokens=7,
        **fields,
    )
    return cases.scored(policy, drawn)


@dataclass(frozen=True)
class Said:
    """What the policy says of the tokens of one response that it wrote: (tok,) log-probs and entropies."""

    logprobs: Tensor
    entropies: Tensor

    def __len__(self) -> int:
        return len(self.logprobs)


def by_hand(policy: Policy, update: Rollouts) -> list[Said]:
    """From the plain model, one sequence at a time and one token at a time."""
    found = []
    rows = zip(update.prompt_token_ids, update.response_token_ids, CALLS, strict=True)
    for prompt, response, call in rows:
        with matching_precision(policy.model):
            logits = policy.model(torch.tensor([[*prompt, *response]])).logits[0] / update.temperature
        own = []
        for k, token in enumerate(response):
            log_pi = torch.log_softmax(logits[len(prompt) + k - 1], -1)
            if call[k]:
                own.append((log_pi[token], -(log_pi.exp() * log_pi).sum()))
        found.append(Said(*(torch.stack(part) for part in zip(*own, strict=True))))
    return found


@pytest.fixture(scope="module")
def policy() -> Policy:
    return cases.policy(temperature=0.8, max_grad_norm=0.0, max_response_tokens=7)


@pytest.fixture(scope="module")
def step(policy: Policy) -> Step:
    return reconstruct_step(policy, tool_use(policy))


def test_logprobs_and_entropies_are_the_hands_and_zero_on_what_the_tool_said(policy: Policy) -> None:
    update = tool_use(policy)
    for i, (said, mask) in enumerate(zip(by_hand(policy, update), masks(CALLS), strict=True)):
        for values, wanted in ((update.logprobs[i], said.logprobs), (update.entropies[i], said.entropies)):
            assert values[mask] == pytest.approx(wanted.tolist(), abs=1e-12)
            assert not values[~mask].any()
    assert update.num_tokens.tolist() == [7, 2, 5, 5]
    assert update.num_policy_tokens.tolist() == [4, 2, 3, 3]


def hand_loss(rows: list[Said], loss_type: str, longest: int) -> Tensor:
    """The loss on policy, -A l of every token, with the averaging of its kind."""
    sums = torch.stack([-a * said.logprobs.sum() for a, said in zip(ADVANTAGES.tolist(), rows, strict=True)])
    counts = torch.tensor([len(said) for said in rows])
    if loss_type == "grpo":
        return (sums / counts).mean()
    if loss_type == "luspo":
        return sums.mean()
    return sums.sum() / (len(rows) * longest if loss_type == "dr_grpo" else counts.sum())


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo"])
def test_the_losss_gradient_is_the_hands(policy: Policy, loss_type: str) -> None:
    own = replace(policy, settings=replace(policy.settings, loss_type=loss_type, epsilon_high=5.0))
    update = tool_use(own)
    weights = token_weights(update, own.settings)
    for row, mask in zip(weights, masks(CALLS), strict=True):
        assert not row[~mask].any()
    rows = by_hand(own, update)
    loss = hand_loss(rows, loss_type, own.settings.max_response_tokens)
    wanted = torch.autograd.grad(loss, list(own.parameters.values()))
    found = reconstruct_step(own, update).ascent
    for name, gradient in zip(own.parameters, wanted, strict=True):
        torch.testing.assert_close(found[name], -gradient, rtol=0, atol=1e-12)


def test_masked_truncation_and_advantages_per_token_keep_to_the_mask(policy: Policy) -> None:
    settings = replace(policy.settings, mask_truncated=True, loss_type="dapo")
    update = tool_use(policy)
    weights = token_weights(update, settings)
    assert not weights[3].any()
    assert weights[0][masks(CALLS)[0]] == pytest.approx([0.5 / 9] * 4)  # 4 + 2 + 3 tokens in the loss
    per_token = tuple(np.arange(1.0, len(r) + 1) for r in RESPONSES)
    weights = token_weights(replace(update, token_advantages=per_token), settings)
    assert weights[2].tolist() == pytest.approx([1 / 9, 0, 0, 4 / 9, 5 / 9])


def test_gradients_of_the_tools_tokens_are_exactly_zero(policy: Policy, step: Step) -> None:
    slopes = directional_derivative(policy, step.update, response_logprob, step.direction)
    for row, mask in zip(slopes, masks(CALLS), strict=True):
        assert not row.numpy()[~mask].any()
        assert row.numpy()[mask].all()
    table = values_at(policy, step.update, [make_quantity("entropy", step.update)], step.direction, 1e-3)
    for i, mask in enumerate(masks(CALLS)):
        assert not table.logprobs[i, : len(mask)][~mask].any()
        assert not table.prefix[0, i, : len(mask)][~mask].any()


def quantity_of(said: Said, quantity: str, reward: float) -> Tensor:
    """(tok,) f_k."""
    ones = torch.ones(len(said), dtype=torch.float64)
    last = torch.nn.functional.one_hot(torch.tensor(len(said) - 1), len(said)).double()
    return {"entropy": said.entropies, "length": ones, "reward": reward * last, "logprob": said.logprobs}[
        quantity
    ]


@pytest.mark.parametrize("quantity", ["entropy", "length", "reward", "logprob"])
def test_quantities_and_their_changes_are_the_hands(policy: Policy, step: Step, quantity: str) -> None:
    """Per decision, without a baseline: sum_k rho_{<k} f'_k - f_k over the policy's tokens, by hand."""
    probe, lr = step.update, 1e-2
    found = measure_change(
        policy,
        step,
        probe,
        quantity=make_quantity(quantity, probe, normalisation="per_seq"),
        lrs=[lr],
        options=ChangeOptions(baseline="none"),
    )
    before = by_hand(policy, probe)
    with shifted(policy.parameters, step.direction, lr):
        after = by_hand(policy, probe)
    totals, changes = [], []
    for old, new, reward in zip(before, after, REWARDS.tolist(), strict=True):
        values = [quantity_of(said, quantity, reward).detach().numpy() for said in (old, new)]
        through = np.exp(np.cumsum((new.logprobs - old.logprobs).detach().numpy()))
        rho = through if quantity in ("reward", "logprob") else np.array([1.0, *through[:-1]])
        totals.append(values[0].sum())
        changes.append(rho @ values[1] - values[0].sum())
    point = next(p for p in found.points if p.lr == lr)
    assert found.value.value == pytest.approx(np.mean(totals), abs=1e-12)
    assert point.true.value == pytest.approx(np.mean(changes), abs=1e-10)


def test_per_token_counts_the_policys_tokens(policy: Policy, step: Step) -> None:
    found = measure_change(policy, step, step.update, lrs=[1e-3], options=ChangeOptions(baseline="none"))
    rows = by_hand(policy, step.update)
    wanted = sum(float(said.entropies.detach().sum()) for said in rows) / sum(map(len, rows))
    assert found.value.value == pytest.approx(wanted, abs=1e-12)


def surrounded(policy: Policy) -> tuple[Rollouts, Rollouts]:
    """A batch whose responses begin and end with a tool's tokens, and the same with those taken away."""
    inner = cases.batch(policy)
    rng = np.random.default_rng(4)
    heads, tails = ([tuple(rng.integers(2, 12, n).tolist()) for _ in range(len(inner))] for n in (2, 3))
    prompts, responses = inner.prompt_token_ids, inner.response_token_ids
    plain = replace(inner, prompt_token_ids=tuple((*p, *h) for p, h in zip(prompts, heads, strict=True)))
    zeros = tuple(np.zeros(2 + len(r) + 3) for r in responses)
    masked = replace(
        inner,
        response_token_ids=tuple((*h, *r, *t) for h, r, t in zip(heads, responses, tails, strict=True)),
        response_masks=masks([[0] * 2 + [1] * len(r) + [0] * 3 for r in responses]),
        logprobs=zeros,
        entropies=zeros,
    )
    return cases.scored(policy, masked), cases.scored(policy, plain)


def test_a_tools_tokens_before_and_behind_are_prompt_and_nothing(policy: Policy) -> None:
    """Step, change, influence, kernel, noise, truths and token table are those without such tokens."""
    masked, plain = surrounded(policy)
    steps = [reconstruct_step(policy, batch) for batch in (masked, plain)]
    for name in policy.parameters:
        torch.testing.assert_close(steps[0].direction[name], steps[1].direction[name], rtol=0, atol=1e-11)
    found = []
    for own, batch in zip(steps, (masked, plain), strict=True):
        changes = [
            measure_change(
                policy, own, batch, lrs=[1e-3, 1e-2], options=ChangeOptions(baseline=b, second_order=True)
            )
            for b in ("current", "position", "ridge")
        ]
        shares = influence(policy, own, batch, batch, options=InfluenceOptions(num_folds=2))
        kernel = fisher_kernel(policy, batch, preconditioner=own.preconditioner, tokens=True)
        facts = token_facts(policy, batch)
        truths = ground_truths(policy, own, batch)
        found.append(
            [
                [e.value for c in changes for p in c.points for e in (p.true, p.linear, p.second_order)],
                [p.effective_sample_size for c in changes for p in c.points],
                shares.sequences,
                shares.token_rows().influence,
                shares.token_rows().stderr,
                shares.fold_sequences,
                *kernel.matrices().values(),
                noise_scale(policy, batch).sgd.noise.value,
                facts.logprob,
                facts.entropy,
                facts.advantage,
                facts.lengths,
                *(truth.values for truth in truths),
            ]
        )
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(
            np.asarray(one, dtype=float), np.asarray(other, dtype=float), rtol=1e-7, atol=1e-9
        )


def test_influence_of_tokens_has_rows_of_the_policys_tokens_alone(policy: Policy, step: Step) -> None:
    shares = influence(
        policy, step, step.update, tool_use(policy, "other"), options=InfluenceOptions(num_folds=2)
    )
    rows = shares.token_rows()
    places = [(i, k) for i, mask in enumerate(CALLS) for k, own in enumerate(mask) if own]
    assert list(zip(rows.sequence_id.tolist(), rows.position.tolist(), strict=True)) == places
    for tokens, mask in zip(shares.tokens, masks(CALLS), strict=True):
        assert not tokens[~mask].any()
    assert shares.fold_sequences.shape == (2, 4)
    assert shares.folds.shares @ shares.fold_sequences == pytest.approx(shares.sequences)
    assert rows.influence.sum() == pytest.approx(shares.sequences.sum())
    single, index = split_tokens(step.update)
    assert [tuple(pair) for pair in index.tolist()] == places
    assert single.prompt_token_ids[2] == (*PROMPTS[0], *RESPONSES[0][:5])  # what the tool said is its prefix


def test_files_hold_masks_and_advantages_per_token(policy: Policy, tmp_path: Path) -> None:
    per_token: tuple[FloatArray, ...] = tuple(np.arange(len(r), dtype=float) for r in RESPONSES)
    batch = replace(tool_use(policy), token_advantages=per_token)
    names = [["t"] * len(r) for r in RESPONSES]
    batch.to_parquet(tmp_path / "u.parquet", tmp_path / "u_tokens.parquet", tokens=names)
    back = Rollouts.from_parquet(tmp_path / "u.parquet", tmp_path / "u_tokens.parquet")
    for one, other in ((back.response_masks, batch.response_masks), (back.token_advantages, per_token)):
        assert one is not None
        assert other is not None
        assert all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))
    tokens = RolloutTokens.read(tmp_path / "u_tokens.parquet")
    shown = shown_responses(batch, join_tokens(batch, tokens), [0], 1.0, 100)[0]
    assert [span.context for span in shown.tokens] == [not own for own in CALLS[0]]
    assert "4 tokens, and 3 of tools" in shown.facts
    chosen = batch.select([2, 0])
    assert chosen.response_masks is not None
    assert chosen.response_masks[1].tolist() == [bool(own) for own in CALLS[0]]


def test_batches_that_break_the_mask_are_refused(policy: Policy) -> None:
    batch = tool_use(policy)
    with pytest.raises(BatchError, match="no token that the policy wrote"):
        replace(batch, response_masks=masks([[0] * 7, *CALLS[1:]]))
    with pytest.raises(BatchError, match="sequence 1 has 3 response_masks for 2"):
        replace(batch, response_masks=masks([CALLS[0], [1, 1, 1], *CALLS[2:]]))
    wrong = (batch.logprobs[0] - 1.0, *batch.logprobs[1:])
    with pytest.raises(BatchError, match="logprobs of tokens that the policy did not write"):
        replace(batch, logprobs=wrong)
