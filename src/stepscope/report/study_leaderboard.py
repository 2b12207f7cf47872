"""The leaderboard of a study: criteria over checkpoints and repeats, as a table, figures and a sentence."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.criteria import BOARD_CAPTION, PRIMARY, Board, make_board, truth_words
from stepscope.report.figures import LOOKS, MUTED, Figure, error_bars, make_spec, rounded
from stepscope.report.load import trailing_number
from stepscope.report.study_load import Row, Study, agrees
from stepscope.stats import Estimate

_LOOKS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "literature": LOOKS[:5],
    "control": ((MUTED, "circle-open", "solid"), (MUTED, "diamond-open", "dash")),
}
"""Colour, symbol and dash of the leading criteria of each kind; as many are shown."""

_DODGE = 0.012
"""Sideways distance of neighbouring criteria in a figure, as a share of its width."""

_TRUTH = ("truth", "preconditioner", "version")


def study_board(study: Study, setting: str) -> Board | None:
    """Every criterion against every truth at every checkpoint, over the repeats."""
    rows = _standings(study, setting)
    if study.leaderboard is None or not rows:
        return None
    repeats = max(int(row["repeats"]) for row in rows)
    what = (
        f"Mean over {repeats} repeats ± the standard error of that mean, {study.spread}."
        if repeats > 1
        else "± is one standard error, by bootstrap over update prompts."
    )
    still = (
        " Rows and diagonals do not depend on the probe batch, so that repeats of one update batch agree."
        if repeats > 1 and study.resample == "probe"
        else ""
    )
    return make_board(
        [{**row, "best_control": _control_words(row["best_controls"])} for row in rows],
        study.leaderboard["shares"],
        study.leaderboard["definitions"],
        f"{BOARD_CAPTION} {what}{still} Gain: Spearman less |Spearman| of the trivial control that is best "
        "in the same measurement; of several best controls, in how many repeats each was.",
        study.labels,
    )


def _standings(study: Study, setting: str) -> list[Row]:
    rows = [] if study.leaderboard is None else study.leaderboard["rows"]
    return [row for row in rows if row["setting"] == setting]


def _control_words(best: Mapping[str, int]) -> str:
    if len(best) == 1:
        return next(iter(best))
    return ", ".join(f"{name} ({count})" for name, count in best.items())


def standings_figures(study: Study, setting: str) -> list[Figure]:
    """The leading signed criteria by checkpoint, one figure per truth about tokens; the primary one first."""
    rows = _shown(study, setting)
    truths = list(dict.fromkeys(tuple(row[name] for name in _TRUTH) for row in rows))
    truths.sort(key=lambda truth: truth != tuple(PRIMARY[name] for name in _TRUTH))
    figures = []
    for number, truth in enumerate(truths):
        own = [row for row in rows if agrees(row, dict(zip(_TRUTH, truth, strict=True)))]
        if figure := _by_checkpoint(study, own, f"standings-{number}"):
            figures.append(figure)
    return figures


def _shown(study: Study, setting: str) -> list[Row]:
    """Standings of signed criteria about tokens, with Spearman correlation and gain as estimates."""
    return [
        {
            **row,
            **{
                name: Estimate.from_dict(row[name])
                for name in ("spearman", "gain_over_control")
                if row[name] is not None
            },
        }
        for row in _standings(study, setting)
        if (row["level"], row["target"]) == (PRIMARY["level"], PRIMARY["target"])
    ]


def _leaders(rows: Sequence[Row], kind: str, count: int) -> dict[str, dict[str, Row]]:
    """Rows by criterion and checkpoint of those with the largest mean Spearman over checkpoints, in size."""
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["kind"] == kind and math.isfinite(row["spearman"].value):
            found.setdefault(row["criterion"], {})[row["checkpoint"]] = row

    def size(name: str) -> float:
        values = [row["spearman"].value for row in found[name].values()]
        return abs(float(sum(values)) / len(values))

    return {name: found[name] for name in sorted(found, key=size, reverse=True)[:count]}


def _by_checkpoint(study: Study, rows: Sequence[Row], key: str) -> Figure | None:
    """Spearman correlation of the leading criteria and controls with one truth, against the step."""
    lines = [
        (name, own, look)
        for kind, looks in _LOOKS.items()
        for (name, own), look in zip(_leaders(rows, kind, len(looks)).items(), looks, strict=False)
    ]
    if not lines:
        return None
    checkpoints = list(dict.fromkeys(row["checkpoint"] for row in rows))
    joined = _of_one_run(checkpoints)
    places, axis = _places(study, checkpoints)
    width = (max(places.values()) - min(places.values())) or 1.0
    traces = []
    for number, (name, own, (color, symbol, dash)) in enumerate(lines):
        aside = (number - (len(lines) - 1) / 2) * _DODGE * width
        points = [(places[c], c, own[c]["spearman"]) for c in places if c in own]
        traces.append(
            go.Scatter(
                x=rounded(x + aside for x, _, _ in points),
                y=rounded(figure.value for _, _, figure in points),
                error_y=error_bars((figure for _, _, figure in points), color),
                mode="lines+markers" if joined else "markers",
                name=text.plotly_text(name),
                line={"color": color, "width": 1.2, "dash": dash},
                marker={"size": 8, "color": color, "symbol": symbol},
                customdata=[
                    f"{text.plotly_text(study.labels[c])}: {_hover(figure)}" for _, c, figure in points
                ],
                hovertemplate="%{fullData.name}<br>%{customdata}<extra></extra>",
            )
        )
    spec = make_spec(
        traces,
        xaxis=axis,
        yaxis={"title": {"text": "Spearman correlation with measured effect"}, "zeroline": True},
    )
    repeats = max(int(row["repeats"]) for row in rows)
    what = (
        f"Mean over {repeats} repeats; error bars: 95 % interval of the mean, {study.spread}"
        if repeats > 1
        else "One measurement each; error bars: 95 %, bootstrap over update prompts, given the probe"
    )
    words = truth_words(rows[0])
    caption = (
        f"Truth: {words}. The criteria of the literature (in colour) and the trivial controls (grey, open) "
        f"with the largest mean correlation over the checkpoints, chosen with hindsight. {what}. Points of "
        "one checkpoint stand beside one another so that their bars can be told apart."
    )
    return Figure(key, f"Leading criteria: {words}", caption, spec, height=460)


def _hover(figure: Estimate) -> str:
    words = f"{text.plus_minus(figure.value, figure.stderr)}<br>{text.plotly_text(figure.method)}"
    return words if figure.reliable else f"{words}<br>{text.plotly_text(figure.reason)}"


def _places(study: Study, checkpoints: Sequence[str]) -> tuple[dict[str, float], dict[str, Any]]:
    """Place of each checkpoint and the axis: its step, or its number where they are not all of one run."""
    if _of_one_run(checkpoints):
        ordered = sorted((trailing_number(Path(path)), path) for path in checkpoints)
        places = {path: float(step) for step, path in ordered}
        title, ticks = "optimizer step of the checkpoint", [str(step) for step, _ in ordered]
    else:
        places = {path: float(place) for place, path in enumerate(checkpoints)}
        title, ticks = "checkpoint", [text.plotly_text(study.labels[path]) for path in checkpoints]
    axis = {"title": {"text": title}, "tickvals": list(places.values()), "ticktext": ticks}
    return places, axis


def _of_one_run(checkpoints: Sequence[str]) -> bool:
    paths = [Path(path) for path in checkpoints]
    return len({path.parent for path in paths}) == 1 and all(trailing_number(path) >= 0 for path in paths)


def standings_sentence(study: Study, setting: str) -> str:
    """In words: how well the leading criterion and control follow the influence of tokens, by checkpoint."""
    rows = [row for row in _shown(study, setting) if agrees(row, PRIMARY)]
    best, control = (next(iter(_leaders(rows, kind, 1).items()), None) for kind in _LOOKS)
    if best is None or control is None:
        return ""
    gains = {
        path: row["gain_over_control"]
        for path, row in best[1].items()
        if row["gain_over_control"] is not None
    }
    return (
        f"Of the literature's criteria, {best[0]} ranks the tokens' measured influence on the entropy best "
        f"on average over the checkpoints: Spearman {_listed(study, _spearmans(best[1]))}. The best trivial "
        f"control, {control[0]}, reaches {_listed(study, _spearmans(control[1]))}. Difference to the best "
        f"control of each measurement: {_listed(study, gains)}."
    )


def _spearmans(rows: Mapping[str, Row]) -> dict[str, Estimate]:
    return {path: row["spearman"] for path, row in rows.items()}


def _listed(study: Study, figures: Mapping[str, Estimate]) -> str:
    return ", ".join(
        f"{text.plus_minus(figure.value, figure.stderr)} ({study.labels[path]})"
        for path, figure in figures.items()
    )
