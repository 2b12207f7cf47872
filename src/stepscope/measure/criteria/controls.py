"""Trivial controls: what a criterion has to beat before it has shown anything."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from stepscope.measure.criteria.facts import Criterion, Level, Target, TokenFacts
from stepscope.results import FloatArray


def control(
    name: str,
    score: Callable[[TokenFacts], FloatArray],
    formula: str,
    target: Target,
    level: Level = "token",
) -> Criterion:
    """A control; its orientation is chosen with hindsight when criteria are compared with it."""
    sign = "either, chosen with hindsight" if target == "signed" else "none: larger says more effect"
    return Criterion(name, score, formula, sign, level=level, kind="control", target=target)


CONTROLS: tuple[Criterion, ...] = (
    control("neg_A", lambda f: -f.advantage, "-A", "signed"),
    control("logp", lambda f: f.logprob, "l", "signed"),
    control("neg_H", lambda f: -f.entropy, "-H", "signed"),
    control("neg_A_logp", lambda f: -f.advantage * f.logprob, "-A l", "signed"),
    control("neg_A_H", lambda f: -f.advantage * f.entropy, "-A H", "signed"),
    control("neg_A_missing", lambda f: -f.advantage * f.missing, "-A (1 - p)", "signed"),
    control("abs_A", lambda f: np.abs(f.advantage), "|A|", "magnitude"),
    control("abs_A_missing", lambda f: np.abs(f.advantage) * f.missing, "|A| (1 - p)", "magnitude"),
    control("missing", lambda f: f.missing, "1 - p", "magnitude"),
    control("entropy", lambda f: f.entropy, "H", "magnitude"),
    control("position", lambda f: f.position.astype(np.float64), "position in the response", "magnitude"),
    control("length", lambda f: f.lengths[f.sequence], "length of the response", "magnitude"),
)
"""Of tokens."""
