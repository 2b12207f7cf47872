"""The leaderboard of criteria: a table to filter and sort, and a figure of the best against the controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import BLUE, MUTED, Figure, error_bars, make_spec, rounded
from stepscope.report.load import Measurement, parse_estimate
from stepscope.stats import Estimate

PRIMARY = {
    "level": "token",
    "target": "signed",
    "truth": "column",
    "preconditioner": "adamw",
    "version": "on_policy",
}
"""What the page shows first: what a token does to the entropy, through the whole kernel and AdamW."""

_SHOWN = 24

BOARD_CAPTION = (
    "Correlation of each criterion with the measured effect of each token (or sequence) on the entropy. "
    "Magnitude criteria (masks, weights, norms) are compared with the size of the effect. Captured: share of "
    "the total absolute effect on the tokens it puts first."
)
"""What the columns of a leaderboard are."""

_CHOICES: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "level": ("of", {"token": "tokens", "sequence": "sequences"}),
    "target": ("predicting", {"signed": "effects with their sign", "magnitude": "sizes of effects"}),
    "truth": (
        "truth",
        {
            "column on_policy": "what a token does to the entropy, on-policy (column sums)",
            "column fixed_prefix": "what a token does to the entropy, fixed-prefix (column sums)",
            "row fixed_prefix": "what happens at its position (row sums)",
            "diagonal fixed_prefix": "what it does at its own position (diagonal)",
        },
    ),
    "preconditioner": ("step", {"adamw": "AdamW", "sgd": "plain gradient"}),
    "kind": ("criteria", {"literature": "of the literature", "control": "trivial controls"}),
}


def truth_words(row: Mapping[str, Any]) -> str:
    """The truth that a standing is about, and the step it belongs to, in words."""
    what = _CHOICES["truth"][1][f"{row['truth']} {row['version']}"]
    return f"{what}, step by {_CHOICES['preconditioner'][1][row['preconditioner']]}"


@dataclass(frozen=True)
class Board:
    """A table that the script of the page draws, because its rows are many and few are looked at at once.

    Attributes:
        key: part of its element id.
        caption: below it.
        spec: ``filters`` (key, label, options as value and label, value chosen first; an empty value is no
            filter), ``columns`` (name, anchor, whether numeric, whether with an error) and ``rows``: values
            of the filters, then cells: a text, or a number and its standard error. ``notes`` are shown where
            the pointer rests on a text of the first column; ``sort`` is the column that orders the rows.
    """

    key: str
    caption: str
    spec: Mapping[str, Any]


def leaderboard(measurement: Measurement) -> Board | None:
    """Every criterion against every truth."""
    criteria = measurement.criteria
    if criteria is None or not criteria["rows"]:
        return None
    return make_board(
        criteria["rows"],
        criteria["shares"],
        criteria["definitions"],
        f"{BOARD_CAPTION} ± is one standard error, by bootstrap over update prompts. Gain: Spearman less "
        "|Spearman| of the best trivial control, same resamples.",
    )


def make_board(
    rows: Sequence[Mapping[str, Any]],
    shares: Sequence[str],
    definitions: Mapping[str, Any],
    caption: str,
    checkpoints: Mapping[str, str] | None = None,
) -> Board:
    """A table of standings with a filter for each thing that tells them apart.

    Args:
        rows: standings, as in ``criteria.json``; those of a study name their ``checkpoint`` and ``repeats``.
        shares: keys of ``captured``.
        definitions: of the criteria by name.
        caption: below the table.
        checkpoints: names of the checkpoints of a study by path, or None for one measurement.
    """
    placed = [{**row, "truth": f"{row['truth']} {row['version']}"} for row in rows]
    first = {**PRIMARY, "truth": f"{PRIMARY['truth']} {PRIMARY['version']}"}
    choices = {"checkpoint": ("checkpoint", checkpoints), **_CHOICES} if checkpoints else _CHOICES
    filters: list[dict[str, Any]] = []
    for key, (label, names) in choices.items():
        values = [value for value in names if any(row[key] == value for row in placed)]
        if len(values) > 1:
            options: list[list[str]] = [] if key in first else [["", "all"]]
            options += [[value, names[value]] for value in values]
            chosen = first[key] if first.get(key) in values else options[0][0]
            filters.append({"key": key, "label": label, "options": options, "first": chosen})
    columns: list[dict[str, Any]] = [
        {"name": "Criterion", "anchor": "def-criterion"},
        {"name": "Kind"},
        *([{"name": "Checkpoint"}, {"name": "Repeats", "anchor": "def-n"}] if checkpoints else []),
        {"name": "Spearman", "anchor": "def-leaderboard", "err": True},
        {"name": "Kendall τ", "err": True},
        {"name": "Pearson", "err": True},
        *({"name": f"Captured by top {text.percent(float(s))}", "err": True} for s in shares),
        {"name": "Sign agreement", "err": True},
        {"name": "AUC", "err": True},
        {"name": "Gain over best control", "err": True},
        {"name": "Best control"},
    ]
    return Board(
        "leaderboard",
        caption,
        {
            "filters": filters,
            "columns": columns,
            "rows": [[[row[f["key"]] for f in filters], _cells(row, shares, checkpoints)] for row in placed],
            "notes": {name: _note(about) for name, about in definitions.items()},
            "sort": next(i for i, column in enumerate(columns) if column["name"] == "Spearman"),
        },
    )


def _note(about: Mapping[str, Any]) -> str:
    source = " ".join(str(about[key]) for key in ("paper", "equation") if about.get(key))
    note = f"{about.get('formula', '')}" + (f" ({source})" if source else "")
    return note if about.get("verified", True) else f"{note}; formula not verified against the paper"


def _cells(row: Mapping[str, Any], shares: Sequence[str], checkpoints: Mapping[str, str] | None) -> list[Any]:
    return [
        row["criterion"],
        row["kind"],
        *([checkpoints[row["checkpoint"]], row["repeats"]] if checkpoints else []),
        _pair(row["spearman"]),
        _pair(row["kendall"]),
        _pair(row["pearson"]),
        *(_pair(row["captured"].get(share)) for share in shares),
        _pair(row["sign_agreement"]),
        _pair(row["auc"]),
        _pair(row["gain_over_control"]),
        row["best_control"] or "",
    ]


def _pair(estimate: Mapping[str, Any] | None) -> list[float | None] | None:
    """Value and standard error with three digits; None where there is none."""
    if estimate is None or estimate["value"] is None:
        return None
    return rounded([estimate["value"], estimate["stderr"]], 3)


def _primary_rows(measurement: Measurement) -> list[Mapping[str, Any]]:
    rows = (measurement.criteria or {"rows": []})["rows"]
    return [
        row
        for row in rows
        if all(row[key] == value for key, value in PRIMARY.items()) and _pair(row["spearman"]) is not None
    ]


def best_of(measurement: Measurement, count: int) -> list[str]:
    """Names of the signed criteria of the literature that follow the measured influence best."""
    rows = [row for row in _primary_rows(measurement) if row["kind"] == "literature"]
    rows.sort(key=lambda row: -abs(row["spearman"]["value"]))
    return [row["criterion"] for row in rows[:count]]


def criteria_sentence(measurement: Measurement) -> str:
    """In words: how well the best criterion and the best control follow the measured influence of tokens."""
    rows = sorted(_primary_rows(measurement), key=lambda row: -abs(row["spearman"]["value"]))
    kinds = {kind: next((r for r in rows if r["kind"] == kind), None) for kind in ("literature", "control")}
    best, control = kinds["literature"], kinds["control"]
    if best is None or control is None:
        return ""
    gain = best["gain_over_control"]
    verdict = ""
    if gain is not None and gain["value"] is not None and gain["stderr"] is not None:
        found = parse_estimate(gain, "criteria.json: gain_over_control")
        verdict = (
            f"; the difference to the best control is "
            f"{text.estimate(found, unit=False)}{'' if found.resolved else ', not resolved'}"
        )
    reached = {row["kind"]: text.estimate(_spearman(row), unit=False) for row in (best, control)}
    return (
        f"Of the literature's criteria, {best['criterion']} ranks the tokens' measured influence on the "
        f"entropy best: Spearman {reached['literature']}. The best trivial control, {control['criterion']}, "
        f"reaches {reached['control']}{verdict}."
    )


def _spearman(row: Mapping[str, Any]) -> Estimate:
    return parse_estimate(row["spearman"], f"criteria.json: {row['criterion']}")


def basis_sentence(measurement: Measurement) -> str:
    """In words: on how many of the update prompts the first board stands, where that is not on all."""
    rows, update = _primary_rows(measurement), measurement.update
    if not rows or update is None:
        return ""
    behind, asked = int(rows[0]["spearman"]["n"]), len(set(update["prompt_id"]))
    if behind >= asked:
        return ""
    return (
        f"This board stands on {behind} of the batch's {asked} prompts: the responses to each of the others "
        "were rewarded alike, so their advantages are zero and their tokens have no influence to rank."
    )


def standings_figure(measurement: Measurement) -> Figure | None:
    """Rank correlation of the best criteria and controls with the measured influence of tokens."""
    rows = sorted(_primary_rows(measurement), key=lambda row: -abs(row["spearman"]["value"]))[:_SHOWN]
    if not rows:
        return None
    rows.reverse()
    traces = []
    for kind, name, color, symbol in (
        ("literature", "criterion of the literature", BLUE, "circle"),
        ("control", "trivial control", MUTED, "diamond"),
    ):
        chosen = [row for row in rows if row["kind"] == kind]
        if chosen:
            traces.append(
                go.Scatter(
                    x=rounded(row["spearman"]["value"] for row in chosen),
                    y=[row["criterion"] for row in chosen],
                    error_x=error_bars(map(_spearman, chosen), color),
                    mode="markers",
                    name=name,
                    marker={"size": 7, "color": color, "symbol": symbol},
                    hovertemplate="%{y}: %{x:.3f}<extra></extra>",
                )
            )
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "Spearman correlation with measured influence"}, "zeroline": True},
        yaxis={
            "automargin": True,
            "categoryorder": "array",
            "categoryarray": [row["criterion"] for row in rows],
        },
    )
    caption = (
        f"The {len(rows)} criteria that follow the influence of the update batch's tokens on the on-policy "
        "entropy best, sign included, through the whole kernel and AdamW's preconditioner. Error bars: "
        "95 %, bootstrap over update prompts, given the probe: what the probe adds is not in them."
    )
    return Figure(
        "criteria-standings", "Criteria against the truth", caption, spec, height=120 + 20 * len(rows)
    )
