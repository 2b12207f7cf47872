# ruff: noqa: RUF001 (typographic signs are meant)
"""The entropy law on the page: points and curves of one run or of several, and what they say."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import Figure, error_bars, look, make_spec, rounded
from stepscope.report.load import parse_estimate
from stepscope.report.tables import Column, TableBlock, count_cell, estimate_cell, number_cell, text_cell
from stepscope.stats import Estimate


def law_figure(laws: Mapping[str, Mapping[str, Any]]) -> Figure:
    """Performance against entropy with the fitted law; one colour and mark per run.

    Args:
        laws: name of the run to the content of its ``entropy_law.json``.
    """
    traces = []
    for number, (name, law) in enumerate(laws.items()):
        color, symbol, dash = look(number)
        a, b = (_estimate(law, key) for key in ("a", "b"))
        H = np.linspace(0.0, 1.05 * max(law["entropy"]), 60)
        traces += [
            go.Scatter(
                x=rounded(law["entropy"]),
                y=rounded(law["performance"]),
                error_x=error_bars(_points(law, "entropy"), color),
                error_y=error_bars(_points(law, "performance"), color),
                mode="markers",
                name=name or "checkpoints",
                marker={"size": 7, "color": color, "symbol": symbol},
                customdata=law["steps"],
                hovertemplate=f"{text.plotly_text(name)} step %{{customdata}}<br>H = %{{x:.3g}} nats/token, "
                "pass@1 = %{y:.3g}<extra></extra>",
            ),
            go.Scatter(
                x=rounded(H),
                y=rounded(b.value - a.value * np.exp(H)),
                mode="lines",
                name=f"{name}: law" if name else "−a exp(H) + b",
                line={"color": color, "width": 1.3, "dash": dash},
                hoverinfo="skip",
            ),
        ]
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "entropy H, nats/token"}, "rangemode": "tozero"},
        yaxis={"title": {"text": "pass@1"}},
    )
    caption = (
        "Performance against entropy over the checkpoints of a run, and the law R = −a exp(H) + b fitted "
        "with errors in both. Where a curve meets H = 0 is the ceiling b − a. Error bars: 95 % intervals, "
        "clustered by prompt; those of different checkpoints are correlated, for they share their prompts."
    )
    return Figure("entropy-law", "Entropy law", caption, spec, height=340, wide=len(laws) > 1)


def law_sentences(law: Mapping[str, Any]) -> list[str]:
    """The fit, its ceiling and the prediction of late points in words."""
    a, b, ceiling = (_estimate(law, key) for key in ("a", "b", "ceiling"))
    doubt = "" if ceiling.reliable else f" Flagged unreliable: {ceiling.reason}."
    sentences = [
        f"Entropy law R = −a exp(H) + b over {len(law['steps'])} checkpoints: "
        f"a = {text.plus_minus(a.value, a.stderr)}, b = {text.plus_minus(b.value, b.stderr)}; ceiling at "
        f"zero entropy {text.plus_minus(ceiling.value, ceiling.stderr)}.{doubt}"
    ]
    if prediction := law["prediction"]:
        rmse = parse_estimate(prediction["rmse"], "entropy_law.json: prediction.rmse")
        doubt = "" if rmse.reliable else f" ({rmse.reason})"
        sentences.append(
            f"The law of the first {prediction['fitted']} checkpoints predicts the others with a root mean "
            f"square error of {text.plus_minus(100 * rmse.value, 100 * rmse.stderr)} points of pass@1"
            f"{doubt}; their sampling errors alone would give {text.number(100 * prediction['noise'], 2)}. "
            "Published: 0.9 (mathematics) and 1.2 (code), Cui et al. 2025."
        )
    return sentences


def law_table(laws: Mapping[str, Mapping[str, Any]]) -> TableBlock:
    """The fits of several runs side by side."""
    columns = [
        Column("Run"),
        Column("a", "def-entropy-law", numeric=True, with_error=True),
        Column("b", "def-entropy-law", numeric=True, with_error=True),
        Column("Ceiling b − a", "def-entropy-law", numeric=True, with_error=True),
        Column("Scatter about the law", numeric=True),
        Column("RMSE of late points", numeric=True, with_error=True),
        Column("Checkpoints", numeric=True),
    ]
    rows: list[Sequence[Any]] = []
    for name, law in laws.items():
        prediction = law["prediction"]
        rows.append(
            [
                text_cell(name),
                *(estimate_cell(_estimate(law, key)) for key in ("a", "b", "ceiling")),
                number_cell(law["scatter"]),
                estimate_cell(parse_estimate(prediction["rmse"], f"{name}: prediction.rmse"))
                if prediction
                else number_cell(None),
                count_cell(len(law["steps"])),
            ]
        )
    caption = (
        "Entropy law R = −a exp(H) + b of every run, ± one standard error; scatter: spread of pass@1 about "
        "the law beyond the sampling errors; last: late checkpoints predicted from the first ones. ⚠ marks "
        "unreliable ones."
    )
    return TableBlock("laws", "Fits", caption, columns, rows)


def _points(law: Mapping[str, Any], name: str) -> list[Estimate]:
    count = int(law.get("num_prompts", 0))
    pairs = zip(law[name], law[f"{name}_stderr"], strict=True)
    return [Estimate(float(v), math.nan if e is None else float(e), count, "", "") for v, e in pairs]


def _estimate(law: Mapping[str, Any], key: str) -> Estimate:
    return parse_estimate(law.get(key), f"entropy_law.json: {key}")
