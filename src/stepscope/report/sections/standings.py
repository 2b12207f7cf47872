"""The leaderboard of a study: criteria over checkpoints and repeats."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from stepscope.report import style, text
from stepscope.report.load import StudyPage
from stepscope.report.parts import Section
from stepscope.report.sections.criteria import CAPTION, OVER, PRIMARY, Entry, agrees, make_board, truth_words
from stepscope.report.tables import Board
from stepscope.results.study import StudyLeaderboard, StudyStanding
from stepscope.stats import Estimate

_LOOKS: Mapping[str, Sequence[style.Look]] = {
    "literature": style.LOOKS[:5],
    "model": (style.LOOKS[5],),
    "control": (style.Look(style.MUTED, "circle-open"), style.Look(style.MUTED, "diamond-open", "dash")),
}
"""Looks of the leading criteria of each kind; as many are shown."""

_DODGE = 0.012
"""Sideways distance of neighbouring criteria in a figure, as a share of its width."""

_TRUTH = ("truth", "preconditioner", "version")


def standings(study: StudyPage, setting: str) -> Section | None:
    """The leaderboard of a setting; the primary truth is drawn, the others unfold."""
    found = study.report.leaderboard
    rows = [row for row in found.rows if row.setting == setting] if found else []
    if found is None or not rows:
        return None
    about = [row for row in rows if (row.level, row.target) == (PRIMARY["level"], PRIMARY["target"])]
    truths = list(dict.fromkeys(tuple(getattr(row, name) for name in _TRUTH) for row in about))
    truths.sort(key=lambda truth: truth != tuple(PRIMARY[name] for name in _TRUTH))
    figures = []
    for number, truth in enumerate(truths):
        own = [row for row in about if agrees(row, dict(zip(_TRUTH, truth, strict=True)))]
        if drawn := _by_checkpoint(study, own, f"standings-{number}"):
            figures.append(drawn)
    return Section(
        "criteria",
        "Which cheap criteria find the tokens",
        intro=_sentence(study, [row for row in about if agrees(row, PRIMARY)]),
        figures=figures[:1],
        board=_board(study, found, rows),
        more_title="Other truths" if len(figures) > 1 else "",
        more_figures=figures[1:],
    )


def _board(study: StudyPage, found: StudyLeaderboard, rows: Sequence[StudyStanding]) -> Board:
    """Every criterion against every truth at every checkpoint, over the repeats."""
    repeats = max(row.repeats for row in rows)
    what = (
        f"Mean over {repeats} repeats ± the standard error of that mean, {study.report.spread}."
        if repeats > 1
        else f"± is one standard error, {OVER}."
    )
    still = (
        " Rows and diagonals do not depend on the probe batch, so that repeats of one update batch agree."
        if repeats > 1 and study.report.resample == "probe"
        else ""
    )
    return make_board(
        [Entry(row, _control_words(row.best_controls), row.checkpoint, row.repeats) for row in rows],
        found.shares,
        found.definitions,
        f"{CAPTION} {what}{still} Gain: Spearman less |Spearman| of the trivial control that is best "
        "in the same measurement; of several best controls, in how many repeats each was.",
        study.labels,
    )


def _control_words(best: Mapping[str, int]) -> str:
    return next(iter(best)) if len(best) == 1 else ", ".join(f"{name} ({n})" for name, n in best.items())


def _leaders(rows: Sequence[StudyStanding], kind: str, count: int) -> dict[str, dict[str, Any]]:
    """Rows by criterion and checkpoint of those with the largest mean Spearman over checkpoints, in size."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row.kind == kind and row.spearman is not None and math.isfinite(row.spearman.value):
            found.setdefault(row.criterion, {})[row.checkpoint] = row

    def size(name: str) -> float:
        values: list[float] = [row.spearman.value for row in found[name].values()]
        return abs(sum(values) / len(values))

    return {name: found[name] for name in sorted(found, key=size, reverse=True)[:count]}


