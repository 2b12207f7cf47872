"""The leaderboard: cheap criteria against the measured effect of every token on the entropy.

Truths are those of :mod:`stepscope.measure.criteria.ground_truth`. Signed criteria are compared with the
truth, magnitude criteria with its size. Every figure has an error over the update batch's prompts and, where
its truth was measured on a probe batch, over the probe's (:mod:`stepscope.measure.criteria.two_way`); every
criterion is compared with the best trivial control of its kind on the same tokens and probes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.measure.criteria.criterion import Criterion, known_criteria
from stepscope.measure.criteria.doubts import FEW_CARRIERS, FEW_SQUARES, carried, few_items
from stepscope.measure.criteria.facts import token_facts
from stepscope.measure.criteria.ground_truth import (
    PRECONDITIONERS,
    TRUTHS,
    GroundTruth,
    GroundTruthOptions,
    ground_truths,
)
from stepscope.measure.criteria.learned import crossed, learned_criteria, learned_scores
from stepscope.measure.criteria.models import modelled_influence
from stepscope.measure.criteria.statistics import SHARES, Comparison, compare, left_out
from stepscope.measure.criteria.two_way import Scale, Way, two_way
from stepscope.measure.kernel.machines import MachineOptions
from stepscope.measure.quantity.probe import Bindings
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
from stepscope.results.views import Parts, Plotted
from stepscope.rules import TokenFacts
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

FEWEST = 3
"""A rank correlation needs at least so many items."""

GIVEN_PROBE = ", conditional on the probe batch"
"""What the error of the truth's own reliability is given: it compares the halves of one probe."""


@dataclass(frozen=True, repr=False)
class Leaderboard(Plotted, Brief):
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

    def to_pandas(self) -> pd.DataFrame:
        """A row per criterion and truth."""
        return self.report().to_pandas()

    def _viewed(self) -> Parts:
        return Parts("Criteria against the measured influence", {"criteria": self.report()})

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
    """How criteria are ranked; ``seed`` is also that of the groups of more than 64 update prompts.

    Attributes:
        micro_batch_size: sequences over which micro-batch criteria centre.
        learned: also rank criteria that are learned (:mod:`stepscope.measure.criteria.learned`): two machines
            fitted eight times.
    """

    micro_batch_size: int = 8
    learned: bool = False


def rank_criteria(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    *,
    criteria: Sequence[Criterion] | None = None,
    options: RankingOptions = RankingOptions(),
    bindings: Bindings | None = None,
    budget: Budget = Budget(),
) -> Leaderboard:
    """Compute the truths about an update batch's tokens, and rank criteria against them.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        probe: samples of the policy that are not in the update batch.
        criteria: what to rank; all known ones by default.
        options: of the truths and of the criteria.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
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
    if any(c.needs for c in chosen):
        facts = replace(facts, modelled=modelled_influence(policy, step, budget=budget))
        chosen = tuple(c for c in chosen if not c.needs or c.needs in facts.modelled)
    scores = {c.name: c(facts) for c in chosen}
    truths = ground_truths(policy, step, probe, options=options, bindings=bindings, budget=budget)
    rows: list[LeaderboardRow] = []
    summaries: list[GroundTruthSummary] = []
    learned: dict[str, FloatArray] = {}
    if options.learned:
        primary = next(t for t in truths if t.name == "column_adamw_on_policy")
        learned = learned_scores(facts, scores, primary, MachineOptions(seed=options.seed))
        means = {name: np.asarray(own.mean(0), dtype=np.float64) for name, own in learned.items()}
        chosen, scores = (*chosen, *learned_criteria(means)), scores | means
    tokens = [c for c in chosen if c.level == "token"]
    boards = _token_boards(facts, tokens, scores, truths) + _sequence_boards(facts, chosen, scores, truths)
    for board in (_with_learned(board, facts, learned) for board in boards):
        _rank(board, probe.num_prompts, options.seed, rows, summaries)
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
        halves: (truth, 2, item) the values from halves of the probe; None where no probe enters.
        without: (truth, fold, item) the values without each fold of the probe; None likewise.
        clusters: (item,) prompts.
        items: (item,) which tokens (sequences) of the batch.
        learned: which score to its (2, item) values as learned from either half of the probe.
        half_parts: (truth, fold, 2, item) the halves without each fold, where scores are learned.
    """

    level: Level
    criteria: Sequence[Criterion]
    scores: FloatArray
    truths: Sequence[GroundTruth]
    values: FloatArray
    halves: FloatArray | None
    without: FloatArray | None
    clusters: IntArray
    items: IntArray
    learned: Mapping[int, FloatArray] = field(default_factory=dict)
    half_parts: FloatArray | None = None

    def of(self, rows: FloatArray, facts: TokenFacts) -> FloatArray:
        """(row, item) of (row, tok) values: those of the tokens, or sums over the sequences."""
        if self.level == "sequence":
            rows = np.stack([facts.per_sequence(row) for row in rows])
        return np.asarray(rows[:, self.items], dtype=np.float64)


