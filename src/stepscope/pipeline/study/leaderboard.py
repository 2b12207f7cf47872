"""The leaderboards of a study's cells as one: what a criterion reaches over update batches, by checkpoint."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any, Literal

import numpy as np

from stepscope.config import MeasureConfig
from stepscope.pipeline.study.table import SPREAD, Row, grouped, mean_over_repeats
from stepscope.results.criteria import Criteria, CriterionDefinition
from stepscope.results.study import StudyLeaderboard, StudyStanding
from stepscope.stats import Estimate

RANKED = ("quantity", "level", "truth", "preconditioner", "version", "criterion", "kind", "target")
"""What tells the standings of a measurement apart."""

STATISTICS = ("spearman", "kendall", "pearson", "sign_agreement", "auc", "gain_over_control")
"""Statistics of a standing; ``captured_SHARE``, one per share of the tokens, are the others."""

_CAPTURED = "captured_"


def standing_rows(criteria: Criteria, config: MeasureConfig) -> list[Row]:
    """One row per standing and statistic of a finished cell; a statistic that is not of its kind has none.

    Args:
        criteria: its ``criteria.json``.
        config: of the measurement.
    """
    rows = []
    for standing in criteria.rows:
        figures = {name: getattr(standing, name) for name in STATISTICS}
        figures |= {f"{_CAPTURED}{share}": figure for share, figure in standing.captured.items()}
        rows += [
            {
                "update_seed": config.update.seed,
                "probe_seed": config.probe.seed,
                **{key: getattr(standing, key) for key in RANKED},
                "best_control": standing.best_control,
                "statistic": name,
                **asdict(figure),
            }
            for name, figure in figures.items()
            if figure is not None
        ]
    return rows


def summarise_standings(
    rows: Sequence[Row], definitions: Mapping[str, CriterionDefinition], resample: Literal["probe", "both"]
) -> StudyLeaderboard:
    """What the repeats of each checkpoint and setting say together about every criterion.

    Repeats are averaged with equal weights, each statistic as it stands in its own cell. So the gain over the
    best trivial control is paired: a criterion and the control that does best in the same cell, whichever it
    is, share the update batch, and what they have in common cancels before the spread is taken.

    Args:
        rows: of ``leaderboard.parquet``, of at least one standing.
        definitions: of the criteria by name, as in ``criteria.json``.
        resample: what each repeat draws anew, which is what the spread over repeats is over.

    Returns:
        ``leaderboard`` of ``study.json``. ``shares``: of the tokens, as keys of ``captured``. ``rows``: one
        per checkpoint, setting and standing, of the shape of those in ``criteria.json``; each statistic is
        the mean over the ``repeats`` that have it, with the standard error from their spread (of a lone
        repeat: its own). In place of one best control, ``best_controls`` says in how many repeats each was
        the best.
        ``definitions``: as given.
    """
    spread = SPREAD[resample]
    labels = dict.fromkeys(row["statistic"] for row in rows if row["statistic"].startswith(_CAPTURED))
    shares = [label.removeprefix(_CAPTURED) for label in labels]
    together = []
    for names, members in grouped(rows, ("checkpoint", "setting", *RANKED)):
        repeats = {row["repeat"]: row["best_control"] for row in members}
        found = {
            str(key["statistic"]): _over_repeats(own, spread) for key, own in grouped(members, ("statistic",))
        }
        figures: dict[str, Any] = {name: found.get(name) for name in STATISTICS}
        together.append(
            StudyStanding(
                **names,
                repeats=len(repeats),
                **figures,
                captured={share: found.get(f"{_CAPTURED}{share}") for share in shares},
                best_controls=dict(Counter(c for c in repeats.values() if c is not None).most_common()),
            )
        )
    return StudyLeaderboard(tuple(shares), tuple(together), dict(definitions))


def _over_repeats(members: Sequence[Row], spread: str) -> Estimate:
    """One statistic over the repeats: the mean of those where it is defined, its error from their spread."""
    known = [m for m in members if math.isfinite(m["value"])]
    doubts = []
    if missing := len(members) - len(known):
        doubts.append(f"undefined in {missing} of {len(members)} repeats")
    if flagged := sum(not m["reliable"] for m in known):
        doubts.append(f"flagged in {flagged} of {len(members)} measurements")
    reason = "; ".join(doubts)
    if len(known) > 1:
        return mean_over_repeats(np.array([m["value"] for m in known]), known[0]["unit"], spread, reason)
    lone = Estimate(**{f.name: (known or members)[0][f.name] for f in fields(Estimate)})
    lone = replace(lone, method=f"one measurement, {lone.method}")
    if len(members) > 1:
        lone = replace(lone, reliable=False, reason=reason)
    return lone
