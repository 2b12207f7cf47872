"""Truths against explicit Jacobians; a tabular policy, on which the tabular criterion must be perfect."""

from __future__ import annotations

import itertools
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from stepscope.errors import BatchError, MeasurementError, RunFolderError
from stepscope.measure.criteria.criterion import Criterion, known_criteria
from stepscope.measure.criteria.ground_truth import GroundTruth, GroundTruthOptions, ground_truths
from stepscope.measure.criteria.leaderboard import Leaderboard, RankingOptions, rank_criteria
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.differentiation import whole_function
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import read_table, write_table
from stepscope.results.criteria import Criteria, CriteriaTokens


class Bigram(nn.Module):
    """A tabular policy: the logits of a state, the last token, are a row of a table of their own."""

    def __init__(self, vocab: int = 12) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab)
        self.table = nn.Embedding(vocab, vocab)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        return SimpleNamespace(logits=self.table(input_ids))


@pytest.fixture(scope="module")
def tabular_policy() -> Policy:
    torch.manual_seed(0)
    model = Bigram().double().eval()
    state = torch.rand(12, 12, dtype=torch.float64)
    optimizer = AdamWState(
        groups=(AdamWGroup(("table.weight",), lr=1e-3, weight_decay=0.1),),
        exp_avg={"table.weight": 0.01 * (state - 0.5)},
        exp_avg_sq={"table.weight": 1e-3 * state},
        steps={"table.weight": 5},
    )
    settings = StepSettings(group_size=4, prompts_per_step=3, max_response_tokens=6, max_grad_norm=0.0)
    return Policy(model, None, settings, optimizer)


@pytest.fixture
def tabular_board(tabular_policy) -> Leaderboard:
    update = cases.batch(tabular_policy, num_prompts=6, group_size=4)
    probe = cases.batch(tabular_policy, num_prompts=4, group_size=2, seed=5)
    step = reconstruct_step(tabular_policy, update)
    return rank_criteria(tabular_policy, step, probe, options=RankingOptions(baseline="none"))


def test_the_tabular_criterion_is_perfect_on_a_tabular_policy(tabular_board):
    """Diagonal, P = 1: w_t = A / (N L), so the truth is disc_v up to a factor."""
    truth = tabular_board.truth("diagonal", "sgd")
    weights = 1 / (24 * 6)
    np.testing.assert_allclose(truth.values, weights * tabular_board.scores["disc_v"], rtol=1e-10, atol=1e-16)
    row = tabular_board.row("disc_v", truth)
    for figure in (row.spearman, row.kendall, row.pearson, row.sign_agreement):
        assert figure.value == pytest.approx(1, abs=1e-12)
        assert figure.stderr == pytest.approx(0, abs=1e-12)
    assert row.auc.value == 1
    best = tabular_board.concentration(truth)
    for share, figure in row.captured.items():
        assert figure.value == pytest.approx(best[share].value, rel=1e-12)
    assert row.gain_over_control.value > 0.05
    assert row.best_control in {c.name for c in tabular_board.criteria if c.kind == "control"}
    adaptive = tabular_board.row("disc_v", tabular_board.truth("diagonal", "adamw"))
    assert adaptive.spearman.value < 0.999


@pytest.fixture
def case(tiny_policy):
    step = cases.step(tiny_policy, num_prompts=2, group_size=3)
    probe = cases.batch(tiny_policy, num_prompts=4, group_size=2, seed=9)
    return tiny_policy, step, probe


def by_name(truths: tuple[GroundTruth, ...]) -> dict[str, GroundTruth]:
    return {t.name: t for t in truths}


def jacobians(policy: Policy, rollouts) -> tuple[Tensor, Tensor]:
    """(tok, params) of all log-probs and all entropies, one autograd call each."""
    params = list(policy.parameters.values())
    rows: tuple[list[Tensor], list[Tensor]] = ([], [])
    for prompt, response in zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True):
        out = forward(policy.model, make_batch([prompt], [response]), temperature=rollouts.temperature)
        for found, values in zip(rows, (out.logprobs[0], out.entropies[0]), strict=True):
            for value in values:
                grads = torch.autograd.grad(value, params, retain_graph=True)
                found.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows[0]), torch.stack(rows[1])


