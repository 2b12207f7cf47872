"""Kinship against the matrix of all pairs, on policies small enough, in float64."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import cases
from enumerable import PROMPTS, enumerable_policy
from measure.test_ledger import trained
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.ledger.kin_account import kin_account, looked_at
from stepscope.measure.ledger.kin_sums import KinSteps
from stepscope.measure.ledger.kinship import KinOptions, Split, pushes, split_by_kin
from stepscope.measure.ledger.own_position import Units, draw
from stepscope.measure.ledger.path import displacement_parts
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.state import Policy
from stepscope.policy.vectors import placed
from stepscope.results import FloatArray, Rollouts
from stepscope.results.kinship import KINS, KinFormula, KinPart, KinStep
from stepscope.stats import exact

KIN4 = ("same_position", "same_response", "same_prompt", "other_prompts")
HELD_OUT = ((3, 3, 2), (2, 2), (4, 4), (3,), (2, 4, 4), (3, 4, 3, 2))


def drawn(policy: Policy, prompts: list[tuple[int, ...]], seed: int) -> Rollouts:
    """Responses of random tokens, of which several share prefixes."""
    rng = np.random.default_rng(seed)
    responses = [rng.integers(1, 4, rng.integers(1, 4)).tolist() for _ in prompts]
    found = cases.rollouts(
        prompts,
        responses,
        rewards=rng.random(len(prompts)),
        temperature=policy.settings.temperature,
        max_response_tokens=3,
    )
    return cases.scored(policy, found)


class Step(SimpleNamespace):
    update: Rollouts
    token_weights: tuple[FloatArray, ...]


@pytest.fixture(scope="module", params=[False, True], ids=["full", "lora"])
def setting(request: pytest.FixtureRequest) -> SimpleNamespace:
    """A batch with weights, some 0, fresh responses, two metrics, and other prompts."""
    policy = enumerable_policy(lora=request.param)
    update = drawn(policy, [PROMPTS[i % 2] for i in range(10)], 0)
    rng = np.random.default_rng(1)
    weights = [rng.normal(size=n) * (rng.random(n) > 0.2) for n in update.num_tokens]
    weights[3] *= 0
    fresh = drawn(policy, [PROMPTS[i % 2] for i in range(8)], 2)
    metrics = {
        name: {
            n: torch.rand(p.shape, generator=torch.Generator().manual_seed(k), dtype=torch.float64)
            for n, p in policy.parameters.items()
        }
        for k, name in enumerate(("whole", "own_step"))
    }
    probe = drawn(policy, list(HELD_OUT) * 2, 3)
    return SimpleNamespace(
        policy=policy,
        step=Step(update=update, token_weights=tuple(weights)),
        looks={"batch": update, "fresh": fresh},
        metrics=metrics,
        probe=probe,
    )


def jacobians(policy: Policy, rollouts: Rollouts, what: str) -> Tensor:
    """(tok, parameter) gradients of log-probs or entropies, one backward pass each."""
    batch = make_batch(rollouts.prompt_token_ids, rollouts.response_token_ids)
    found = getattr(forward(policy.model, batch, temperature=rollouts.temperature), what)
    params = list(policy.parameters.values())
    rows = [
        torch.autograd.grad(x, params, retain_graph=True, allow_unused=True)
        for x in found[batch.response_mask]
    ]
    return torch.stack(
        [
            torch.cat(
                [
                    (torch.zeros_like(p) if g is None else g).reshape(-1)
                    for g, p in zip(r, params, strict=True)
                ]
            )
            for r in rows
        ]
    )


def flat(vector: dict[str, Tensor]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in vector.values()])


def pair_matrix(setting: SimpleNamespace, look: Rollouts, metric: str) -> FloatArray:
    """(position of the look, token) K, by brute force."""
    update = setting.step.update
    theirs = jacobians(setting.policy, look, "entropies")
    ours = jacobians(setting.policy, update, "logprobs")
    weights = update.flat(setting.step.token_weights)
    found = (theirs * flat(setting.metrics[metric])) @ ours.T * torch.as_tensor(weights)
    return found.detach().numpy()


def places(rollouts: Rollouts) -> list[tuple[tuple[int, ...], tuple[int, ...], int]]:
    return [
        (rollouts.prompt_token_ids[i], rollouts.response_token_ids[i], int(k))
        for i, k in zip(*rollouts.places, strict=True)
    ]


def kin_of(
    position: tuple[tuple[int, ...], tuple[int, ...], int],
    token: tuple[tuple[int, ...], tuple[int, ...], int],
) -> str:
    """By comparing texts: prompt, then what stands before."""
    (asked, answer, at), (prompt, response, k) = position, token
    if asked != prompt:
        return "other_prompts"
    before = answer[:at]
    if before == response[:k]:
        return "same_position"
    return "same_response" if before == response[:at] and at < len(response) else "same_prompt"


def by_hand(
    setting: SimpleNamespace, look: Rollouts, metric: str
) -> tuple[dict[str, FloatArray], dict[str, int]]:
    """(prompt,) sums of all pairs by kin, and how many pairs of tokens with a weight there are."""
    update = setting.step.update
    matrix = pair_matrix(setting, look, metric) / len(look.places[0])
    weights = update.flat(setting.step.token_weights)
    sums, counts = {kin: np.zeros(2) for kin in KIN4}, dict.fromkeys(KIN4, 0)
    for n, position in enumerate(places(look)):
        for t, token in enumerate(places(update)):
            kin = kin_of(position, token)
            sums[kin][PROMPTS.index(token[0])] += matrix[n, t]
            counts[kin] += int(weights[t] != 0)
    return sums, counts


def split(setting: SimpleNamespace, **options: int) -> Split:
    slopes = []
    for version in ("fixed_prefix", "on_policy"):
        quantity = make_quantity("entropy", setting.probe, version=version)
        bound = bind_quantity(
            setting.policy, setting.probe, quantity, direction=setting.metrics["whole"], baseline="none"
        )
        slopes.append(probe_gradient(setting.policy, setting.probe, bound))
    return split_by_kin(
        setting.policy,
        setting.step,
        setting.looks,
        setting.metrics,
        held_out=(slopes[0], slopes[1]),
        options=KinOptions(**options),
    )


@pytest.fixture(scope="module")
def found(setting: SimpleNamespace) -> Split:
    return split(setting)


def parts_of(found: Split, look: str, through: str) -> dict[str, KinPart]:
    return {p.kin: p for p in found.parts if (p.look, p.through) == (look, through)}


@pytest.mark.parametrize("metric", ["whole", "own_step"])
@pytest.mark.parametrize("look", ["batch", "fresh"])
def test_the_split_is_that_of_the_matrix_of_all_pairs(
    setting: SimpleNamespace, found: Split, look: str, metric: str
) -> None:
    exact, counts = by_hand(setting, setting.looks[look], metric)
    own = parts_of(found, look, metric)
    scale = max(float(np.abs(row).max()) for row in exact.values())
    for kin in KIN4:
        np.testing.assert_allclose(own[kin].done, exact[kin], rtol=1e-10, atol=1e-10 * scale)
        assert np.abs(exact[kin]).max() > 1e-3 * scale
        assert own[kin].draw_variance == 0
    assert {kin: own[0].sum() for kin, own in found.pairs[look].items()} == counts
    assert min(counts.values()) > 0
    theirs = [PROMPTS.index(prompt) for prompt in setting.looks[look].prompt_token_ids]
    there = np.bincount(theirs, weights=setting.looks[look].num_tokens)
    np.testing.assert_array_equal(found.at_prompts[look], there)
    pushing = found.pairs[look]["other_prompts"][0] / there[::-1]
    np.testing.assert_array_equal(found.pairs[look]["other_prompts"][1], pushing[::-1] * there)
    np.testing.assert_allclose(own["other_prompts"].received, exact["other_prompts"][::-1], rtol=1e-9)


def test_the_kin_of_the_batch_add_up_to_the_derivative_of_its_entropy(
    setting: SimpleNamespace, found: Split
) -> None:
    """Against differences of the mean entropy along the displacement that the tokens make."""
    policy, update = setting.policy, setting.step.update
    ascent = gradient(policy, update, weighted_logprobs(setting.step.token_weights))
    direction = vectors.multiply(setting.metrics["whole"], ascent)
    total = sum(part.done.sum() for part in parts_of(found, "batch", "whole").values())
    levels = []
    for reach in (1e-6, -1e-6):
        moved = vectors.add(
            {n: p.detach() for n, p in policy.parameters.items()}, vectors.scale(direction, reach)
        )
        with placed(policy.parameters, moved), torch.no_grad():
            batch = make_batch(update.prompt_token_ids, update.response_token_ids)
            entropies = forward(policy.model, batch, temperature=update.temperature).entropies
            levels.append(float(entropies[batch.response_mask].mean()))
    assert total == pytest.approx((levels[0] - levels[1]) / 2e-6, rel=1e-5)


def test_held_out_prompts_are_other_prompts_and_visitation(setting: SimpleNamespace, found: Split) -> None:
    exact = pair_matrix(setting, setting.probe, "whole") / len(setting.probe.places[0])
    own = parts_of(found, "held_out", "whole")
    by_prompt = np.array([PROMPTS.index(token[0]) for token in places(setting.step.update)])
    np.testing.assert_allclose(
        own["other_prompts"].done, [exact[:, by_prompt == p].sum() for p in (0, 1)], rtol=1e-10
    )
    quantity = make_quantity("entropy", setting.probe, version="on_policy")
    bound = bind_quantity(
        setting.policy, setting.probe, quantity, direction=setting.metrics["whole"], baseline="none"
    )
    slope = probe_gradient(setting.policy, setting.probe, bound).mean()
    ascent = gradient(setting.policy, setting.step.update, weighted_logprobs(setting.step.token_weights))
    whole = vectors.dot(slope, vectors.multiply(setting.metrics["whole"], ascent))
    assert own["other_prompts"].done.sum() + own["visitation"].done.sum() == pytest.approx(whole, rel=1e-9)
    assert len(own["visitation"].groups) == len(HELD_OUT)


def test_drawn_tokens_change_their_own_kin_and_no_other(setting: SimpleNamespace, found: Split) -> None:
    few = split(setting, tokens=9, seed=1)
    assert 0 < few.drawn <= 9 < few.tokens == found.tokens == found.drawn
    for look in ("batch", "fresh"):
        own, exact = (parts_of(each, look, "whole") for each in (few, found))
        for kin in ("same_prompt", "other_prompts"):
            np.testing.assert_allclose(own[kin].done, exact[kin].done, rtol=1e-12)
        sums = [each["same_position"].done + each["same_response"].done for each in (own, exact)]
        np.testing.assert_allclose(sums[0], sums[1], rtol=1e-9, atol=1e-15)
        assert own["same_position"].done.sum() != exact["same_position"].done.sum()
        assert own["same_position"].draw_variance > 0


def test_the_difference_estimator_is_unbiased_and_knows_its_variance() -> None:
    """On numbers, where draws are cheap: a formula that is nearly right takes most of the variance away."""
    rng = np.random.default_rng(0)
    count = 300
    formula = rng.normal(size=count) ** 3
    kernel = 2.0 * formula + 0.2 * rng.normal(size=count)
    prompts, at = rng.integers(0, 5, count), rng.integers(1, 4, count).astype(float)

    def estimate(seed: int) -> tuple[float, float]:
        times, design = draw(np.abs(formula), 60, seed)
        units = Units(
            first=np.arange(count),
            weights=np.ones(count),
            prompts=prompts,
            formulas={"plain": formula},
            design=design,
            kernel={"whole": np.where(times > 0, kernel, 0.0)},
            times=times,
            num_prompts=5,
        )
        found = units.summed("whole", at)
        return float(found.by_prompt.sum()), found.variance

    values, said = np.array([estimate(seed) for seed in range(1000)]).T
    truth, plain = float(kernel @ at), count**2 * np.var(kernel * at) / 60
    assert abs(values.mean() - truth) < 4 * values.std() / 1000**0.5
    assert said.mean() == pytest.approx(values.var(), rel=0.2)
    assert values.var() < 0.1 * plain


class ByContext(nn.Module):
    """A tabular policy: the logits of a state, all tokens before, are a row of a table of their own."""

    def __init__(self, vocab: int = 5, depth: int = 6) -> None:
        super().__init__()
        self.config = SimpleNamespace(vocab_size=vocab)
        self.rows = 40009
        self.table = nn.Embedding(self.rows, vocab)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, use_cache: bool = False
    ) -> SimpleNamespace:
        state, states = torch.zeros_like(input_ids[:, 0]), []
        for token, there in zip(input_ids.T, attention_mask.T, strict=True):
            state = torch.where(there > 0, (state * 7 + token + 1) % self.rows, state)
            states.append(state)
        return SimpleNamespace(logits=self.table(torch.stack(states, 1)))


def test_on_a_tabular_policy_the_theory_of_the_literature_is_all_there_is() -> None:
    torch.manual_seed(0)
    policy = Policy(ByContext().double().eval(), None, StepSettings(max_response_tokens=3))
    update = drawn(policy, [PROMPTS[i % 2] for i in range(8)], 0)
    rng = np.random.default_rng(1)
    weights = tuple(rng.normal(size=n) for n in update.num_tokens)
    ones = {n: torch.ones_like(p) for n, p in policy.parameters.items()}
    found = split_by_kin(
        policy, Step(update=update, token_weights=weights), {"batch": update}, {"whole": ones}
    )
    own = parts_of(found, "batch", "whole")
    formula = next(f for f in found.formulas if f.name == "plain")
    np.testing.assert_allclose(own["same_position"].done, formula.sums, rtol=1e-10)
    np.testing.assert_allclose(formula.products, formula.squares, rtol=1e-10)
    scale = np.abs(own["same_position"].done).max()
    for kin in KIN4[1:]:
        np.testing.assert_allclose(own[kin].done, 0, atol=1e-12 * scale)


def test_a_step_without_weights_did_nothing(setting: SimpleNamespace) -> None:
    nothing = tuple(np.zeros(n) for n in setting.step.update.num_tokens)
    found = split(
        SimpleNamespace(**{**vars(setting), "step": Step(update=setting.step.update, token_weights=nothing)})
    )
    assert found.tokens == 0
    assert all(not part.done.any() and not part.received.any() for part in found.parts)


def test_the_pushes_of_all_steps_make_the_path() -> None:
    """sum_s Q_s a_s over the rest of the path, what was in the moments, and decay: the whole displacement."""
    policy, path = trained(5)
    before = path.first_moment()
    total: dict[str, Tensor] = {}
    for place, own, whole in pushes(path):
        step = path.step(place)
        with placed(policy.parameters, path.parameters(place)):
            ascent = gradient(policy, step.update, weighted_logprobs(step.token_weights))
        parts = displacement_parts(path, place, before)
        pieces = [vectors.multiply(whole, ascent), parts["momentum_before"], parts["decay"]]
        total = vectors.add(*([total] if total else []), *pieces)
        if place == len(path) - 1:
            for name in own:
                torch.testing.assert_close(own[name], whole[name], rtol=0, atol=0)
    moved = {n: path.parameters(5)[n] - path.parameters(0)[n] for n in total}
    for name in total:
        torch.testing.assert_close(total[name], moved[name], rtol=1e-9, atol=1e-14)


def made_step(
    number: int, effects: FloatArray, own: FloatArray, prompts: list[int], lengths: FloatArray | None = None
) -> KinStep:
    """A step from (acted on, acting) effects between prompts and those on the own position, at so many."""
    zeros = np.zeros(len(own))
    there = np.ones(len(own)) if lengths is None else lengths
    sums = {
        "same_position": own,
        "same_response": zeros,
        "same_prompt": np.diag(effects) - own,
        "other_prompts": effects.sum(0) - np.diag(effects),
    }
    parts = []
    for through in ("whole", "own_step"):
        for kin, done in sums.items():
            received = effects.sum(1) - np.diag(effects) if kin == "other_prompts" else zeros
            parts.append(KinPart("batch", kin, through, done, received, np.zeros(0), 0.0))
        parts.append(KinPart("held_out", "other_prompts", through, effects.sum(0), zeros, zeros, 0.0))
    formula = KinFormula("plain", own, own**2, own**2)
    return KinStep(
        number=number,
        prompts=tuple(map(str, prompts)),
        sequence_ids=np.arange(len(own)),
        tokens=1,
        drawn=1,
        positions={"batch": int(there.sum()), "held_out": 1},
        at_prompts={"batch": there.astype(np.int64), "held_out": zeros.astype(np.int64)},
        pairs={"batch": {}, "held_out": {}},
        parts=tuple(parts),
        formulas=(formula, replace(formula, name="natural")),
        own_squares=own**2,
    )


def test_intervals_of_shares_cover_what_other_prompts_would_give() -> None:
    """Prompts that push more than others and are pushed more: effects a_q b_p, and the own ones."""
    rng = np.random.default_rng(0)

    def account(count: int) -> tuple[float, float, float]:
        steps = []
        for number in range(1, count + 1):
            push, take = 1 + rng.gamma(2.0, 1.0, 8) * 0.5, rng.gamma(2.0, 1.0, 8)
            effects = -np.outer(take, push) * (1 + 0.3 * rng.normal(size=(8, 8)))
            own = -0.8 * push * take * rng.gamma(4.0, 0.25, 8)
            effects[np.diag_indices(8)] += own
            prompts = [8 * number + k for k in range(8)]
            steps.append(made_step(number, effects, own, prompts))
        found = kin_account(
            steps,
            [1] * count,
            first_step=1,
            last_step=count,
            every=1,
            num_probe_prompts=8,
            ledger_tokens=exact(0.0, 1, "nats/token", ""),
        )
        share = found.share("batch", "same_position").share
        return share.value, share.low, share.high

    truth = account(800)[0]
    found = [account(6) for _ in range(150)]
    covered = np.mean([low < truth < high for _, low, high in found])
    assert covered > 0.89


def test_errors_know_that_prompts_bring_positions() -> None:
    """Sums over positions divided by their number, which is another with other prompts: the error is of the
    mean. That of the sum is 3.8 and 1.7 times as large here."""
    found: dict[str, list[tuple[float, float]]] = {"same_position": [], "other_prompts": []}
    for seed in range(400):
        rng = np.random.default_rng(seed)
        lengths = np.ceil(20 * rng.lognormal(0, 0.7, 24))
        effects = -np.outer(lengths, rng.gamma(4.0, 0.25, 24)) / lengths.sum()
        own = -lengths * (1 + 0.15 * rng.normal(size=24)) / lengths.sum()
        step = made_step(1, effects, own, list(range(24)), lengths)
        sums = KinSteps.of([step], [1.0])
        for kin, values in found.items():
            estimate = sums.figure("batch", kin, "whole").estimate("", "")
            values.append((estimate.value, estimate.stderr))
    for values in found.values():
        value, said = np.array(values).T
        assert said.mean() == pytest.approx(value.std(), rel=0.12)


def test_steps_stand_for_their_neighbours() -> None:
    assert looked_at(10, 4) == [(1, 4), (5, 4), (8, 2)]
    assert looked_at(3, 1) == [(0, 1), (1, 1), (2, 1)]
    assert sum(weight for _, weight in looked_at(60, 7)) == 60
    assert set(KIN4) < set(KINS)
