"""Influence against re-made steps: the scatter plot behind the linear datamodelling score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import BLUE, MUTED, VERMILLION, Figure, make_spec, rounded
from stepscope.report.influence import WAYS
from stepscope.report.load import Measurement

_SORTS = (
    (
        "subset",
        "random subset of the batch",
        BLUE,
        "circle",
        "lds",
        "Spearman correlation over subsets (LDS)",
    ),
    (
        "single",
        "one sequence left out",
        VERMILLION,
        "diamond",
        "leave_one_out",
        "Pearson correlation, leave one out",
    ),
)
_REMOVALS = {
    "zeroed": "the gradient of what is left out is zero, all else as it was",
    "recomputed": "the advantages of each group are those of the responses that stay",
}


def _label(found: Mapping[str, Any]) -> str:
    return f"{found['removal']}, {WAYS[found['through']]}"


def validation_facts(measurement: Measurement) -> list[tuple[str, str]]:
    """The correlations, one for each way of leaving out and each kind of set."""
    return [
        (f"{name}{words}, {_label(found)}", text.plus_minus(found[known].value, found[known].stderr))
        for found in (measurement.validation or {}).values()
        for *_, key, name in _SORTS
        for words, known in ((", same probe", key), (", across probes", f"{key}_across"))
    ]


def validation_figures(measurement: Measurement) -> list[Figure]:
    """Predicted against true change: of steps from random subsets, and of one sequence less."""
    figures = []
    for key, found in (measurement.validation or {}).items():
        for sort, name, color, symbol, *_ in _SORTS:
            predicted, true = found[f"{sort}_predicted"], found[f"{sort}_true"]
            if predicted:
                figures.append(
                    Figure(
                        f"validation-{sort}-{key}",
                        f"{name.capitalize()}, {_label(found)}",
                        f"Change of the {found['quantity']} at lr {text.number(found['lr'])}: the step "
                        f"is made again ({_REMOVALS[found['removal']]}) and measured on the same probe "
                        "samples; predicted is lr times the sum of influences. The grey line is equality. "
                        f"{len(true)} points.",
                        _scatter(predicted, true, name, color, symbol),
                        height=340,
                        wide=False,
                    )
                )
    return figures


def _scatter(
    predicted: Sequence[float], true: Sequence[float], name: str, color: str, symbol: str
) -> dict[str, object]:
    ends = [min(predicted), max(predicted)]
    return make_spec(
        [
            go.Scatter(
                x=rounded(ends),
                y=rounded(ends),
                mode="lines",
                line={"color": MUTED, "width": 1},
                hoverinfo="skip",
            ),
            go.Scatter(
                x=rounded(predicted),
                y=rounded(true),
                mode="markers",
                name=name,
                marker={"size": 6, "color": color, "symbol": symbol},
                hovertemplate="predicted %{x:.4g}<br>true %{y:.4g}<extra></extra>",
            ),
        ],
        xaxis={"title": {"text": "predicted change"}, "zeroline": False, "nticks": 5},
        yaxis={"title": {"text": "true change"}, "zeroline": False},
        showlegend=False,
    )