@pytest.mark.parametrize("padding", [0, 9], ids=["padding unused", "padding sampled"])
def test_truths_are_sums_of_the_explicit_matrix(tiny_policy, padding):
    """Tokens push as trained, not through the padding embedding; entropies move through it all the same."""
    policy = tiny_policy
    policy.model.get_input_embeddings().padding_idx = padding
    step = cases.step(policy, num_prompts=2, group_size=3)
    probe = cases.batch(policy, num_prompts=4, group_size=2, seed=9)
    for batch in (step.update, probe):
        assert any(padding in ids[:-1] for ids in batch.response_token_ids) == (padding > 0)
    truths = by_name(ground_truths(policy, step, probe, options=GroundTruthOptions(baseline="none")))
    assert set(truths) == {
        f"column_{p}_{v}" for p in ("sgd", "adamw") for v in ("on_policy", "fixed_prefix")
    } | {f"{k}_{p}" for k in ("row", "diagonal") for p in ("sgd", "adamw")}
    logprobs = jacobians(policy, step.update)[0]
    with whole_function(policy.model):
        entropies, probe_entropies = (jacobians(policy, batch)[1] for batch in (step.update, probe))
    weights = torch.from_numpy(np.concatenate(step.token_weights))
    flat = torch.cat([step.preconditioner[n].reshape(-1) for n in policy.parameters])
    for name, metric in (("sgd", torch.ones_like(flat)), ("adamw", flat)):
        matrix = (entropies * metric) @ logprobs.T * weights
        close = {"rtol": 1e-8, "atol": 1e-12 * float(matrix.abs().max())}
        np.testing.assert_allclose(truths[f"row_{name}"].values, matrix.sum(1), **close)
        np.testing.assert_allclose(truths[f"diagonal_{name}"].values, matrix.diagonal(), **close)
        columns = (probe_entropies * metric) @ logprobs.T * weights
        expected = columns.sum(0) / probe.num_tokens.sum()
        np.testing.assert_allclose(truths[f"column_{name}_fixed_prefix"].values, expected, **close)


def test_columns_are_influences_and_halves_make_the_whole(case):
    policy, step, probe = case
    for version in ("on_policy", "fixed_prefix"):
        truth = by_name(ground_truths(policy, step, probe, options=GroundTruthOptions(baseline="position")))[
            f"column_adamw_{version}"
        ]
        shares = influence(
            policy,
            step,
            step.update,
            probe,
            quantity=make_quantity("entropy", probe, version=version),
            options=InfluenceOptions(baseline="position"),
        )
        np.testing.assert_allclose(truth.values, np.concatenate(shares.tokens), rtol=1e-9, atol=1e-15)
        np.testing.assert_allclose(truth.halves.mean(0), truth.values, rtol=1e-9, atol=1e-15)
        assert not np.allclose(truth.halves[0], truth.halves[1])
        assert truth.folds.shape == (4, len(truth.values)), "a fold for each prompt where those are few"
        np.testing.assert_array_equal(np.bincount(truth.probe_fold), [2, 2, 2, 2])
        np.testing.assert_allclose(
            truth.without_folds, (4 * truth.values - truth.folds) / 3, rtol=1e-9, atol=1e-15
        )
        np.testing.assert_allclose(truth.halves[1], truth.folds[1::2].mean(0), rtol=1e-9, atol=1e-15)


def test_a_fold_is_to_first_order_what_its_prompts_alone_give(case):
    """Per token and on policy the mean length is a fold's own, too: explicit means, 2 folds of 5 prompts."""
    policy, step, _ = case
    probe = cases.batch(policy, num_prompts=5, group_size=2, seed=11)
    options = GroundTruthOptions(baseline="none", num_folds=3)
    truth = by_name(ground_truths(policy, step, probe, options=options))["column_sgd_fixed_prefix"]
    assert sorted(np.bincount(truth.probe_fold)) == [4, 6]
    weights = torch.from_numpy(step.update.flat(step.token_weights))
    logprobs = jacobians(policy, step.update)[0]
    entropies = jacobians(policy, probe)[1]
    lengths = probe.num_tokens
    first = np.cumsum([0, *lengths])
    sums = torch.stack([entropies[a:b].sum(0) for a, b in itertools.pairwise(first)])
    whole = sums.sum(0) / lengths.sum()
    for fold in (0, 1):
        own = truth.probe_fold == fold
        excess = sums[own].sum(0) - whole * lengths[own].sum()
        slope = whole + excess / (own.sum() * lengths.mean())
        expected = weights * (logprobs @ slope)
        np.testing.assert_allclose(truth.folds[fold], expected, rtol=1e-7, atol=1e-12)


