"""What kind of sequences and tokens carry influence: a regression of influence on their properties.

Ordinary least squares y = b_0 + sum_j b_j x_j with the cluster sandwich of Liang & Zeger (1986),

    V = (G/(G-1)) ((N-1)/(N-K)) (X'X)^-1 [sum_g (X_g'e_g)(X_g'e_g)'] (X'X)^-1

over G prompts, N items and K columns, the constant among them: items of one prompt may depend on each other
in any way. A standardised coefficient is b_j sd(x_j)/sd(y), the spreads held fixed in its error. The
coefficients describe; with properties as dependent as log-prob and entropy they do not say what causes what.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from stepscope.errors import MeasurementError
from stepscope.results import BoolArray, FloatArray, IntArray
from stepscope.results.criteria import Level, Regression
from stepscope.rules import TokenFacts
from stepscope.stats import Estimate

COLLINEAR = 1e-8
"""A property whose part outside the span of the others is below this share of its spread is left out."""


def regress(
    outcome: npt.ArrayLike,
    properties: Mapping[str, FloatArray],
    clusters: IntArray,
    *,
    name: str,
    level: Level,
    unit: str,
) -> Regression:
    """Least squares of an outcome on properties, with a constant; errors clustered.

    A property that is constant, or a linear combination of those before it, is left out and named.

    Args:
        outcome: (item,) y.
        properties: name to (item,) x.
        clusters: (item,) prompts.
        name: of the outcome.
        level: ``token`` or ``sequence``.
        unit: of the outcome.

    Raises:
        MeasurementError: no more items than columns.
    """
    y = np.asarray(outcome, dtype=np.float64)
    kept, left_out = _independent(properties, len(y))
    count = len(kept) + 1
    if len(y) <= count:
        raise MeasurementError(
            f"regression of {name}: {len(y)} {level}s for {count} coefficients, expected more; use a larger "
            "update batch"
        )
    spread = {p: float(properties[p].std()) for p in kept}
    centre = {p: float(properties[p].mean()) for p in kept}
    columns = [(properties[p] - centre[p]) / spread[p] for p in kept]
    design = np.column_stack([np.ones(len(y)), *columns])
    inverse = np.linalg.inv(design.T @ design)
    beta = inverse @ (design.T @ y)
    residual = y - design @ beta
    _, index = np.unique(clusters, return_inverse=True)
    num_clusters = int(index.max()) + 1
    sums = np.zeros((num_clusters, count))
    np.add.at(sums, index, design * residual[:, None])
    errors = np.full(count, np.nan)
    if num_clusters > 1:
        factor = num_clusters / (num_clusters - 1) * (len(y) - 1) / (len(y) - count)
        variance = np.diag(factor * inverse @ (sums.T @ sums) @ inverse)
        errors = np.sqrt(np.maximum(variance, 0.0))
    reason = ""
    if num_clusters <= count:
        reason = f"{num_clusters} prompts for {count} coefficients: clustered errors are too small"
    total = float(((y - y.mean()) ** 2).sum())
    scale = float(y.std())

    def estimate(value: float, error: float, of: str) -> Estimate:
        method = f"least squares over {len(y)} {level}s, errors clustered by prompt"
        return Estimate(value, error, num_clusters, of, method, reliable=not reason, reason=reason)

    pairs = list(zip(kept, beta[1:].tolist(), errors[1:].tolist(), strict=True))
    return Regression(
        outcome=name,
        level=level,
        coefficients={p: estimate(b / spread[p], e / spread[p], f"{unit} per unit") for p, b, e in pairs},
        standardised={
            p: estimate(b / scale, e / scale, "standard deviations") for p, b, e in pairs if scale > 0
        },
        left_out=left_out,
        r2=1 - float((residual**2).sum()) / total if total > 0 else float("nan"),
        num_items=len(y),
    )


def _independent(properties: Mapping[str, FloatArray], count: int) -> tuple[list[str], dict[str, str]]:
    """Names of the properties that are kept, and why the others are not (Gram & Schmidt, in their order)."""
    basis = [np.full(count, count**-0.5)]
    kept: list[str] = []
    left_out: dict[str, str] = {}
    for name, values in properties.items():
        centred = values - values.mean()
        size = float(np.linalg.norm(centred))
        if size <= COLLINEAR * float(np.linalg.norm(values)):
            left_out[name] = "the same for all"
            continue
        rest = centred
        for _ in range(2):  # twice, against round-off
            for direction in basis:
                rest = rest - (direction @ rest) * direction
        if np.linalg.norm(rest) <= COLLINEAR * size:
            left_out[name] = f"determined by {', '.join(kept)}"
            continue
        kept.append(name)
        basis.append(rest / np.linalg.norm(rest))
    return kept, left_out


def property_study(
    facts: TokenFacts, influence: FloatArray, *, kernel_norm: FloatArray | None = None, unit: str
) -> tuple[Regression, ...]:
    """Regressions of influence, and of its size, on the properties of tokens and of sequences.

    Tokens: advantage, log-prob, entropy, position, length, pass rate of the prompt, correctness. Sequences:
    the same, log-prob and entropy averaged over the response, without position, and with the square root of
    the response's own kernel K(i, i) where it is known. Tokens of sequences without advantage are left out:
    they have no influence by construction.

    Args:
        facts: the token table.
        influence: (tok,) influence of each token.
        kernel_norm: (seq,) sqrt K(i, i) in the optimizer's metric.
        unit: of the influence.

    Returns:
        Signed and absolute influence, of tokens and then of sequences; a level with too few items is not
        there.
    """
    pushed = facts.advantages != 0
    rate = facts.per_prompt(facts.correct)
    length = facts.lengths
    sequences: dict[str, FloatArray] = {
        "advantage": facts.advantages,
        "logprob": facts.per_sequence(facts.logprob) / length,
        "entropy": facts.per_sequence(facts.entropy) / length,
        "length": length,
        "pass_rate": rate,
        "correct": facts.correct,
    }
    if kernel_norm is not None:
        sequences["kernel_norm"] = kernel_norm
    tokens: dict[str, FloatArray] = {
        "advantage": facts.advantage,
        "logprob": facts.logprob,
        "entropy": facts.entropy,
        "position": facts.position.astype(np.float64),
        "length": length[facts.sequence],
        "pass_rate": rate[facts.sequence],
        "correct": facts.correct[facts.sequence],
    }
    levels: tuple[tuple[Level, dict[str, FloatArray], FloatArray, BoolArray, IntArray], ...] = (
        ("token", tokens, influence, pushed[facts.sequence], facts.prompt[facts.sequence]),
        ("sequence", sequences, facts.per_sequence(influence), pushed, facts.prompt),
    )
    found = []
    for level, properties, values, items, clusters in levels:
        chosen = {name: x[items] for name, x in properties.items()}
        if int(items.sum()) <= len(chosen) + 1:
            continue
        for name, y in (("influence", values[items]), ("abs_influence", np.abs(values[items]))):
            found.append(regress(y, chosen, clusters[items], name=name, level=level, unit=unit))
    return tuple(found)
