"""Kinship of a checkpoint's step: against all pairs and against differences along the step's own part."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import cases
from measure.test_influence import build_policy
from measure.test_kinship import KIN4, kin_of, pair_matrix, places
from measure.test_last_layer import masked
from stepscope.errors import MeasurementError
from stepscope.measure.ledger.kin_step import kinship
from stepscope.measure.ledger.kinship import KinOptions
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.state import Policy
from stepscope.policy.vectors import shifted
from stepscope.results.kinship import BATCH, FRESH, StepKinship


@pytest.fixture(scope="module")
def setting() -> tuple[Policy, Step]:
    """A step of clipped AdamW; of its responses some begin alike."""
    policy = build_policy()
    policy = replace(policy, settings=replace(policy.settings, max_grad_norm=0.01))
    return policy, cases.step(policy, num_prompts=9, group_size=4, seed=1)


@pytest.fixture(scope="module")
def found(setting: tuple[Policy, Step]) -> StepKinship:
    policy, step = setting
    others = cases.rollouts(
        step.update.prompt_token_ids,
        [row[:2] for row in step.update.response_token_ids[1:]] + [(3, 4, 5)],
        temperature=policy.settings.temperature,
    )
    return kinship(policy, step, fresh=cases.scored(policy, others))


def test_the_kin_are_sums_over_all_pairs(setting: tuple[Policy, Step], found: StepKinship) -> None:
    policy, step = setting
    matrix = pair_matrix(
        SimpleNamespace(policy=policy, step=step, metrics={"P": step.metric()}), step.update, "P"
    )
    ours = places(step.update)
    sums, counts = dict.fromkeys(KIN4, 0.0), dict.fromkeys(KIN4, 0)
    weights = step.update.flat(step.token_weights)
    for n, position in enumerate(ours):
        for t, token in enumerate(ours):
            kin = kin_of(position, token)
            sums[kin] += matrix[n, t] / len(ours)
            counts[kin] += int(weights[t] != 0)
    whole = sum(sums.values())
    assert found.drawn == found.tokens
    for kin in KIN4:
        row = found.of(BATCH, kin)
        assert row.influence.value == pytest.approx(sums[kin], rel=1e-9, abs=1e-11 * abs(whole))
        assert row.share.value == pytest.approx(sums[kin] / whole, rel=1e-9, abs=1e-11)
        assert row.pairs == counts[kin] > 0
        assert row.per_pair.value == pytest.approx(sums[kin] / counts[kin], rel=1e-9, abs=1e-11 * abs(whole))
        assert row.draw_stderr == 0


def test_tokens_of_an_environment_are_contexts_and_push_nothing(setting: tuple[Policy, Step]) -> None:
    """Masked ones: they are neither positions of the look nor tokens, and yet part of what stands before."""
    policy, step = setting
    update = masked(step.update)
    masks = update.written
    weights = tuple(np.where(m, w, 0.0) for m, w in zip(masks, step.token_weights, strict=True))
    everything = SimpleNamespace(policy=policy, step=step, metrics={"P": step.metric()})
    written = np.concatenate(masks)
    matrix = pair_matrix(everything, step.update, "P")[np.ix_(written, written)] / written.sum()
    ours = places(update)
    sums = dict.fromkeys(KIN4, 0.0)
    for (n, position), (t, token) in product(enumerate(ours), enumerate(ours)):
        sums[kin_of(position, token)] += matrix[n, t]
    found = kinship(policy, replace(step, update=update, token_weights=weights))
    whole = sum(sums.values())
    for kin in KIN4:
        row = found.of(BATCH, kin)
        assert row.influence.value == pytest.approx(sums[kin], rel=1e-9, abs=1e-11 * abs(whole))


def test_all_of_them_are_what_the_batch_s_part_of_the_step_does(
    setting: tuple[Policy, Step], found: StepKinship
) -> None:
    """Differences of the mean entropy at the batch's positions along P sum w grad l, clipping and all."""
    policy, step = setting
    assert step.clip_coefficient < 1
    levels = []
    for reach in (1e-5, -1e-5):
        with shifted(policy.parameters, step.components["sequences"], reach), torch.no_grad():
            batch = make_batch(step.update.prompt_token_ids, step.update.response_token_ids)
            entropies = forward(policy.model, batch, temperature=step.update.temperature).entropies
            levels.append(float(entropies[batch.response_mask].mean()))
    slope = (levels[0] - levels[1]) / 2e-5
    assert found.totals[BATCH].value == pytest.approx(slope, rel=1e-6)
    rows = [row for row in found.kin if row.look == FRESH]
    assert sum(row.influence.value for row in rows) == pytest.approx(found.totals[FRESH].value, rel=1e-12)
    assert [row.kin for row in rows] == list(KIN4)


def test_shares_of_a_batch_of_other_size_scale_other_prompts(
    setting: tuple[Policy, Step], found: StepKinship
) -> None:
    policy, step = setting
    one = kinship(policy, step, prompts=1)
    assert one.of(BATCH, "other_prompts").share.value == 0
    more = kinship(policy, step, prompts=25)
    assert (more.num_prompts, more.of_prompts) == (9, 25)
    parts = {kin: found.of(BATCH, kin).influence.value for kin in KIN4}
    parts["other_prompts"] *= 24 / 8
    for kin in KIN4:
        share = more.of(BATCH, kin)
        assert share.share.value == pytest.approx(parts[kin] / sum(parts.values()), rel=1e-9)
        assert share.influence.value == pytest.approx(found.of(BATCH, kin).influence.value, rel=1e-12)
        assert share.share.low < share.share.value < share.share.high


def test_a_share_of_nothing_resolved_is_flagged(setting: tuple[Policy, Step]) -> None:
    """Weights of random sign move the mean entropy either way."""
    policy, step = setting
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=len(row)) for row in step.token_weights)
    found = kinship(policy, replace(step, token_weights=weights))
    assert not found.totals[BATCH].resolved
    assert all("is not resolved from zero" in row.share.reason for row in found.kin)
    assert all(row.influence.reliable for row in found.kin)


def test_pairs_of_one_prompt_alone_have_no_error(setting: tuple[Policy, Step]) -> None:
    policy, step = setting
    first = step.update.prompt_index == 0
    rows = zip(step.token_weights, first, strict=True)
    alone = replace(step, token_weights=tuple(row * own for row, own in rows))
    kin = kinship(policy, alone).kin
    for row in kin:
        if row.look == BATCH and row.kin in KIN4[:2]:
            assert row.per_pair.value == pytest.approx(row.influence.value / row.pairs)
            assert math.isnan(row.per_pair.stderr)
            assert not row.per_pair.reliable


def test_what_has_no_kinship_is_refused(setting: tuple[Policy, Step]) -> None:
    policy, step = setting
    with pytest.raises(MeasurementError, match="no preconditioner"):
        kinship(policy, replace(step, preconditioner=None))
    for prompts in (0, -3):
        with pytest.raises(MeasurementError, match="expected at least 1"):
            kinship(policy, step, prompts=prompts)
    with pytest.raises(MeasurementError, match="0 tokens to look at"):
        KinOptions(tokens=0)
    alone = cases.step(policy, num_prompts=1, group_size=4, seed=2)
    assert math.isfinite(kinship(policy, alone).totals[BATCH].value)
    with pytest.raises(MeasurementError, match="a batch of 1 prompt says nothing of 16 prompts"):
        kinship(policy, alone, prompts=16)
