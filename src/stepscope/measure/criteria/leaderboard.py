"""The leaderboard: cheap criteria against the measured effect of every token on the entropy.

Truths are those of :mod:`stepscope.measure.criteria.ground_truth`. Signed criteria are compared with the
truth, magnitude criteria with its size. Every figure has a bootstrap error over the update batch's prompts,
and every criterion is compared with the best trivial control of its kind on the same resamples.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.criteria.criterion import Criterion, known_criteria
from stepscope.measure.criteria.facts import token_facts
from stepscope.measure.criteria.ground_truth import (
    PRECONDITIONERS,
    TRUTHS,
    GroundTruth,
    GroundTruthOptions,
    ground_truths,
)
from stepscope.measure.criteria.statistics import SHARES, Comparison, compare
from stepscope.measure.step.reconstruct import Step
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Brief, FloatArray, IntArray, Rollouts
from stepscope.results.criteria import (
    Criteria,
    CriteriaTokens,
    GroundTruthSummary,
    LeaderboardRow,
    Level,
    Regression,
)
from stepscope.rules import TokenFacts
from stepscope.stats import Estimate

FEWEST = 3
"""A rank correlation needs at least so many items."""

GIVEN_PROBE = ", conditional on the probe batch"
"""What the errors are given, where a truth is measured on a probe batch."""


@dataclass(frozen=True, repr=False)
class Leaderboard(Brief):
    """All criteria against all truths.

    Attributes:
        rows: one per criterion and truth.
        truths: the truths about tokens.
        summaries: one per level and truth.
        criteria: what was ranked.
        facts: the token table.
        scores: (tok,) scores of the token criteria by name.
    """

    rows: tuple[LeaderboardRow, ...]
    truths: tuple[GroundTruth, ...]
    summaries: tuple[GroundTruthSummary, ...]
    criteria: tuple[Criterion, ...]
    facts: TokenFacts
    scores: Mapping[str, FloatArray]

    def truth(self, kind: str, preconditioner: str, version: str = "fixed_prefix") -> GroundTruth:
        """One truth by its names.

        Raises:
            MeasurementError: there is none of these names.
        """
        for truth in self.truths:
            if (truth.kind, truth.preconditioner, truth.version) == (kind, preconditioner, version):
                return truth
        raise MeasurementError(
            f"no truth {kind} {preconditioner} {version}; there are {', '.join(t.name for t in self.truths)}"
        )

    def row(self, criterion: str, truth: GroundTruth, *, level: str = "token") -> LeaderboardRow:
        """One criterion against one truth.

        Raises:
            MeasurementError: that criterion was not ranked against it.
        """
        wanted = (criterion, level, truth.kind, truth.preconditioner, truth.version)
        for s in self.rows:
            if (s.criterion, s.level, s.truth, s.preconditioner, s.version) == wanted:
                return s
        raise MeasurementError(f"criterion {criterion} was not ranked against {truth.name} of {level}s")

    def concentration(self, truth: GroundTruth, *, level: str = "token") -> Mapping[str, Estimate]:
        """Share of the tokens to the share of the total |truth| on the largest ones.

        Raises:
            MeasurementError: too few items to rank, so that there is no such figure.
        """
        wanted = (level, truth.kind, truth.preconditioner, truth.version)
        for s in self.summaries:
            if (s.level, s.truth, s.preconditioner, s.version) == wanted:
                return s.best_possible
        raise MeasurementError(f"{truth.name} has fewer than {FEWEST} {level}s to rank; use a larger batch")

    def report(self, properties: Sequence[Regression] = ()) -> Criteria:
        """Content of ``criteria.json``, with regressions of influence on properties."""
        return Criteria(
            truths=TRUTHS,
            preconditioners=PRECONDITIONERS,
            shares=tuple(map(_label, SHARES)),
            rows=self.rows,
            tables=self.summaries,
            definitions={c.name: c.definition() for c in self.criteria},
            properties=tuple(properties),
        )

    def tokens(self) -> CriteriaTokens:
        """Content of ``criteria_tokens.parquet``; the control ``position`` is a column already."""
        scores = {name: values for name, values in self.scores.items() if name != "position"}
        return CriteriaTokens(
            sequence_id=self.facts.sequence,
            position=self.facts.position,
            values={**scores, **{truth.name: truth.values for truth in self.truths}},
        )


@dataclass(frozen=True, kw_only=True)
class RankingOptions(GroundTruthOptions):
    """How criteria are ranked; ``seed`` is also that of the resamples.

    Attributes:
        micro_batch_size: sequences over which micro-batch criteria centre.
        num_resamples: bootstrap resamples of the update prompts.
    """

    micro_batch_size: int = 8
    num_resamples: int = 200


def rank_criteria(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    *,
    criteria: Sequence[Criterion] | None = None,
    options: RankingOptions = RankingOptions(),
    budget: Budget = Budget(),
) -> Leaderboard:
    """Compute the truths about an update batch's tokens, and rank criteria against them.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        probe: samples of the policy that are not in the update batch.
        criteria: what to rank; all known ones by default.
        options: of the truths and of the resamples.
        budget: what may be used at a time.

    Raises:
        MeasurementError: two criteria of one name, or one that returns something else than a score.
        BatchError: a batch that cannot carry it, see ``ground_truths``.
    """
    chosen = known_criteria() if criteria is None else tuple(criteria)
    names = [c.name for c in chosen]
    if twice := sorted({n for n in names if names.count(n) > 1}):
        raise MeasurementError(f"criterion {twice[0]} is there twice; give each a name of its own")
    facts = token_facts(policy, step.update, micro_batch_size=options.micro_batch_size, budget=budget)
    scores = {c.name: c(facts) for c in chosen}
    truths = ground_truths(policy, step, probe, options=options, budget=budget)
    rows: list[LeaderboardRow] = []
    summaries: list[GroundTruthSummary] = []
    tokens = [c for c in chosen if c.level == "token"]
    boards = _token_boards(facts, tokens, scores, truths) + _sequence_boards(facts, chosen, scores, truths)
    for board in boards:
        _rank(board, options.num_resamples, options.seed, rows, summaries)
    return Leaderboard(
        rows=tuple(rows),
        truths=truths,
        summaries=tuple(summaries),
        criteria=chosen,
        facts=facts,
        scores={c.name: scores[c.name] for c in tokens},
    )


@dataclass(frozen=True)
class _Board:
    """Scores and truths about the same items.

    Attributes:
        level: ``token`` or ``sequence``.
        criteria: of the scores.
        scores: (criterion, item).
        truths: which truths.
        values: (truth, item).
        halves: (truth, 2, item), nan where a truth has none.
        clusters: (item,) prompts.
    """

    level: Level
    criteria: Sequence[Criterion]
    scores: FloatArray
    truths: Sequence[GroundTruth]
    values: FloatArray
    halves: FloatArray
    clusters: IntArray


def _token_boards(
    facts: TokenFacts,
    criteria: Sequence[Criterion],
    scores: Mapping[str, FloatArray],
    truths: Sequence[GroundTruth],
) -> list[_Board]:
    """One board per kind of truth: truths of one kind are about the same tokens."""
    boards = []
    for kind in TRUTHS:
        own = [t for t in truths if t.kind == kind]
        items = own[0].chosen
        if len(items) >= FEWEST and criteria:
            boards.append(
                _Board(
                    "token",
                    criteria,
                    np.stack([scores[c.name][items] for c in criteria]),
                    own,
                    np.stack([t.values[items] for t in own]),
                    np.stack([_halves(t)[:, items] for t in own]),
                    facts.prompt[facts.sequence[items]],
                )
            )
    return boards


def _sequence_boards(
    facts: TokenFacts,
    criteria: Sequence[Criterion],
    scores: Mapping[str, FloatArray],
    truths: Sequence[GroundTruth],
) -> list[_Board]:
    """Columns and rows summed over each response; signed token criteria by their sums."""
    ranked = [c for c in criteria if c.level == "sequence" or c.target == "signed"]
    boards = []
    for kind in ("column", "row"):
        own = [t for t in truths if t.kind == kind]
        items = np.unique(facts.sequence[own[0].chosen])
        if len(items) < FEWEST or not ranked:
            continue
        table = [
            scores[c.name] if c.level == "sequence" else facts.per_sequence(scores[c.name]) for c in ranked
        ]
        halves = [np.stack([facts.per_sequence(h) for h in _halves(t)]) for t in own]
        boards.append(
            _Board(
                "sequence",
                ranked,
                np.stack(table)[:, items],
                own,
                np.stack([facts.per_sequence(t.values) for t in own])[:, items],
                np.stack(halves)[..., items],
                facts.prompt[items],
            )
        )
    return boards


def _halves(truth: GroundTruth) -> FloatArray:
    return np.full((2, len(truth.values)), np.nan) if truth.halves is None else truth.halves


def _rank(
    board: _Board,
    num_resamples: int,
    seed: int,
    rows: list[LeaderboardRow],
    summaries: list[GroundTruthSummary],
) -> None:
    signed = np.array([c.target == "signed" for c in board.criteria])
    count = len(np.unique(board.clusters))
    found = compare(
        board.scores, signed, board.values, board.clusters, num_resamples=num_resamples, seed=seed
    )
    for t, truth in enumerate(board.truths):
        for c in range(len(board.criteria)):
            rows.append(_row(board, found, c, t, count))
        summaries.append(
            GroundTruthSummary(
                level=board.level,
                truth=truth.kind,
                preconditioner=truth.preconditioner,
                version=truth.version,
                num_items=board.values.shape[1],
                method=truth.method + ("" if board.level == "token" else "; summed over each response"),
                best_possible={
                    _label(share): _estimate(found.best[q, :, t], count, "share of the total", truth)
                    for q, share in enumerate(SHARES)
                },
                reliability=_reliability(board, t, num_resamples, seed, count),
            )
        )


def _row(board: _Board, found: Comparison, c: int, t: int, count: int) -> LeaderboardRow:
    criterion, truth = board.criteria[c], board.truths[t]
    control = _best_control(board, found, c, t)
    gain = None
    if control is not None and criterion.kind != "control":
        other = found.spearman[:, control, t]
        gain = _estimate(found.spearman[:, c, t] - np.sign(other[0]) * other, count, "correlation", truth)
    return LeaderboardRow(
        quantity="entropy",
        criterion=criterion.name,
        level=board.level,
        kind=criterion.kind,
        target=criterion.target,
        truth=truth.kind,
        preconditioner=truth.preconditioner,
        version=truth.version,
        spearman=_estimate(found.spearman[:, c, t], count, "correlation", truth),
        kendall=_estimate(found.kendall[:, c, t], count, "correlation", truth),
        pearson=_estimate(found.pearson[:, c, t], count, "correlation", truth),
        captured={
            _label(share): _estimate(found.captured[q, :, c, t], count, "share of the total", truth)
            for q, share in enumerate(SHARES)
        },
        sign_agreement=(
            _estimate(found.sign_agreement[:, c, t], count, "share of items", truth)
            if criterion.target == "signed"
            else None
        ),
        auc=_estimate(found.auc[:, c, t], count, "probability", truth),
        gain_over_control=gain,
        best_control=None if control is None else board.criteria[control].name,
    )


def _best_control(board: _Board, found: Comparison, c: int, t: int) -> int | None:
    """The control with the largest |Spearman| of the criterion's target."""
    sizes = {
        i: abs(float(found.spearman[0, i, t]))
        for i, other in enumerate(board.criteria)
        if other.kind == "control" and other.target == board.criteria[c].target
    }
    known = {i: size for i, size in sizes.items() if np.isfinite(size)}
    return max(known, key=known.__getitem__) if known else None