def _by_checkpoint(study: StudyPage, rows: Sequence[StudyStanding], key: str) -> style.Figure | None:
    """Spearman correlation of the leading criteria and controls with one truth, against the step."""
    lines = [
        (name, own, seen)
        for kind, looks in _LOOKS.items()
        for (name, own), seen in zip(_leaders(rows, kind, len(looks)).items(), looks, strict=False)
    ]
    if not lines:
        return None
    checkpoints = list(dict.fromkeys(row.checkpoint for row in rows))
    places, x = _places(study, checkpoints)
    width = (max(places.values()) - min(places.values())) or 1.0
    traces = []
    for number, (name, own, seen) in enumerate(lines):
        aside = (number - (len(lines) - 1) / 2) * _DODGE * width
        points = [(places[c] + aside, c, own[c].spearman) for c in places if c in own]
        traces.append(
            style.curve(
                text.plotly_text(name),
                [x for x, _, _ in points],
                [found for _, _, found in points],
                seen,
                "%{fullData.name}<br>%{customdata}",
                mode="lines+markers" if _of_one_run(checkpoints) else "markers",
                size=8,
                width=1.2,
                details=[f"{text.plotly_text(study.labels[c])}: {_hover(found)}" for _, c, found in points],
            )
        )
    repeats, words = max(row.repeats for row in rows), truth_words(rows[0])
    what = (
        f"Mean over {repeats} repeats; error bars: 95 % interval of the mean, {study.report.spread}"
        if repeats > 1
        else f"One measurement each; error bars: 95 %, {OVER}"
    )
    caption = (
        f"Truth: {words}. The criteria of the literature (in colour) and the trivial controls (grey, open) "
        f"with the largest mean correlation over the checkpoints, chosen with hindsight. {what}. Points of "
        "one checkpoint stand beside one another so that their bars can be told apart."
    )
    y = style.axis("Spearman correlation with measured effect", zeroline=True)
    return style.figure(key, f"Leading criteria: {words}", caption, traces, height=460, xaxis=x, yaxis=y)


def _hover(found: Estimate) -> str:
    reason = "" if found.reliable else f"<br>{text.plotly_text(found.reason)}"
    return f"{text.bare(found)}<br>{text.plotly_text(found.method)}{reason}"


def _places(study: StudyPage, checkpoints: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Place of each checkpoint and the axis: its step, or its number where they are not all of one run."""
    if _of_one_run(checkpoints):
        places = {path: float(_step(path)) for path in sorted(checkpoints, key=_step)}
        title, ticks = "optimizer step of the checkpoint", [str(_step(path)) for path in places]
    else:
        places = {path: float(place) for place, path in enumerate(checkpoints)}
        title, ticks = "checkpoint", [text.plotly_text(study.labels[path]) for path in checkpoints]
    return places, style.axis(title, tickvals=list(places.values()), ticktext=ticks)


def _step(checkpoint: str) -> int:
    """The step that the name of a folder ends in; -1 where there is none."""
    match = re.search(r"(\d+)$", Path(checkpoint).name)
    return int(match[1]) if match else -1


def _of_one_run(checkpoints: Sequence[str]) -> bool:
    return len({Path(path).parent for path in checkpoints}) == 1 and all(
        _step(path) >= 0 for path in checkpoints
    )


def _sentence(study: StudyPage, rows: Sequence[StudyStanding]) -> str:
    """In words: how well the leading criterion and control follow the influence of tokens, by checkpoint."""
    best, control = (next(iter(_leaders(rows, kind, 1).items()), None) for kind in ("literature", "control"))
    if best is None or control is None:
        return ""

    def listed(own: Mapping[str, Any], name: str) -> str:
        found = {path: getattr(row, name) for path, row in own.items()}
        return ", ".join(
            f"{text.bare(e)} ({study.labels[path]})" for path, e in found.items() if e is not None
        )

    return (
        f"Of the literature's criteria, {best[0]} ranks the tokens' measured influence on the entropy best "
        f"on average over the checkpoints: Spearman {listed(best[1], 'spearman')}. The best trivial "
        f"control, {control[0]}, reaches {listed(control[1], 'spearman')}. Difference to the best "
        f"control of each measurement: {listed(best[1], 'gain_over_control')}."
    )
