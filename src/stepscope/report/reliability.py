"""How sure a ranking by influence is, before one is shown: a sentence and a figure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
from stepscope.report.figures import Figure, error_bars, look, make_spec, rounded
from stepscope.report.load import RANKED_BY, Measurement
from stepscope.stats import Estimate

_SURE = ((0.9, "is well determined"), (0.7, "is roughly determined"), (0.0, "is mostly noise in its detail"))
"""Verdicts by the smallest correlation between two probes."""


def rankings(measurement: Measurement, quantity: str) -> dict[str, Mapping[str, Any]]:
    """What is known of the order of tokens and of sequences by the influence that ranks, by level."""
    found = (measurement.reliability or {}).get("rankings", [])
    return {
        entry["level"]: entry
        for entry in found
        if (entry["quantity"], entry["through"]) == (quantity, RANKED_BY)
    }


def certainty(measurement: Measurement, quantity: str) -> str:
    """In words: how far the order of tokens and sequences would be found again, and what makes it sure."""
    found = rankings(measurement, quantity)
    if not found:
        return ""
    first = next(iter(found.values()))
    if not first["whole"].reliable:
        return f"How sure the order of tokens is cannot be said: {first['whole'].reason}."
    verdict = next((words for least, words in _SURE if first["whole"].value >= least), _SURE[-1][1])
    agreement = " and ".join(f"{_shown(entry['whole'])} for {level}s" for level, entry in found.items())
    sentences = [
        f"The order below {verdict}: that from another {first['num_prompts']:,} probe prompts would "
        f"correlate with it at about {agreement}."
    ]
    shares = [
        f"{text.percent(estimate.value)} of the {text.percent(float(share))} with the largest influence"
        for share, estimate in first["top"].items()
    ]
    sentences.append(f"Of the {first['level']}s, two halves of this probe agree on {' and '.join(shares)}.")
    needed = [
        f"{_shown(entry['needed'])} probe prompts for {level}s"
        for level, entry in found.items()
        if entry["needed"].reliable
    ]
    if needed:
        sentences.append(f"A correlation of {first['target']:g} takes about {' and '.join(needed)}.")
    else:
        sentences.append(
            f"This probe is too small to say how many prompts a correlation of {first['target']:g} takes."
        )
    gain = next((own["gain"] for own in _shrunk(measurement, quantity) if own["gain"].reliable), None)
    if gain is not None:
        sentences.append(
            "The table of tokens is in the order of their shrunken influence, which takes "
            f"{_shown(gain)} times fewer."
        )
    return " ".join(sentences)


def _along(entry: Mapping[str, Any]) -> list[Estimate]:
    """The correlations of a curve, with the folds that they rest on."""
    halves: Estimate = entry["halves"]
    return [
        Estimate(point["correlation"], point["stderr"] or math.nan, halves.n, halves.unit, halves.method)
        for point in entry["curve"]
    ]


def reliability_figure(measurement: Measurement, quantity: str) -> Figure | None:
    """Correlation between two probes against their number of prompts."""
    found = {level: r for level, r in rankings(measurement, quantity).items() if r["whole"].reliable}
    if not found:
        return None
    traces = []
    for number, (level, entry) in enumerate(found.items()):
        color, symbol, dash = look(number)
        curve = entry["curve"]
        traces.append(
            go.Scatter(
                x=[point["prompts"] for point in curve],
                y=rounded(point["correlation"] for point in curve),
                error_y=error_bars(_along(entry), color),
                mode="lines+markers",
                name=f"{level}s",
                line={"color": color, "width": 2, "dash": dash},
                marker={"size": 6, "color": color, "symbol": symbol},
                hovertemplate=f"{level}s, %{{x:,}} prompts: %{{y:.3f}}<extra></extra>",
            )
        )
    first = next(iter(found.values()))
    spec = make_spec(
        traces,
        xaxis={"type": "log", "title": {"text": "probe prompts"}, "dtick": 1},
        yaxis={"title": {"text": "rank correlation between probes"}, "range": [0, 1.02]},
    )
    caption = (
        "Rank correlation of the influences that two independent probes of a size would give, by Spearman "
        f"and Brown from halves of this probe of {first['num_prompts']:,} prompts in {first['halves'].n} "
        "folds; error bars: 95 %, jackknife over folds, for the given update batch. Beyond this probe's own "
        "size it is an extrapolation, and a hopeful one where a few responses carry the noise."
    )
    return Figure("influence-reliability", "How sure the order is", caption, spec, height=300, wide=False)


def _shrunk(measurement: Measurement, quantity: str) -> list[Mapping[str, Any]]:
    found = (measurement.reliability or {}).get("shrunk", [])
    return [own for own in found if (own["quantity"], own["through"]) == (quantity, RANKED_BY)]


def _shown(estimate: Estimate) -> str:
    return text.plus_minus(estimate.value, estimate.stderr)
