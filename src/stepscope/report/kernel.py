# ruff: noqa: RUF001 (typographic dashes are meant)
"""Who is coupled to whom: heat map, spectrum, shared prefixes and structure of the Fisher kernel."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import plotly.graph_objects as go

from stepscope.errors import RunFolderError
from stepscope.report import text
from stepscope.report.figures import (
    BLUE,
    LOOKS,
    MUTED,
    PAPER,
    VERMILLION,
    Figure,
    make_spec,
    rounded,
)
from stepscope.report.load import Measurement, parse_estimate
from stepscope.report.tables import Column, TableBlock, count_cell, estimate_cell, text_cell, trust_cell
from stepscope.stats import Estimate

_COSINE = "_cosine"

_SUBJECTS = {
    "contributions": "what each contributes to the step, in the optimizer's metric",
    "raw": "gradients of their log-probs",
    "preconditioned": "gradients of their log-probs in the optimizer's metric",
}


def kernel_sentence(measurement: Measurement) -> str:
    """In words: along how many directions responses push, and how much of that is coupling between them."""
    forms = _cosine_forms(measurement)
    if measurement.kernel is None or not forms:
        return ""
    name, report = next(iter(forms.items()))
    same, different, rank, deficit = (
        text.estimate(replace(_estimate(measurement, record), unit=""))
        for record in (
            report["same_prompt"]["mean"],
            report["different_prompts"]["mean"],
            report["effective_rank"],
            report["rank_deficit"],
        )
    )
    sentence = (
        f"{report['distinct']} distinct responses with a gradient push along {rank} effective directions "
        f"({_SUBJECTS.get(name, name)}); with random signs on their tokens, which leave how uneven "
        "gradients are and break what ties one response to another, the same gradients take "
        f"{text.number(report['null_effective_rank'])} (difference {deficit}). Mean cosine of two: "
        f"{same} for one prompt, {different} for different prompts."
    )
    scores = [
        f"{text.number(report['mean_zero']['off_diagonal']['z'], 2)} ({kernel})"
        for kernel, report in measurement.kernel["structure"].items()
        if report["mean_zero"]
    ]
    if scores:
        sentence += (
            " Gradients of log-probs average to zero over the policy's own responses, and so does their "
            f"kernel off the diagonal; its mean is {', '.join(scores)} standard errors from zero."
        )
    return sentence


def kernel_figures(measurement: Measurement, side: int) -> list[Figure]:
    """Heat maps, spectra and dependence on shared prefixes, all in cosine form.

    Args:
        measurement: its artifacts.
        side: largest number of sequences in a heat map.
    """
    forms = _cosine_forms(measurement)
    maps = [_heat_map(measurement, name, side) for name in forms]
    figures = [f for f in maps if f is not None]
    if forms:
        figures.append(_spectrum_figure(forms))
        figures.append(_prefix_figure(forms))
    return figures


def kernel_table(measurement: Measurement) -> TableBlock | None:
    """Pair means, variance components and ranks of every form of the kernel."""
    if measurement.kernel is None:
        return None
    columns = (
        Column("Kernel", "def-kernel"),
        Column("Figure"),
        Column("Value ± standard error", "def-estimate", numeric=True, with_error=True),
        Column("Unit"),
        Column("n", "def-n", numeric=True),
        Column("Trust", "def-trust"),
    )
    rows = []
    for name, report in measurement.kernel["structure"].items():
        for label, anchor, record in _figures(report):
            value = _estimate(measurement, record)
            rows.append(
                (
                    text_cell(name.replace(_COSINE, ", cosine form")),
                    text_cell(label, anchor=anchor),
                    estimate_cell(value),
                    text_cell(value.unit),
                    count_cell(value.n),
                    trust_cell(value),
                )
            )
    caption = (
        "Structure of the kernel between the sequences of the update batch, ± one standard error by deleting "
        "one prompt at a time; n counts prompts. Where a mean is said to be zero, the error is exact under "
        "that, and n counts sequences. Ranks and cosines take identical responses to a prompt as one."
    )
    return TableBlock("kernel", "Structure of the kernel", caption, columns, rows)


def _figures(report: Mapping[str, Any]) -> list[tuple[str, str, Any]]:
    """Label, glossary entry and record of each figure of a structure report."""
    zero = report["mean_zero"]
    means = (
        [
            ("mean over pairs of one prompt, zero on policy", "def-mean-zero", zero["same_prompt"]["mean"]),
            ("mean over all pairs, zero on policy", "def-mean-zero", zero["off_diagonal"]["mean"]),
        ]
        if zero
        else [
            ("mean over pairs of one prompt", "def-kernel", report["same_prompt"]["mean"]),
            ("mean over pairs of different prompts", "def-kernel", report["different_prompts"]["mean"]),
            ("component common to all prompts", "def-components", report["components"]["common"]),
            ("component of the prompt", "def-components", report["components"]["prompt"]),
            ("component of the single response", "def-components", report["components"]["own"]),
        ]
    )
    return [
        ("mean of a sequence with itself", "def-kernel", report["diagonal"]["mean"]),
        *means,
        ("effective rank", "def-effective-rank", report["effective_rank"]),
        ("effective rank with random signs, minus that", "def-null", report["rank_deficit"]),
    ]


def _cosine_forms(measurement: Measurement) -> dict[str, Mapping[str, Any]]:
    """Structure reports in cosine form by metric."""
    if measurement.kernel is None:
        return {}
    return {
        name.removesuffix(_COSINE): report
        for name, report in measurement.kernel["structure"].items()
        if name.endswith(_COSINE)
    }


def _estimate(measurement: Measurement, record: Any) -> Estimate:
    return parse_estimate(record, str(measurement.path / "kernel.json"))


def _heat_map(measurement: Measurement, metric: str, side: int) -> Figure | None:
    matrices, kernel = measurement.kernel_matrices, measurement.kernel
    if matrices is None or kernel is None:
        return None
    where = measurement.path / "kernel.safetensors"
    try:
        cosine = matrices[f"update_{metric}{_COSINE}"]
    except KeyError as error:
        raise RunFolderError(
            f"{where}: no matrix {error}, which kernel.json names; repeat the stage"
        ) from error
    prompts = [str(p) for p in kernel["update_prompt_ids"]]
    if cosine.shape != (len(prompts), len(prompts)):
        raise RunFolderError(
            f"{where}: the kernel has shape {cosine.shape}, kernel.json names {len(prompts)} sequences; "
            "repeat the stage"
        )
    order = np.array(sorted(range(len(prompts)), key=lambda i: (prompts.index(prompts[i]), i)))[:side]
    shown = cosine[np.ix_(order, order)]
    off = np.abs(shown[~np.eye(len(order), dtype=bool)])
    reach = float(np.quantile(off, 0.995)) if off.any() else 1.0
    ids = [str(i) for i in order]
    starts = [k for k in range(1, len(order)) if prompts[order[k]] != prompts[order[k - 1]]]
    heat = go.Heatmap(
        z=[[round(float(v), 3) for v in row] for row in shown],
        x=ids,
        y=ids,
        zmin=-reach,
        zmax=reach,
        colorscale=[[0, BLUE], [0.5, PAPER], [1, VERMILLION]],
        colorbar={"title": {"text": "cosine", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="sequences %{y} and %{x}<br>cosine %{z}<extra></extra>",
    )
    axis = {"type": "category", "showgrid": False, "constrain": "domain", "nticks": 9, "tickangle": 0}
    spec = make_spec(
        [heat],
        xaxis={**axis, "range": [-0.5, len(order) - 0.5], "title": {"text": "sequence, by prompt"}},
        yaxis={**axis, "range": [len(order) - 0.5, -0.5], "scaleanchor": "x"},
        shapes=[line for k in starts for line in _separators(k, len(order))] if len(starts) < 64 else [],
    )
    part = f"the first {len(order)} of {len(prompts)}" if len(order) < len(prompts) else f"all {len(prompts)}"
    projection = kernel.get("projection_error")
    caption = (
        f"Cosine between two responses, {_SUBJECTS.get(metric, metric)}; {part} sequences of the update "
        "batch, ordered by prompt (lines between prompts). Colours end at "
        f"±{text.number(reach, 2)}, the 99.5 % quantile off the diagonal; the diagonal is 1. "
    )
    if projection is None:
        caption += "Exact given the batch: no sampling error."
    else:
        caption += f"Random projection with {text.estimate(_estimate(measurement, projection))} error."
    return Figure(f"kernel-{metric}", f"Fisher kernel, {metric}", caption, spec, height=460, wide=False)


def _separators(at: int, end: int) -> tuple[dict[str, Any], dict[str, Any]]:
    line = {"type": "line", "line": {"color": MUTED, "width": 0.5}}
    along, across = {"x0": at - 0.5, "x1": at - 0.5}, {"y0": -0.5, "y1": end - 0.5}
    turned = {"y0": at - 0.5, "y1": at - 0.5, "x0": -0.5, "x1": end - 0.5}
    return {**line, **along, **across}, {**line, **turned}


def _spectrum_figure(forms: Mapping[str, Mapping[str, Any]]) -> Figure:
    traces = []
    for (metric, report), (color, symbol, _) in zip(forms.items(), LOOKS, strict=False):
        for name, key in ((metric, "spectrum"), (f"{metric}, random signs", "null_spectrum")):
            values = [v for v in report[key] if v > 0]
            look = (
                {"mode": "markers", "marker": {"size": 5, "color": color, "symbol": symbol}}
                if key == "spectrum"
                else {"mode": "lines", "line": {"color": color, "width": 1.5, "dash": "dot"}}
            )
            traces.append(
                go.Scatter(
                    x=list(range(1, len(values) + 1)),
                    y=rounded(values),
                    name=name,
                    hovertemplate=f"{name}: eigenvalue %{{x}} is %{{y:.4g}}<extra></extra>",
                    **look,
                )
            )
    spec = make_spec(
        traces,
        xaxis={"type": "log", "title": {"text": "eigenvalue number"}, "dtick": 1},
        yaxis={
            "type": "log",
            "title": {"text": "eigenvalue of the cosine kernel"},
            "exponentformat": "power",
        },
    )
    caption = (
        "Eigenvalues of the cosine kernel between the distinct responses of the update batch, largest first. "
        "Dotted: the same gradients with random signs on their tokens, as independent responses with the "
        "same unevenness would give. Largest eigenvalues above the dotted line are couplings between "
        "responses; a spectrum that falls is not."
    )
    return Figure("kernel-spectrum", "Spectrum against independent responses", caption, spec, wide=False)


def _prefix_figure(forms: Mapping[str, Mapping[str, Any]]) -> Figure:
    traces = []
    for (metric, report), (color, symbol, dash) in zip(forms.items(), LOOKS, strict=False):
        bins = report["shared_prefix"]
        traces.append(
            go.Scatter(
                x=[_bin_name(b) for b in bins],
                y=rounded(b["mean"] for b in bins),
                mode="lines+markers",
                name=metric,
                line={"color": color, "width": 1.3, "dash": dash},
                marker={"size": 8, "color": color, "symbol": symbol},
                customdata=[b["count"] for b in bins],
                hovertemplate=f"{metric}: mean cosine %{{y:.3g}} over %{{customdata}} pairs<extra></extra>",
            )
        )
    spec = make_spec(
        traces,
        xaxis={"type": "category", "title": {"text": "response tokens shared from the start"}},
        yaxis={"title": {"text": "mean cosine"}, "zeroline": True, "rangemode": "tozero"},
    )
    pairs = sum(b["count"] for b in next(iter(forms.values()))["shared_prefix"])
    caption = (
        f"Mean cosine over the {pairs} pairs of responses to one prompt, by the number of tokens they share "
        "from the start. Means over pairs, without error; the number of pairs shows on hover."
    )
    return Figure("kernel-prefix", "Coupling and shared prefix", caption, spec, wide=False)


def _bin_name(record: Mapping[str, Any]) -> str:
    low, high = record["shared_from"], record["shared_to"]
    return str(low) if low == high else f"{low}–{high}"