def _with_learned(board: _Board, facts: TokenFacts, learned: Mapping[str, FloatArray]) -> _Board:
    """The board with what each learned score is from either half, where truths rest on a probe."""
    places = {c.name: place for place, c in enumerate(board.criteria)}
    own = {places[name]: board.of(values, facts) for name, values in learned.items()}
    parts = [t.halves_without_folds for t in board.truths]
    if not own or any(p is None for p in parts):
        return board
    found = np.stack([np.stack([board.of(two, facts) for two in p]) for p in parts if p is not None])
    return replace(board, learned=own, half_parts=found)


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

        def chosen(rows: FloatArray, items: IntArray = items) -> FloatArray:
            return rows[:, items]

        if len(items) >= FEWEST and criteria:
            boards.append(
                _Board(
                    "token",
                    criteria,
                    chosen(np.stack([scores[c.name] for c in criteria])),
                    own,
                    chosen(np.stack([t.values for t in own])),
                    _stacked([t.halves for t in own], chosen),
                    _stacked([t.without_folds for t in own], chosen),
                    facts.prompt[facts.sequence[items]],
                    items,
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

        def summed(rows: FloatArray, items: IntArray = items) -> FloatArray:
            return np.stack([facts.per_sequence(row) for row in rows])[:, items]

        boards.append(
            _Board(
                "sequence",
                ranked,
                np.stack(table)[:, items],
                own,
                summed(np.stack([t.values for t in own])),
                _stacked([t.halves for t in own], summed),
                _stacked([t.without_folds for t in own], summed),
                facts.prompt[items],
                items,
            )
        )
    return boards


def _stacked(
    parts: Sequence[FloatArray | None], about: Callable[[FloatArray], FloatArray]
) -> FloatArray | None:
    """(truth, part, item) of the items of a board; None where the truths rest on no probe."""
    known = [about(part) for part in parts if part is not None]
    return np.stack(known) if known else None


@dataclass(frozen=True)
class _Errors:
    """What makes estimates of a board's statistics.

    Attributes:
        found: the statistics of all items, then without each group of update prompts.
        folded: those against the truths without each fold of the probe, truth by truth; None where no probe
            enters.
        values: (truth, item) of the board.
        prompts: update prompts of the board.
        probe_prompts: prompts of the probe.
    """

    found: Comparison
    folded: Comparison | None
    values: FloatArray
    prompts: int
    probe_prompts: int

    def estimate(
        self, statistic: Callable[[Comparison], FloatArray], t: int, *, unit: str, scale: Scale
    ) -> Estimate:
        """One statistic against truth ``t``.

        Args:
            statistic: its (resample, truth) values in a comparison.
            t: which truth.
            unit: of the statistic.
            scale: of its interval.
        """
        draws = statistic(self.found)[:, t]
        ways = [Way("update prompts", self.prompts, draws[1:])]
        if self.folded is not None:
            by_fold = statistic(self.folded)[0].reshape(self.found.best.shape[-1], -1)[t]
            ways.append(Way("probe prompts", self.probe_prompts, by_fold))
        return two_way(float(draws[0]), tuple(ways), unit=unit, scale=scale)

    def captured(self, of: Callable[[Comparison], FloatArray], t: int) -> dict[str, Estimate]:
        """The shares of the total against truth ``t`` by share of the items.

        Args:
            of: its (share, resample, truth) values in a comparison.
            t: which truth.
        """
        sizes = np.abs(self.values[t])
        doubt = carried(sizes, FEW_CARRIERS)
        found = {}
        for q, share in enumerate(SHARES):

            def selected(comparison: Comparison, q: int = q) -> FloatArray:
                shares: FloatArray = of(comparison)[q]
                return shares

            figure = self.estimate(selected, t, unit="share of the total", scale="share")
            found[_label(share)] = figure.doubted(few_items(share * len(sizes)), doubt)
        return found


def _rank(
    board: _Board,
    probe_prompts: int,
    seed: int,
    rows: list[LeaderboardRow],
    summaries: list[GroundTruthSummary],
) -> None:
    signed = np.array([c.target == "signed" for c in board.criteria])
    names, index = np.unique(board.clusters, return_inverse=True)
    counts = left_out(index, seed)
    found = compare(board.scores, signed, board.values, index, counts=counts, seed=seed)
    folded = None
    if board.without is not None:
        truths = board.without.reshape(-1, board.values.shape[1])
        folded = compare(board.scores, signed, truths, index)
    if folded is not None and board.halves is not None and board.half_parts is not None:
        found, folded = crossed(
            found, folded, board.learned, board.halves, board.half_parts, index, counts=counts, seed=seed
        )
    errors = _Errors(found, folded, board.values, len(names), probe_prompts)
    for t, truth in enumerate(board.truths):
        for c in range(len(board.criteria)):
            rows.append(_row(board, errors, c, t))
        reliability = None
        if board.halves is not None:
            first, second = board.halves[t]
            halves = compare(first[None], np.array([True]), second[None], index, counts=counts, seed=seed)
            given = _Errors(halves, None, board.values, len(names), probe_prompts)
            reliability = given.estimate(
                lambda x: x.spearman[:, 0], 0, unit="correlation", scale="correlation"
            )
        summaries.append(
            GroundTruthSummary(
                level=board.level,
                truth=truth.kind,
                preconditioner=truth.preconditioner,
                version=truth.version,
                num_items=board.values.shape[1],
                method=truth.method + ("" if board.level == "token" else "; summed over each response"),
                best_possible=errors.captured(lambda x: x.best, t),
                reliability=reliability and replace(reliability, method=reliability.method + GIVEN_PROBE),
            )
        )


def _row(board: _Board, errors: _Errors, c: int, t: int) -> LeaderboardRow:
    criterion, truth = board.criteria[c], board.truths[t]
    control = _best_control(board, errors.found, c, t)
    gain = None
    if control is not None and criterion.kind != "control":
        turn = np.sign(errors.found.spearman[0, control, t])
        gain = errors.estimate(
            lambda x: x.spearman[:, c] - turn * x.spearman[:, control],
            t,
            unit="correlation",
            scale="difference",
        )

    def correlation(of: Callable[[Comparison], FloatArray]) -> Estimate:
        return errors.estimate(lambda x: of(x)[:, c], t, unit="correlation", scale="correlation")

    def share(of: Callable[[Comparison], FloatArray], unit: str) -> Estimate:
        return errors.estimate(lambda x: of(x)[:, c], t, unit=unit, scale="share")

    return LeaderboardRow(
        quantity="entropy",
        criterion=criterion.name,
        level=board.level,
        kind=criterion.kind,
        target=criterion.target,
        truth=truth.kind,
        preconditioner=truth.preconditioner,
        version=truth.version,
        spearman=correlation(lambda x: x.spearman),
        kendall=correlation(lambda x: x.kendall),
        pearson=correlation(lambda x: x.pearson).doubted(carried(board.values[t] ** 2, FEW_SQUARES)),
        captured=errors.captured(lambda x: x.captured[:, :, c], t),
        sign_agreement=(
            share(lambda x: x.sign_agreement, "share of items") if criterion.target == "signed" else None
        ),
        auc=share(lambda x: x.auc, "probability"),
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


def _label(share: float) -> str:
    return f"{share:g}"