def _reliability(board: _Board, t: int, num_resamples: int, seed: int, count: int) -> Estimate | None:
    first, second = board.halves[t]
    if not np.isfinite(first).all():
        return None
    halves = compare(
        first[None],
        np.array([True]),
        second[None],
        board.clusters,
        num_resamples=num_resamples,
        seed=seed,
    ).spearman[:, 0, 0]
    return _estimate(halves, count, "correlation", board.truths[t])


def _label(share: float) -> str:
    return f"{share:g}"


def _estimate(draws: FloatArray, count: int, unit: str, truth: GroundTruth) -> Estimate:
    """The first entry with the spread of the others; what no resample or too few prompts give is flagged."""
    value, others = float(draws[0]), draws[1:][np.isfinite(draws[1:])]
    reason = ""
    if not np.isfinite(value):
        reason = "undefined: the criterion or the truth is the same for all"
    elif count < 2:
        reason = f"{count} prompt: an error needs at least two"
    elif len(others) < 0.9 * (len(draws) - 1):
        reason = f"undefined in {len(draws) - 1 - len(others)} of {len(draws) - 1} resamples"
    stderr = float(others.std(ddof=1)) if count > 1 and len(others) > 1 else float("nan")
    return Estimate(
        value,
        stderr,
        count,
        unit,
        f"bootstrap over {count} update prompts" + ("" if truth.halves is None else GIVEN_PROBE),
        reliable=not reason,
        reason=reason,
    )
