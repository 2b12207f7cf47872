"""Micro-batches: what the budget allows, every sequence once, padding off, bars on a terminal alone."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import Tensor

import cases
from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch
from stepscope.policy.passes import Budget, longest, sweep, sweep_rows, track
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


def test_a_micro_batch_of_nothing_is_refused() -> None:
    with pytest.raises(MeasurementError, match="max_sequences is 0"):
        Budget(max_sequences=0)
