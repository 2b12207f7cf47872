"""Micro-batches: what the budget allows, every sequence once, padding off, bars on a terminal alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.forward import TokenBatch
from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.products import per_sequence_dot
from stepscope.policy.gradients.stream import SequenceGradients, coverage_of, stream
from stepscope.policy.passes import Budget, longest, sweep, sweep_rows, track
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


@pytest.fixture
def update() -> Rollouts:
    """Seven responses of different lengths."""
    rng = np.random.default_rng(0)
    rows = [tuple(int(t) for t in rng.integers(2, 6, size=n)) for n in rng.integers(1, 9, size=7)]
    prompts = [(2,) * (1 + i % 3) for i in range(len(rows))]
    return cases.rollouts(prompts, rows, logprobs=tuple(-rng.random(len(row)) for row in rows))


@pytest.mark.parametrize("budget", [Budget(max_sequences=2), Budget(max_sequences=99, max_tokens=30)])
def test_micro_batches_keep_to_the_budget_and_hold_each_sequence_once(
    tiny_policy: Policy, update: Rollouts, budget: Budget
) -> None:
    seen: list[int] = []
    for batch, size in sweep(tiny_policy, update, len, budget=budget):
        assert size == len(batch) <= budget.max_sequences
        padded = batch.input_ids.numel()
        assert budget.max_tokens is None or padded <= budget.max_tokens or size == 1
        seen += batch.seq_index.tolist()
    assert sorted(seen) == list(range(len(update)))
    assert longest(tiny_policy, update, 3).seq_index.tolist() == seen[:3]


def test_rows_come_without_padding_in_the_order_of_the_batch(tiny_policy: Policy, update: Rollouts) -> None:
    def ids(batch: TokenBatch) -> Tensor:
        return torch.stack([batch.response_ids, -batch.response_ids], -1)

    rows = sweep_rows(tiny_policy, update, ids, budget=Budget(max_sequences=3))
    assert [tuple(row[:, 0].tolist()) for row in rows] == list(update.response_token_ids)
    sizes = sweep_rows(tiny_policy, update, lambda b: b.response_mask.sum(1), budget=Budget())
    assert [int(size) for size in sizes] == update.num_tokens.tolist()


def test_padding_is_the_inverse_of_un_padding(tiny_policy: Policy, update: Rollouts) -> None:
    for batch, _ in sweep(tiny_policy, update, len, budget=Budget(max_sequences=3)):
        padded = batch.pad(update.logprobs, torch.zeros(batch.response_ids.shape))
        assert not padded[~batch.response_mask].any()
        for i, row in zip(batch.seq_index.tolist(), batch.unpad(padded), strict=True):
            torch.testing.assert_close(row.double().numpy(), update.logprobs[i], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("terminal", "wanted"), [(True, True), (True, False), (False, True)])
def test_bars_are_on_standard_error_where_it_is_a_terminal(
    terminal: bool, wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    budget = Budget(progress=wanted)
    nested = [(i, k) for i in track(range(2), "outer", budget) for k in track(range(2), "inner", budget)]
    assert nested == [(0, 0), (0, 1), (1, 0), (1, 1)]
    out, err = capsys.readouterr()
    assert not out
    assert "inner" not in err
    assert ("outer" in err) == (terminal and wanted)


class SmallDevice:
    """Has memory for so many sequences at a time; counts how often that did not suffice."""

    def __init__(self, model: nn.Module, room: int) -> None:
        self.room, self.failures = room, 0
        self.handle = model.model.layers[-1].mlp.register_forward_hook(self)  # type: ignore[union-attr, index]

    def __call__(self, module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
        if len(output) > self.room:
            self.failures += 1
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")


def test_too_little_memory_halves_the_micro_batches_and_changes_no_number(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def found(policy: Policy) -> dict[str, Tensor]:
        update = cases.batch(policy, num_prompts=4, group_size=3)
        one = SequenceGradients(update, response_logprob)
        u = dict(policy.parameters)
        step = reconstruct_step(policy, update)
        return {
            "direction": nn.utils.parameters_to_vector(step.direction.values()),
            "token derivatives": torch.cat(directional_derivative(policy, update, response_logprob, u)),
            "products": torch.from_numpy(per_sequence_dot(policy, one, u)),
            "kernel": gram(policy, one),
            "log-probs": torch.from_numpy(np.concatenate(score_rollouts(policy, update)[0])),
        }

    plenty, scarce = found(cases.policy()), cases.policy()
    device = SmallDevice(scarce.model, 3)
    halved = found(scarce)
    failures = device.failures
    assert 2 <= failures <= 4  # twelve, six, five sequences of fewer tokens
    found(scarce)
    assert device.failures == failures  # known from then on
    assert "going on with micro-batches of half the tokens" in caplog.text
    for name, expected in plenty.items():
        torch.testing.assert_close(halved[name], expected, rtol=1e-12, atol=1e-12)


def test_too_little_memory_for_one_sequence_says_what_to_do() -> None:
    policy = cases.policy()
    batch = cases.batch(policy)
    SmallDevice(policy.model, 0)
    with pytest.raises(MeasurementError, match=r"1 sequence\(s\) of .* tokens .*bfloat16"):
        score_rollouts(policy, batch)


def test_gradients_that_were_handed_over_are_not_taken_twice() -> None:
    """Memory that runs out in the middle of a backward pass, when part of it is in sums already."""
    policy = cases.policy()
    update = cases.batch(policy)
    coverage_of(policy, update)
    seen: list[str] = []

    def consume(gradient: LayerGradient, rows: slice) -> None:
        seen.append(gradient.name)
        if len(seen) == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with pytest.raises(MeasurementError, match="smaller batch_size"):
        stream(policy, SequenceGradients(update, response_logprob), consume)
    assert len(seen) == 3


def test_a_micro_batch_of_nothing_is_refused() -> None:
    with pytest.raises(MeasurementError, match="max_sequences is 0"):
        Budget(max_sequences=0)
