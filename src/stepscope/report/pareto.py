"""What dropping tokens buys, and what influence goes with: the figures and tables behind the leaderboard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import Figure, error_bars, look, make_spec, rounded
from stepscope.report.load import Measurement
from stepscope.report.tables import Column, TableBlock, estimate_cell, text_cell
from stepscope.stats import Estimate


def pareto_figure(measurement: Measurement) -> Figure | None:
    """Entropy kept against reward given up, one line for each rule, one point for each share of tokens."""
    pareto = measurement.pareto
    if pareto is None or not pareto["points"]:
        return None
    traces = []
    rules = list(dict.fromkeys(point["rule"] for point in pareto["points"]))
    for number, rule in enumerate(rules):
        points = [point for point in pareto["points"] if point["rule"] == rule]
        color, symbol, dash = look(number)
        traces.append(
            go.Scatter(
                x=rounded(p["reward_given_up"].value for p in points),
                y=rounded(p["entropy_kept"].value for p in points),
                error_x=error_bars((p["reward_given_up"] for p in points), color),
                error_y=error_bars((p["entropy_kept"] for p in points), color),
                mode="lines+markers",
                name=rule.replace("_", " "),
                line={"color": color, "width": 1, "dash": dash},
                marker={"size": 7, "color": color, "symbol": symbol},
                customdata=[_point_text(p) for p in points],
                hovertemplate=f"{rule}, %{{customdata}}<extra></extra>",
            )
        )
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "reward given up"}, "zeroline": True, "nticks": 6},
        yaxis={"title": {"text": "entropy kept, nats/token"}, "zeroline": True},
    )
    entropy, reward = (
        text.plus_minus(whole.value, whole.stderr)
        for whole in (pareto["full_entropy_change"], pareto["full_reward_change"])
    )
    caption = (
        "The step is made again without the tokens that a rule drops, and measured on the same probe "
        f"samples at lr {text.number(pareto['lr'])}: how much less the entropy changes, against how much "
        f"less the reward rises. The full step changes the entropy by {entropy} and the reward by {reward}. "
        "Influence: the exact one, largest loss of entropy first; no reward: only tokens that do not raise "
        "the reward; both chosen by one half of the probe prompts and measured on the other, both ways. Up "
        "and left is better."
    )
    return Figure(
        "criteria-pareto", "Dropping tokens: entropy kept, reward given up", caption, spec, height=460
    )


def _point_text(point: Mapping[str, Any]) -> str:
    kept, given = point["entropy_kept"], point["reward_given_up"]
    return (
        f"{point['num_dropped']} tokens ({text.percent(point['share'])})<br>"
        f"entropy kept {text.plus_minus(kept.value, kept.stderr)}<br>"
        f"reward given up {text.plus_minus(given.value, given.stderr)}"
    )


def properties_tables(measurement: Measurement) -> list[TableBlock]:
    """Regression of influence on properties, one table for tokens and one for sequences."""
    found: Sequence[Mapping[str, Any]] = (measurement.criteria or {}).get("properties", [])
    return [
        TableBlock(
            f"properties-{study['level']}",
            f"What influence goes with, by {study['level']}",
            f"Least squares of the influence on all properties at once, {study['num_items']:,} items, "
            f"R² {text.number(study['r2'], 2)}; errors clustered by prompt. Standardised: standard "
            "deviations of influence per standard deviation of the property. It describes; properties that "
            "go together share what they explain.",
            (
                Column("Property"),
                Column("Standardised", "def-estimate", numeric=True, with_error=True),
                Column("Coefficient", numeric=True, with_error=True),
                Column("Unit"),
            ),
            [
                (
                    text_cell(name.replace("_", " ")),
                    estimate_cell(study["standardised"][name]),
                    estimate_cell(value),
                    text_cell(value.unit),
                )
                for name, value in study["coefficients"].items()
                if isinstance(value, Estimate) and name in study["standardised"]
            ],
        )
        for study in found
    ]
