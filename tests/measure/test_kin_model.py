"""The solvable model of kinship against policies, trees, tokens and advantages that are drawn from it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from stepscope.errors import MeasurementError
from stepscope.measure.ledger.kin_model import Batch, KinModel, fit_kin_model
from stepscope.results import FloatArray
from stepscope.results.kinship import KINS, OTHER_PROMPTS, SAME_POSITION, SAME_PROMPT, SAME_RESPONSE
from stepscope.stats import Estimate

KIN4 = tuple(KINS)[:4]
MODEL = KinModel(common=0.25, prompt=0.2, place=0.15, memory=0.6, dimension=8)
SYMBOLS, SMALL = 3, 0.1


def drawn_sums(model: KinModel, size: Batch, draws: int, seed: int) -> tuple[FloatArray, FloatArray]:
    """(draw, kin) sums of the effects of all tokens, and (draw, position) shares of pairs of one prefix.

    Everything as a policy does it: softmax of W h, tokens sampled, advantages against the group's mean, the
    entropy's slope, contexts compared as texts; on the batch's own positions.
    """
    rng = np.random.default_rng(seed)
    d, (B, G, L) = int(model.dimension), (size.prompts, size.group_size, len(size.shared))

    def normal(*shape: int) -> FloatArray:
        return np.asarray(rng.normal(size=(draws, *shape, d)) / math.sqrt(d))

    readout = SMALL * rng.normal(size=(draws, SYMBOLS, d))
    steady = math.sqrt(model.common) * normal(1, 1) + math.sqrt(model.prompt) * normal(B, 1)
    place = normal(L)
    first = np.zeros((draws, B, G), dtype=int)  # the first response that has the same context
    same = np.zeros((draws, B, G, G, L), dtype=bool)
    state: FloatArray = np.zeros((draws, B, G, d))
    features, slopes, moves, gains = [], [], [], []
    for k in range(L):
        same[..., k] = first[..., :, None] == first[..., None, :]
        fresh = np.take_along_axis(normal(B, G), first[..., None], axis=2)
        state = fresh if k == 0 else model.memory * state + math.sqrt(1 - model.memory**2) * fresh
        h = steady + math.sqrt(model.place) * place[:, None, None, k] + math.sqrt(model.tree) * state
        logits = np.einsum("nvd,nbgd->nbgv", readout, h)
        p = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        entropy = -(p * np.log(p)).sum(-1, keepdims=True)
        token = (p.cumsum(-1) < rng.random((draws, B, G, 1))).sum(-1).clip(max=SYMBOLS - 1)
        chosen = token[..., None] == np.arange(SYMBOLS)
        features.append(h)
        slopes.append(-p * (np.log(p) + entropy))
        moves.append(chosen - p)
        gains.append((logits * chosen).sum(-1) - (logits * p).sum(-1))
        agree = (first[..., :, None] == first[..., None, :]) & (token[..., :, None] == token[..., None, :])
        first = agree.argmax(-1)
    reward = np.sum(gains, axis=0)
    advantage = reward - reward.mean(-1, keepdims=True)
    h, slope, move = (np.stack(rows, axis=3) for rows in (features, slopes, moves))  # (draw, B, G, L, ...)
    push = advantage[..., None, None] * move
    kernel = np.einsum("nbgkd,npqld->nbgkpql", h, h, optimize=True)
    effects = kernel * np.einsum("nbgkv,npqlv->nbgkpql", push, slope, optimize=True)
    whole = effects.sum(axis=(1, 2, 3, 4, 5, 6))
    asked = np.einsum("nbgkbql->nbgkql", effects)
    path = asked * same[:, :, :, None]  # context l of response q is one that response g goes through
    own = np.einsum("nbgkqk->n", path)
    sums = [own, path.sum(axis=(1, 2, 3, 4, 5)) - own, (asked - path).sum(axis=(1, 2, 3, 4, 5))]
    sums.append(whole - asked.sum(axis=(1, 2, 3, 4, 5)))
    pairs = same[:, :, ~np.eye(G, dtype=bool)].mean(axis=(1, 2))
    return np.stack(sums, axis=1), pairs


@pytest.mark.parametrize(("length", "group", "prompts"), [(4, 3, 3), (6, 4, 1)])
def test_the_closed_form_is_what_drawn_policies_do(length: int, group: int, prompts: int) -> None:
    size = Batch.branching(length, 1 / SYMBOLS, group, prompts)
    parts = [drawn_sums(MODEL, size, 2000, seed) for seed in range(6)]
    sums, pairs = (np.concatenate(rows) for rows in zip(*parts, strict=True))
    error = pairs.std(0) / math.sqrt(len(pairs))
    assert (np.abs(pairs.mean(0) - size.shared) <= 4 * error + SMALL**2).all()
    total = sums.sum(1)
    predicted = MODEL.shares(size)
    for k, kin in enumerate(KIN4):
        share = sums[:, k].mean() / total.mean()
        stderr = (sums[:, k] - share * total).std() / abs(total.mean()) / math.sqrt(len(total))
        assert share == pytest.approx(predicted[kin], abs=4 * stderr + 0.3 * SMALL**2), (kin, stderr)
        assert stderr < 0.02
    assert total.mean() < -4 * total.std() / math.sqrt(len(total))  # it sharpens


def written_out(
    model: KinModel, acting: list[list[tuple[int, ...]]], looked_at: list[list[tuple[int, ...]]]
) -> tuple[dict[str, float], FloatArray]:
    """Sums over all pairs by comparing texts, and the shares of pairs of one prompt that agree on k tokens.

    Features are coefficients of independent normals, one for the whole, each prompt, position and context.
    """

    def features(prompt: int, text: tuple[int, ...]) -> dict[object, float]:
        found: dict[object, float] = {"all": model.common**0.5, ("prompt", prompt): model.prompt**0.5}
        found["place", len(text)] = model.place**0.5
        for k in range(len(text) + 1):
            new = 1.0 if k == 0 else (1 - model.memory**2) ** 0.5
            found[prompt, text[:k]] = model.tree**0.5 * new * model.memory ** (len(text) - k)
        return found

    sums, length = dict.fromkeys(KIN4, 0.0), len(acting[0][0])
    agree = np.zeros(length)
    pairs = 0
    for p, group in enumerate(acting):
        for i, response in enumerate(group):
            for asked, others in enumerate(looked_at):
                for j, other in enumerate(others):
                    if p == asked and not (acting is looked_at and i == j):
                        agree += [response[:k] == other[:k] for k in range(length)]
                        pairs += 1
                    for k in range(length):
                        h = features(p, response[:k])
                        for at in range(length):
                            there = features(asked, other[:at])
                            rho = sum(value * there.get(name, 0.0) for name, value in h.items())
                            if asked != p:
                                kin = OTHER_PROMPTS
                            elif other[:at] == response[:k]:
                                kin, rho = SAME_POSITION, 1.0
                            else:
                                kin = SAME_RESPONSE if other[:at] == response[:at] else SAME_PROMPT
                            sums[kin] += float(model.effect(np.array(rho)))
    own = float(model.effect(np.array(1.0))) * length * len(acting) * len(acting[0])
    return {kin: value / own for kin, value in sums.items()}, agree / pairs


@pytest.mark.parametrize("fresh", [False, True])
def test_the_sums_are_those_of_a_tree_that_is_written_out(fresh: bool) -> None:
    """Exactly, whatever the tree: responses part late, early and never."""
    rng = np.random.default_rng(3)

    def drawn() -> list[list[tuple[int, ...]]]:
        return [[tuple(map(int, rng.random(5) < 0.3)) for _ in range(4)] for _ in range(2)]

    acting = drawn()
    looked_at = drawn() if fresh else acting
    model = KinModel(common=0.2, prompt=0.15, place=0.1, memory=0.7, dimension=20)
    expected, shared = written_out(model, acting, looked_at)
    assert 1 > shared[1] > shared[4] > 0
    found = model.sums(Batch(shared, 4, 2, fresh))
    assert found == pytest.approx(expected, rel=1e-12)
    assert min(found.values()) > 0.02


def test_the_expected_effect_of_a_pair_is_that_of_its_overlap() -> None:
    """E[(h . h')^2] of normal features, and of readouts: no sampling of tokens."""
    rng, overlap, d = np.random.default_rng(0), 0.6, 5
    h, more = rng.normal(size=(2, 400_000, d)) / math.sqrt(d)
    other = overlap * h + math.sqrt(1 - overlap**2) * more
    found = ((h * other).sum(1)) ** 2
    expected = KinModel(0, 0, 0, dimension=d).effect(np.array([overlap]))[0]
    assert found.mean() == pytest.approx(expected, abs=4 * found.std() / math.sqrt(len(found)))


def test_a_tabular_policy_has_its_own_position_alone() -> None:
    """No overlap at all: copies of a context are all that a token acts on, however long responses are."""
    for length in (2, 20):
        shares = KinModel(0, 0, 0).shares(Batch.branching(length, 0.3, 8, 16))
        assert shares == {SAME_POSITION: 1.0, SAME_RESPONSE: 0.0, SAME_PROMPT: 0.0, OTHER_PROMPTS: 0.0}


def test_without_memory_the_sums_are_elementary() -> None:
    """alpha = 0: numbers of pairs times a constant; the number of copies a geometric series."""
    length, q, G, B, a, b = 9, 0.7, 8, 16, 0.02, 0.1
    own = 1 + (G - 1) * (1 - q**length) / (length * (1 - q))
    expected = {
        SAME_POSITION: own,
        SAME_RESPONSE: (length - 1) * own * (a + b) ** 2,
        SAME_PROMPT: length * (G - own) * (a + b) ** 2,
        OTHER_PROMPTS: (B - 1) * G * length * a**2,
    }
    found = KinModel(a, b, 0.0).sums(Batch.branching(length, q, G, B))
    assert found == pytest.approx(expected, rel=1e-12)


def test_the_own_position_loses_to_all_others_with_length() -> None:
    lengths = (5, 20, 80, 320)
    shares = [KinModel(0.03, 0.1, 0.5).shares(Batch.branching(n, 0.9, 8, 16)) for n in lengths]
    own = [row[SAME_POSITION] for row in shares]
    assert own == sorted(own, reverse=True)
    assert own[-1] * lengths[-1] == pytest.approx(own[-2] * lengths[-2], rel=0.5)  # as 1/L in the end
    limit = KinModel(0.03, 0.1, 0.0).sums(Batch.branching(400, 0.5, 8, 16))
    expected = 15 * 8 * 0.03**2 / (8 * 0.13**2 + 15 * 8 * 0.03**2)  # by numbers of pairs
    assert limit[OTHER_PROMPTS] / sum(limit.values()) == pytest.approx(expected, rel=0.2)


def test_fresh_responses_have_no_copy_of_what_branched() -> None:
    size = Batch(np.r_[1.0, np.zeros(9)], 8, 16, fresh=True)
    sums = KinModel(0.1, 0.1, 0.5).sums(size)
    assert sums[SAME_POSITION] == pytest.approx(8 / 10)
    assert sums[SAME_RESPONSE] > 0  # the first position lies on every response's way
    batch = KinModel(0.1, 0.1, 0.5).sums(replace(size, fresh=False))
    assert batch[OTHER_PROMPTS] == sums[OTHER_PROMPTS]
    assert batch[SAME_POSITION] == pytest.approx(1 + 7 / 10)


def test_a_fit_finds_the_parameters_again() -> None:
    true = KinModel(0.05, 0.15, 0.7)
    sizes = [Batch.branching(12, 0.8, 8, 16), replace(Batch.branching(12, 0.8, 8, 16), fresh=True)]
    known = [
        (size, {kin: Estimate(x, 0.02, 64, "share", "made") for kin, x in true.shares(size).items()})
        for size in sizes
    ]
    found = fit_kin_model(known)
    assert (found.common, found.prompt, found.memory) == pytest.approx((0.05, 0.15, 0.7), abs=1e-4)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(MeasurementError, match="add up to at most 1"):
        KinModel(0.6, 0.5, 0.1)
    with pytest.raises(MeasurementError, match="must fall from 1"):
        Batch(np.array([1.0, 0.5, 0.6]), 8, 16)
    size = Batch.branching(3, 0.5, 8, 16)
    nothing = {SAME_POSITION: Estimate(0.5, math.nan, 1, "share", "made")}
    with pytest.raises(MeasurementError, match="with standard error nan"):
        fit_kin_model([(size, nothing)])
    with pytest.raises(MeasurementError, match="is nan with"):
        fit_kin_model([(size, {SAME_POSITION: Estimate(math.nan, 0.1, 1, "share", "made")})])
    with pytest.raises(MeasurementError, match="no shares to fit"):
        fit_kin_model([])
    for group, prompts in ((0, 16), (8, 0)):
        with pytest.raises(MeasurementError, match="expected at least 1 of both"):
            Batch.branching(3, 0.5, group, prompts)
