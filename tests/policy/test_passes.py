"""Micro-batches: what the budget allows, every sequence once, padding off, bars on a terminal alone."""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.values import derivatives, hidden_states, values_at
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy import memory
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.layer_gradient import LayerGradient
from stepscope.policy.gradients.products import (
    group_gradients,
    paired_dots,
    per_sequence_dot,
    per_sequence_dots,
)
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


def paired(policy: Policy, update: Rollouts) -> Tensor:
    first, second = (SequenceGradients(update, f) for f in (response_logprob, _entropies))
    return torch.from_numpy(paired_dots(policy, first, second, {"P": dict(policy.parameters)})["P"])


def _entropies(outputs: TokenOutputs, rows: TokenBatch) -> Tensor:
    return outputs.entropies


def slopes(policy: Policy, update: Rollouts, order: int) -> Tensor:
    entropy = make_quantity("entropy", update)
    found = derivatives(policy, update, [entropy], dict(policy.parameters), order=order)
    return torch.from_numpy(np.stack([table.prefix for table in found]))


RUNS: dict[str, Callable[[Policy, Rollouts], Tensor]] = {
    "step": lambda p, b: nn.utils.parameters_to_vector(reconstruct_step(p, b).direction.values()),
    "gradient": lambda p, b: nn.utils.parameters_to_vector(gradient(p, b, _entropies).values()),
    "token derivatives": lambda p, b: torch.cat(
        directional_derivative(p, b, response_logprob, dict(p.parameters))
    ),
    "double backward": lambda p, b: torch.cat(
        directional_derivative(p, b, response_logprob, dict(p.parameters), mode="double_backward")
    ),
    "first derivatives": lambda p, b: slopes(p, b, 1),
    "second derivatives": lambda p, b: slopes(p, b, 2),
    "values": lambda p, b: torch.from_numpy(values_at(p, b, [make_quantity("entropy", b)]).prefix),
    "product": lambda p, b: torch.from_numpy(
        per_sequence_dot(p, SequenceGradients(b, response_logprob), dict(p.parameters))
    ),
    "products": lambda p, b: torch.from_numpy(
        per_sequence_dots(
            p, SequenceGradients(b, response_logprob), {n: t[None] for n, t in p.parameters.items()}
        )
    ),
    "sums": lambda p, b: nn.utils.parameters_to_vector(
        group_gradients(p, SequenceGradients(b, response_logprob), b.prompt_index).values()
    ),
    "paired": paired,
    "kernel": lambda p, b: gram(p, SequenceGradients(b, response_logprob)),
    "kernel across": lambda p, b: gram(
        p, SequenceGradients(b, response_logprob), other=SequenceGradients(b, _entropies)
    ),
    "log-probs": lambda p, b: torch.from_numpy(np.concatenate(score_rollouts(p, b)[0])),
    "hidden states": lambda p, b: torch.from_numpy(hidden_states(p, b)),
}


@pytest.mark.parametrize("run", RUNS)
def test_too_little_memory_halves_the_micro_batches_and_changes_no_number(
    run: str, caplog: pytest.LogCaptureFixture
) -> None:
    plenty, scarce = cases.policy(), cases.policy()
    update = cases.batch(plenty, num_prompts=4, group_size=3)
    expected = RUNS[run](plenty, update)
    device = cases.SmallDevice(scarce.model, 3)
    torch.testing.assert_close(RUNS[run](scarce, update), expected, rtol=1e-12, atol=1e-12)
    failures = device.failures
    assert 2 <= failures <= 4  # twelve, six, five sequences of fewer tokens
    assert caplog.text.count("going on with micro-batches of half the tokens") == failures
    RUNS[run](scarce, update)
    assert device.failures == failures  # known from then on


@pytest.mark.parametrize(
    ("asked", "most"),
    [(Budget(), 32), (Budget(max_sequences=2), 32), (Budget(max_tokens=20), 20)],
)
def test_micro_batches_are_as_large_as_the_memory_at_hand(
    tiny_policy: Policy, update: Rollouts, monkeypatch: pytest.MonkeyPatch, asked: Budget, most: int
) -> None:
    """Half of a quarter, where kept gradients may take the rest, and a power of two of tokens below."""
    each = memory.cost(tiny_policy.model, "passes").token
    monkeypatch.setattr(memory, "available_bytes", lambda device: int(4 * 2 * 45 * each))
    padded = [batch.input_ids for batch, _ in sweep(tiny_policy, update, len, budget=asked)]
    assert max(ids.numel() for ids in padded) <= most
    assert max(len(ids) for ids in padded) > 1
    assert len(padded) > 1


def test_too_little_memory_for_one_sequence_says_what_to_do() -> None:
    policy = cases.policy()
    batch = cases.batch(policy)
    cases.SmallDevice(policy.model, 0)
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
