"""Influence: additive, equal to the explicit P-weighted inner products, and with the errors of the change."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.change.measured import measure_change
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.criteria.pareto import drop_tokens
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.influence.shares import Influence
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.objective import quantity_objective
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import (
    Step,
    reconstruct_step,
    sequence_direction,
    step_components,
)
from stepscope.measure.step.terms import term_gradients
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.results.influence import InfluenceSequences, InfluenceTokens
from stepscope.rules import EntropyBonus
from stepscope.stats import errors_from_sums

VOCAB = 13


def build_policy(kind: str = "full", dtype: torch.dtype = torch.float64) -> Policy:
    """A random Llama with tied embeddings and an AdamW state in mid-training."""
    model = cases.model("llama", vocab_size=VOCAB, tie_word_embeddings=True)
    if kind == "lora":
        model = cases.adapted(model, r=3, target_modules="all-linear")
    if dtype == torch.float64:
        model = lift_model(model)
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = AdamWState(
        groups=(AdamWGroup(tuple(params), lr=1e-3, weight_decay=0.1),),
        exp_avg={n: 0.1 * torch.randn_like(p).detach() for n, p in params.items()},
        exp_avg_sq={n: 0.01 + 0.05 * torch.rand_like(p).detach() for n, p in params.items()},
        steps=dict.fromkeys(params, 7),
    )
    settings = StepSettings(temperature=0.9, max_response_tokens=8, max_grad_norm=0.5)
    return Policy(model.eval(), None, settings, optimizer)


@pytest.fixture(scope="module")
def setting() -> tuple[Policy, Step, Rollouts]:
    policy = build_policy()
    return (
        policy,
        cases.step(policy, num_prompts=3, group_size=4, seed=1),
        cases.batch(policy, num_prompts=6, group_size=2, seed=2),
    )


@pytest.mark.parametrize(
    ("quantity", "normalisation", "version"),
    [
        ("entropy", "per_token", "on_policy"),
        ("entropy", "per_token", "fixed_prefix"),
        ("entropy", "per_seq", "on_policy"),
        ("reward", "per_seq", "on_policy"),
        ("length", "per_seq", "on_policy"),
        ("logprob", "per_seq", "fixed_prefix"),
    ],
)
def test_parts_add_up_to_the_linear_change_with_its_error(
    setting: tuple[Policy, Step, Rollouts], quantity: str, normalisation: str, version: str
) -> None:
    policy, step, probe = setting
    chosen = make_quantity(quantity, probe, normalisation=normalisation, version=version)
    shares = influence(policy, step, step.update, probe, quantity=chosen)
    change = measure_change(policy, step, probe, lrs=[1e-4], quantity=chosen)
    whole = shares.sequences.sum() + shares.components["momentum"].value + shares.components["decay"].value
    scale = (
        np.abs(shares.sequences).sum()
        + abs(shares.components["momentum"].value)
        + abs(shares.components["decay"].value)
    )
    assert [t.sum() for t in shares.tokens] == pytest.approx(shares.sequences.tolist(), rel=1e-12)
    assert [len(t) for t in shares.tokens] == step.update.num_tokens.tolist()
    assert whole == pytest.approx(change.slope.value, abs=1e-10 * scale)
    assert shares.total.value == pytest.approx(whole, rel=1e-12)
    assert shares.total.stderr == pytest.approx(change.slope.stderr, rel=1e-8)
    assert shares.total.n == change.slope.n == 6
    assert shares.disagreement < 1e-10


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_float32_adds_up(kind: str) -> None:
    policy = build_policy(kind, torch.float32)
    step = cases.step(policy, num_prompts=3, group_size=4, seed=1)
    probe = cases.batch(policy, num_prompts=6, group_size=2, seed=2)
    shares = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="position"))
    change = measure_change(policy, step, probe, lrs=[1e-4], options=ChangeOptions(baseline="position"))
    assert shares.total.value == pytest.approx(change.slope.value, rel=1e-5)
    assert shares.disagreement < 1e-5


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_sampled_padding_tokens_are_not_trained_but_move_the_quantity(mode: str) -> None:
    """torch gives the padding embedding no gradient: the step has none, the derivative of the policy does."""
    policy = build_policy()
    policy.model.get_input_embeddings().padding_idx = 7
    update, probe = (
        cases.batch(policy, num_prompts=3, group_size=4, seed=1),
        cases.batch(policy, num_prompts=6, group_size=2, seed=2),
    )
    assert any(7 in ids[:-1] for batch in (update, probe) for ids in batch.response_token_ids)
    step = reconstruct_step(policy, update)
    shares = influence(policy, step, update, probe, options=InfluenceOptions(mode=mode, probe_resolved=True))
    change = measure_change(policy, step, probe, lrs=[1e-4])
    scale = (
        np.abs(shares.sequences).sum()
        + abs(shares.components["momentum"].value)
        + abs(shares.components["decay"].value)
    )
    assert shares.disagreement < 1e-10
    assert shares.total.value == pytest.approx(change.slope.value, abs=1e-10 * scale)
    assert shares.probe_resolved is not None
    np.testing.assert_allclose(shares.probe_resolved.mean(0), shares.sequences, rtol=1e-9)
    assert policy.model.get_input_embeddings().padding_idx == 7


def test_an_entropy_bonus_has_a_share_of_its_own() -> None:
    policy = build_policy()
    objective = EntropyBonus(coefficient=0.3)
    policy = replace(policy, settings=replace(policy.settings, objective=objective))
    step = cases.step(policy, num_prompts=3, group_size=4, seed=1)
    probe = cases.batch(policy, num_prompts=6, group_size=2, seed=2)
    shares = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="position"))
    change = measure_change(policy, step, probe, lrs=[1e-4], options=ChangeOptions(baseline="position"))
    assert shares.total.value == pytest.approx(change.slope.value, rel=1e-8)
    rest = shares.sequences.sum() + shares.components["momentum"].value + shares.components["decay"].value
    assert shares.components["bonus"].value == pytest.approx(shares.total.value - rest, rel=1e-8)
    assert shares.components["bonus"].value > 0
    assert shares.sequence_rows().component[-3:].tolist() == ["momentum", "decay", "bonus"]
    parts = step_components(step)
    assert set(parts) == {"momentum", "decay", "bonus", "sequences"}
    assert sum(part.share for part in parts.values()) == pytest.approx(1.0)
    with pytest.raises(MeasurementError, match="belongs to no sequence"):
        term_gradients(policy, step.update, remade=True)


def test_a_sum_over_the_vocabulary_has_a_share_of_its_own() -> None:
    policy, update, reference = cases.preferences("rao_blackwell")
    step = reconstruct_step(policy, update, reference=reference)
    probe = cases.batch(policy, num_prompts=6, group_size=2, seed=2)
    shares = influence(policy, step, update, probe, options=InfluenceOptions(baseline="position"))
    change = measure_change(policy, step, probe, lrs=[1e-4], options=ChangeOptions(baseline="position"))
    assert shares.total.value == pytest.approx(change.slope.value, rel=1e-8)
    parts = [value.value for value in shares.components.values()]
    assert shares.sequences.sum() + sum(parts) == pytest.approx(shares.total.value, rel=1e-8)
    assert abs(shares.components["divergence"].value) > 0.01 * abs(shares.total.value)
    full = drop_tokens(policy, step, probe, {}).full_entropy_change  # the criteria, without steps made anew
    assert full.value == pytest.approx(
        measure_change(policy, step, probe, lrs=[step.lr]).points[0].true.value, rel=1e-9
    )
    with pytest.raises(MeasurementError, match=r"sum over the vocabulary .* belongs to no sequence"):
        drop_tokens(policy, step, probe, {"all": -np.ones(int(update.num_tokens.sum()))})


def test_sequence_is_its_own_part_of_the_step(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    shares = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    bound = bind_quantity(policy, probe, "entropy", direction=step.direction, baseline="none")
    slope = {n: g / len(probe) for n, g in gradient(policy, probe, quantity_objective(bound)).items()}
    for i in range(len(step.update)):
        own = vectors.dot(slope, sequence_direction(policy, step, i))
        assert own == pytest.approx(shares.sequences[i], rel=1e-9)


@pytest.mark.parametrize("mode", ["forward", "double_backward"])
def test_token_is_its_own_part_of_the_step(setting: tuple[Policy, Step, Rollouts], mode: str) -> None:
    policy, step, probe = setting
    shares = influence(
        policy, step, step.update, probe, options=InfluenceOptions(baseline="position", mode=mode)
    )
    i = int(np.argmax(step.update.num_tokens))
    for k in range(len(shares.tokens[i])):
        weights = list(step.token_weights)
        weights[i] = np.where(np.arange(len(weights[i])) == k, weights[i], 0.0)
        alone = sequence_direction(policy, replace(step, token_weights=tuple(weights)), i)
        change = measure_change(
            policy,
            replace(step, components={"sequences": alone}),
            probe,
            lrs=[1e-4],
            options=ChangeOptions(baseline="position"),
        )
        assert shares.tokens[i][k] == pytest.approx(change.slope.value, rel=1e-8, abs=1e-12)


def test_probe_resolved_matrix_has_influence_as_mean(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    shares = influence(policy, step, step.update, probe, options=InfluenceOptions(probe_resolved=True))
    assert shares.probe_resolved is not None
    assert shares.probe_resolved.shape == (len(probe), len(step.update))
    np.testing.assert_allclose(shares.probe_resolved.mean(0), shares.sequences, rtol=1e-9)


def test_sequence_errors_are_those_of_its_own_change(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    shares = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="ridge"))
    for i in (0, 5):
        own = replace(step, components={"sequences": sequence_direction(policy, step, i)})
        change = measure_change(policy, own, probe, lrs=[1e-4], options=ChangeOptions(baseline="ridge"))
        assert shares.stderr[i] == pytest.approx(change.slope.stderr, rel=1e-8)


def test_pooled_prompts_give_errors_of_the_same_size() -> None:
    policy = build_policy()
    step = cases.step(policy, num_prompts=3, group_size=4, seed=1)
    probe = cases.batch(policy, num_prompts=60, group_size=1, seed=3)
    exact = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="position"))
    pooled = influence(
        policy, step, step.update, probe, options=InfluenceOptions(baseline="position", max_groups=20)
    )
    np.testing.assert_allclose(pooled.sequences, exact.sequences, rtol=1e-9)
    assert pooled.total.n == 20
    assert "pooled" in pooled.total.method
    ratio = pooled.stderr / exact.stderr
    assert 0.6 < np.median(ratio) < 1.6


def test_errors_cover_the_spread_over_probe_batches() -> None:
    """Standard errors against the scatter of the estimate over independent probes of a real sampler."""
    policy = build_policy()
    step = cases.step(policy, num_prompts=2, group_size=4, seed=1)
    population = cases.batch(policy, num_prompts=1200, group_size=1, seed=4)
    found: list[Influence] = []
    for b in range(30):
        part = population.select(np.arange(40 * b, 40 * b + 40))
        found.append(
            influence(
                policy,
                step,
                step.update,
                part,
                budget=Budget(max_sequences=40),
                options=InfluenceOptions(baseline="none"),
            )
        )
    spread = np.std([f.sequences for f in found], axis=0, ddof=1)
    claimed = np.sqrt(np.mean([f.stderr**2 for f in found], axis=0))
    assert 0.75 < np.median(claimed / spread) < 1.3


def test_folds_of_single_prompts_have_the_error_of_the_sum(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    reward = make_quantity("reward", probe, normalisation="per_seq")
    options = InfluenceOptions(baseline="none", num_folds=probe.num_prompts)
    found = influence(policy, step, step.update, probe, quantity=reward, options=options)
    away = np.array([fold.sum() for fold in found.fold_rows().folds.values()])
    assert len(away) == probe.num_prompts
    assert errors_from_sums(away[:, None]) == pytest.approx(found.sum_of_sequences.stderr, rel=1e-9)


def test_another_batch_is_refused(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    with pytest.raises(MeasurementError, match="another batch"):
        influence(policy, step, probe, probe)


def test_memory_decides_the_number_of_groups(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    bound = bind_quantity(policy, probe, "entropy", direction=step.direction, baseline="none")
    size = sum(p.numel() * p.element_size() for p in policy.parameters.values())
    few = probe_gradient(policy, probe, bound, budget=Budget(memory_bytes=5 * size))
    assert few.num_groups == 3
    assert not few.by_prompt
    one = probe_gradient(policy, probe, bound, budget=Budget(memory_bytes=size))
    assert one.num_groups == 1
    assert np.isnan(one.errors(one.dots(step.components["momentum"])[:, None])).all()


def test_groups_of_ones_own_and_no_errors(setting: tuple[Policy, Step, Rollouts]) -> None:
    policy, step, probe = setting
    bound = bind_quantity(policy, probe, "entropy", direction=step.direction, baseline="none")
    whole = probe_gradient(policy, probe, bound)
    odd = probe.prompt_index % 2
    parts = probe_gradient(policy, probe, bound, groups=odd, errors=False)
    assert parts.num_groups == 2
    by_prompt = whole.dots(step.components["momentum"])[:-1]
    halves = [by_prompt[0::2].sum(), by_prompt[1::2].sum()]
    np.testing.assert_allclose(parts.dots(step.components["momentum"])[:-1], halves, rtol=1e-9)
    assert np.isnan(parts.errors(parts.dots(step.components["momentum"])[:, None])).all()
    assert np.isfinite(whole.errors(whole.dots(step.components["momentum"])[:, None])).all()


def test_tables(setting: tuple[Policy, Step, Rollouts], tmp_path) -> None:
    policy, step, probe = setting
    entropy = influence(policy, step, step.update, probe, options=InfluenceOptions(baseline="none"))
    reward = influence(
        policy,
        step,
        step.update,
        probe,
        quantity=make_quantity("reward", probe, normalisation="per_seq"),
        options=InfluenceOptions(baseline="none"),
    )
    InfluenceSequences.joined([entropy.sequence_rows(), reward.sequence_rows()]).write(tmp_path / "s.parquet")
    InfluenceTokens.joined([entropy.token_rows(), reward.token_rows()]).write(tmp_path / "t.parquet")
    sequences = InfluenceSequences.read(tmp_path / "s.parquet")
    tokens = InfluenceTokens.read(tmp_path / "t.parquet")
    assert len(sequences) == 2 * (len(step.update) + 2)
    assert len(tokens) == 2 * int(step.update.num_tokens.sum())
    assert sequences.component[len(step.update)] == "momentum"
    assert sequences.sequence_id[len(step.update)] is None
    chosen = tokens.where((tokens.sequence_id == 4) & (tokens.quantity == "reward")).influence
    assert chosen.sum() == pytest.approx(float(reward.sequences[4]), rel=1e-9)
    assert not list(tmp_path.glob("*.partial"))