def test_a_part_of_the_diagonal_and_tokens_without_weight(case):
    policy, step, probe = case
    silent = replace(step, token_weights=(np.zeros(len(step.token_weights[0])), *step.token_weights[1:]))
    pushed = np.flatnonzero(np.concatenate(silent.token_weights))
    whole = by_name(ground_truths(policy, silent, probe, options=GroundTruthOptions(baseline="none")))
    part = by_name(
        ground_truths(
            policy,
            silent,
            probe,
            options=GroundTruthOptions(baseline="none", max_diagonal=4),
            budget=Budget(max_sequences=3),
        )
    )
    np.testing.assert_array_equal(whole["diagonal_sgd"].chosen, pushed)
    np.testing.assert_array_equal(whole["column_sgd_on_policy"].chosen, pushed)
    assert len(whole["row_sgd"].chosen) == step.update.num_tokens.sum()
    chosen = part["diagonal_sgd"].chosen
    assert len(chosen) == 4
    np.testing.assert_allclose(
        part["diagonal_sgd"].values[chosen], whole["diagonal_sgd"].values[chosen], rtol=1e-9
    )
    assert np.isnan(np.delete(part["diagonal_sgd"].values, chosen)).all()
    assert f"4 tokens drawn at random from {len(pushed)}" in part["diagonal_sgd"].method


def test_a_criterion_of_ones_own(case):
    """A function over the token table; here the truth itself, looked up."""
    policy, step, probe = case
    truth = by_name(ground_truths(policy, step, probe, options=GroundTruthOptions(baseline="none")))[
        "column_adamw_on_policy"
    ]
    mine = Criterion("mine", lambda f: truth.values, "the truth")
    controls = [c for c in known_criteria() if c.kind == "control"]
    board = rank_criteria(
        policy,
        step,
        probe,
        criteria=[*controls, mine],
        options=RankingOptions(baseline="none"),
    )
    row = board.row("mine", truth)
    assert row.spearman.value == pytest.approx(1)
    assert row.gain_over_control.value > 0
    assert row.gain_over_control.n == 2
    assert board.row("neg_A", truth).gain_over_control is None
    assert board.row("mine", truth, level="sequence").spearman.value == pytest.approx(1)
    with pytest.raises(MeasurementError, match="not ranked"):
        board.row("disc_v", truth)
    with pytest.raises(MeasurementError, match="mine is there twice"):
        rank_criteria(policy, step, probe, criteria=[mine, mine])


def test_what_is_stored(tabular_board, tmp_path):
    data = tabular_board.report().to_plain()
    assert data["truths"] == ["column", "row", "diagonal"]
    assert data["preconditioners"] == ["sgd", "adamw"]
    names = {c.name for c in known_criteria() if not c.needs}  # a table has no head
    assert set(data["definitions"]) == names
    ranked = {
        (r["criterion"], r["level"], r["truth"], r["preconditioner"], r["version"]) for r in data["rows"]
    }
    assert len(ranked) == len(data["rows"])
    assert {r["criterion"] for r in data["rows"]} == names
    for r in data["rows"]:
        both_ways = r["spearman"]["method"] == "jackknife over 6 update prompts and 4 probe prompts"
        assert both_ways == (r["truth"] == "column"), "rows and diagonals are of the update batch alone"
    row = next(r for r in data["rows"] if r["criterion"] == "cov_batch" and r["truth"] == "column")
    assert row["quantity"] == "entropy"
    assert set(row["captured"]) == {"0.0002", "0.01", "0.1"}
    assert set(row["spearman"]) == {
        "value",
        "stderr",
        "n",
        "unit",
        "method",
        "reliable",
        "reason",
        "low",
        "high",
    }
    flat = next(r for r in data["rows"] if r["criterion"] == "clip_lohi")
    assert not flat["spearman"]["reliable"]
    assert "the same for all" in flat["spearman"]["reason"]
    tables = {(t["level"], t["truth"], t["preconditioner"], t["version"]) for t in data["tables"]}
    assert len(tables) == len(data["tables"]) == 8 + 6
    for table in data["tables"]:
        assert (table["reliability"] is None) == (table["truth"] != "column")
        if table["reliability"] is not None:
            assert "conditional on the probe batch" in table["reliability"]["method"]
    text = tabular_board.report().to_json()
    assert Criteria.from_json(text, "criteria.json").to_json() == text
    path = tmp_path / "criteria_tokens.parquet"
    columns = tabular_board.tokens().to_pandas()
    assert {"sequence_id", "position", "disc_v", "column_adamw_on_policy", "diagonal_sgd"} <= set(columns)
    tabular_board.tokens().write(path)
    read = CriteriaTokens.read(path)
    np.testing.assert_array_equal(read.values["disc_v"], tabular_board.scores["disc_v"])
    np.testing.assert_array_equal(read.position, tabular_board.facts.position)
    write_table(read_table(path).drop_columns(["position"]), path)
    with pytest.raises(RunFolderError, match="position missing"):
        CriteriaTokens.read(path)


def test_refusals(case):
    policy, step, _ = case
    with pytest.raises(BatchError, match="one prompt only"):
        ground_truths(policy, step, cases.batch(policy, num_prompts=1, group_size=4, seed=3))
