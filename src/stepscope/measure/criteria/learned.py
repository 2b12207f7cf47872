"""Criteria that are learned: influence of tokens from a forward pass, fitted to that of other prompts.

Features are signed criteria of the literature, the last layer's influence, log-prob, entropy, position and
advantage. Learned across two splits at once: a prompt's tokens are scored by what was fitted to the tokens of
other update prompts, and a score fitted to the truth from one half of the probe is judged by the other half,
both ways. What is fitted is how a token differs from the mean of those it is fitted to: that mean ranks no
token, and added to the scores of a fold, which it is low for where the fold is high, it would give a score
that knows nothing a negative correlation. Other criteria are ranked against the whole probe; against a half
of it every correlation is smaller by about sqrt((1 + r)/2), r the truth's reliability, so that learned ones
stand lower by that much.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from functools import partial

import numpy as np

from stepscope.measure.criteria.criterion import Criterion
from stepscope.measure.criteria.ground_truth import GroundTruth
from stepscope.measure.criteria.statistics import Comparison, compare
from stepscope.measure.kernel.machines import Machine, MachineOptions, regressed
from stepscope.results import FloatArray, IntArray
from stepscope.rules import TokenFacts

FOLDS = 4
"""Of update prompts; fewer where there are fewer prompts."""

SIGNED = (
    "disc_v",
    "npg",
    "steer_thm",
    "neg_A",
    "neg_A_logp",
    "neg_A_H",
    "neg_A_missing",
    "last_layer",
    "last_layer_p",
    "last_layer_on_policy",
)
RIDGE = 1e-2
"""Of the variance of a feature."""

MACHINES: Mapping[str, Machine | None] = {
    "learned_linear": None,
    "learned_gaussian_process": "gaussian_process",
    "learned_deep_kernel": "deep_kernel",
}

_HOW = "{} on signed criteria, last layer, log-prob, entropy, position, advantage; judged on held-out prompts"
_WORDS = {
    "learned_linear": "ridge regression",
    "learned_gaussian_process": "sparse Gaussian process",
    "learned_deep_kernel": "sparse deep kernel machine",
}


def learned_criteria(scores: Mapping[str, FloatArray]) -> tuple[Criterion, ...]:
    """Learned scores as criteria."""
    return tuple(
        Criterion(name, partial(_given, own), _HOW.format(_WORDS[name]), kind="model")
        for name, own in scores.items()
    )


def _given(values: FloatArray, facts: TokenFacts) -> FloatArray:
    return values


def learned_scores(
    facts: TokenFacts,
    scores: Mapping[str, FloatArray],
    truth: GroundTruth,
    options: MachineOptions = MachineOptions(),
) -> dict[str, FloatArray]:
    """Name to (2, tok) scores, fitted to the truth from either half of the probe.

    Args:
        facts: the token table.
        scores: of the other criteria, by name.
        truth: a column, whose folds of the probe are at least four.
        options: how machines are fitted; ``seed`` is also that of the folds of update prompts.

    Returns:
        Nothing where prompts or folds are too few.
    """
    owner = facts.prompt[facts.sequence]
    groups = np.unique(owner[truth.chosen])
    halves = truth.halves
    if halves is None or truth.folds is None or len(truth.folds) < 4 or len(groups) < 3:
        return {}
    inputs = _inputs(facts, scores)
    folds = np.random.default_rng(options.seed).permutation(len(groups)) % min(FOLDS, len(groups))
    found = {name: np.zeros((2, len(facts))) for name in MACHINES}
    for half, values in enumerate(halves):
        for fold in range(int(folds.max()) + 1):
            held = np.isin(owner, groups[folds == fold])
            seen = truth.chosen[~held[truth.chosen]]
            asked = truth.chosen[held[truth.chosen]]
            size = float(np.median(np.abs(values[seen]))) or 1.0
            target = np.arcsinh(values[seen] / size)  # most tokens hardly matter, few matter much
            target -= target.mean()
            reach = np.abs(target).max()
            for name, machine in MACHINES.items():
                told = _fitted(machine, inputs[seen], target, inputs[asked], options)
                found[name][half, asked] = size * np.sinh(np.clip(told, -reach, reach))
    return found


def _inputs(facts: TokenFacts, scores: Mapping[str, FloatArray]) -> FloatArray:
    """(tok, feature) signed ones on the scale of the truth, the others as they are."""
    signed = [scores[name] for name in SIGNED if name in scores]
    sizes = [float(np.median(np.abs(s[s != 0]))) if s.any() else 1.0 for s in signed]
    scaled = [np.arcsinh(s / size) for s, size in zip(signed, sizes, strict=True)]
    plain = [facts.logprob, facts.entropy, facts.missing, facts.position.astype(np.float64), facts.advantage]
    return np.stack([*scaled, *plain], 1)


def _fitted(
    machine: Machine | None, x: FloatArray, y: FloatArray, asked: FloatArray, options: MachineOptions
) -> FloatArray:
    if machine is not None:
        return regressed(machine, x, y, asked, options)
    spread = x.std(0)
    shift, spread = x.mean(0), np.where(spread > 1e-12, spread, np.inf)
    z = (x - shift) / spread
    gram = z.T @ z + RIDGE * len(z) * np.eye(z.shape[1])
    return np.asarray((asked - shift) / spread @ np.linalg.solve(gram, z.T @ y), dtype=np.float64)


def crossed(
    found: Comparison,
    folded: Comparison,
    learned: Mapping[int, FloatArray],
    halves: FloatArray,
    parts: FloatArray,
    index: IntArray,
    *,
    counts: FloatArray,
    seed: int,
) -> tuple[Comparison, Comparison]:
    """Comparisons in which learned scores meet the half of the probe that they were not fitted to.

    Args:
        found: of all scores with the truths from the whole probe.
        folded: the same with truths without each fold of the probe.
        learned: which score to its (2, item) values from either half.
        halves: (truth, 2, item) truths from each half.
        parts: (truth, fold, 2, item) the same without each fold.
        index: (item,) prompts.
        counts: resamples of ``found``.
        seed: likewise.
    """
    made = []
    for whole, truths, resamples in ((found, halves, counts), (folded, parts, None)):
        values = {f.name: getattr(whole, f.name).copy() for f in fields(Comparison) if f.name != "best"}
        for place, own in learned.items():
            flat = truths.reshape(-1, truths.shape[-1])
            both = compare(own, np.array([True, True]), flat, index, counts=resamples, seed=seed)
            for name, array in values.items():
                met = getattr(both, name)
                array[..., place, :] = (met[..., 0, 1::2] + met[..., 1, 0::2]) / 2
        made.append(replace(whole, **values))
    return made[0], made[1]
