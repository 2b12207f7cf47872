# ruff: noqa: RUF001 (typographic dashes are meant)
"""Who is coupled to whom: heat map, spectrum, shared prefixes and structure of the Fisher kernel."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import plotly.graph_objects as go

from stepscope.errors import RunFolderError
from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, linked, table, trust_cell
from stepscope.results.kernel import KernelReport, KernelStructure
from stepscope.stats import Estimate

_COSINE = "_cosine"

_SUBJECTS = {
    "contributions": "what each contributes to the step, in the optimizer's metric",
    "raw": "gradients of their log-probs",
    "preconditioned": "gradients of their log-probs in the optimizer's metric",
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Figures are in cosine form, the table is of every form."""
    kernel = measurement.kernel
    if kernel is None:
        return None
    forms = {
        name.removesuffix(_COSINE): report
        for name, report in kernel.structure.items()
        if name.endswith(_COSINE)
    }
    where = measurement.path / "kernel.safetensors"
    matrices = measurement.kernel_matrices(*(f"update_{metric}{_COSINE}" for metric in forms))
    maps = [_heat_map(kernel, matrices, metric, where, room.side) for metric in forms if matrices]
    return Section(
        "kernel",
        "Which responses pull together",
        intro=_sentence(kernel, forms),
        figures=[*maps, *([_spectrum(forms), _prefixes(forms)] if forms else [])],
        tables=[_table(kernel)],
    )


def _sentence(kernel: KernelReport, forms: Mapping[str, KernelStructure]) -> str:
    """In words: along how many directions responses push, and how much of that is coupling between them."""
    if not forms:
        return ""
    name, report = next(iter(forms.items()))
    same, different, rank, deficit = (
        text.bare(e)
        for e in (
            report.same_prompt.mean,
            report.different_prompts.mean,
            report.effective_rank,
            report.rank_deficit,
        )
    )
    sentence = (
        f"{report.distinct} distinct responses with a gradient push along {rank} effective directions "
        f"({_SUBJECTS.get(name, name)}); with random signs on their tokens, which leave how uneven "
        "gradients are and break what ties one response to another, the same gradients take "
        f"{text.number(report.null_effective_rank)} (difference {deficit}). Mean cosine of two: "
        f"{same} for one prompt, {different} for different prompts."
    )
    scores = [
        f"{text.number(report.mean_zero['off_diagonal'].z, 2)} ({name})"
        for name, report in kernel.structure.items()
        if report.mean_zero
    ]
    if scores:
        sentence += (
            " Gradients of log-probs average to zero over the policy's own responses, and so does their "
            f"kernel off the diagonal; its mean is {', '.join(scores)} standard errors from zero."
        )
    return sentence


def _table(kernel: KernelReport) -> Table:
    """Pair means, variance components and ranks of every form of the kernel."""
    return table(
        "kernel",
        "Structure of the kernel",
        "Structure of the kernel between the sequences of the update batch, ± one standard error by deleting "
        "one prompt at a time; n counts prompts. Where a mean is said to be zero, the error is exact under "
        "that, and n counts sequences. Ranks and cosines take identical responses to a prompt as one.",
        [
            {
                "Kernel": name.replace(_COSINE, ", cosine form"),
                "Figure": linked(label, anchor),
                "Value ± standard error": value,
                "Unit": value.unit,
                "n": value.n,
                "Trust": trust_cell(value),
            }
            for name, report in kernel.structure.items()
            for label, anchor, value in _estimates(report)
        ],
    )


def _estimates(report: KernelStructure) -> list[tuple[str, str, Estimate]]:
    """Label, glossary entry and value of each figure of a structure report."""
    zero = report.mean_zero
    means = (
        [
            ("mean over pairs of one prompt, zero on policy", "def-mean-zero", zero["same_prompt"].mean),
            ("mean over all pairs, zero on policy", "def-mean-zero", zero["off_diagonal"].mean),
        ]
        if zero
        else [
            ("mean over pairs of one prompt", "def-kernel", report.same_prompt.mean),
            ("mean over pairs of different prompts", "def-kernel", report.different_prompts.mean),
            ("component common to all prompts", "def-components", report.components["common"]),
            ("component of the prompt", "def-components", report.components["prompt"]),
            ("component of the single response", "def-components", report.components["own"]),
        ]
    )
    return [
        ("mean of a sequence with itself", "def-kernel", report.diagonal.mean),
        *means,
        ("effective rank", "def-effective-rank", report.effective_rank),
        ("effective rank with random signs, minus that", "def-null", report.rank_deficit),
    ]


def _heat_map(
    kernel: KernelReport, matrices: Mapping[str, Any], metric: str, where: Path, side: int
) -> style.Figure:
    """The cosine kernel of the first ``side`` sequences, ordered by prompt."""
    cosine = matrices.get(f"update_{metric}{_COSINE}")
    prompts = list(kernel.update_prompt_ids)
    if cosine is None or cosine.shape != (len(prompts), len(prompts)):
        shape = "no such matrix" if cosine is None else f"shape {cosine.shape}"
        raise RunFolderError(
            f"{where}: update_{metric}{_COSINE}: {shape}; kernel.json names "
            f"{len(prompts)} sequences; repeat the stage"
        )
    order = np.array(sorted(range(len(prompts)), key=lambda i: (prompts.index(prompts[i]), i)))[:side]
    shown = cosine[np.ix_(order, order)]
    off = np.abs(shown[~np.eye(len(order), dtype=bool)])
    reach = float(np.quantile(off, 0.995)) if off.any() else 1.0
    starts = [k for k in range(1, len(order)) if prompts[order[k]] != prompts[order[k - 1]]]
    ids = [str(i) for i in order]
    heat = go.Heatmap(
        z=[[round(float(v), 3) for v in row] for row in shown],
        x=ids,
        y=ids,
        zmin=-reach,
        zmax=reach,
        colorscale=[[0, style.PURPLE], [0.5, style.PAPER], [1, style.GREEN]],
        colorbar={"title": {"text": "cosine", "side": "right"}, "thickness": 12, "outlinewidth": 0},
        hovertemplate="sequences %{y} and %{x}<br>cosine %{z}<extra></extra>",
    )
    part = f"the first {len(order)} of {len(prompts)}" if len(order) < len(prompts) else f"all {len(prompts)}"
    error = kernel.projection_error
    caption = (
        f"Cosine between two responses, {_SUBJECTS.get(metric, metric)}; {part} sequences of the update "
        "batch, ordered by prompt (lines between prompts). Colours end at "
        f"±{text.number(reach, 2)}, the 99.5 % quantile off the diagonal; the diagonal is 1. "
        + (
            "Exact given the batch: no sampling error."
            if error is None
            else f"Random projection with {text.estimate(error)} error."
        )
    )
    end = len(order) - 0.5
    ticks = {"type": "category", "showgrid": False, "constrain": "domain", "nticks": 9, "tickangle": 0}
    return style.figure(
        f"kernel-{metric}",
        f"Fisher kernel, {metric}",
        caption,
        [heat],
        height=460,
        wide=False,
        xaxis=style.axis("sequence, by prompt", **ticks, range=[-0.5, end]),
        yaxis={**ticks, "range": [end, -0.5], "scaleanchor": "x"},
        shapes=[line for k in starts for line in _separators(k - 0.5, end)] if len(starts) < 64 else [],
    )


def _separators(at: float, end: float) -> tuple[dict[str, Any], dict[str, Any]]:
    line = {"type": "line", "line": {"color": style.MUTED, "width": 0.5}}
    return (
        {**line, "x0": at, "x1": at, "y0": -0.5, "y1": end},
        {**line, "x0": -0.5, "x1": end, "y0": at, "y1": at},
    )


def _spectrum(forms: Mapping[str, KernelStructure]) -> style.Figure:
    traces = []
    for (metric, report), own in zip(forms.items(), style.LOOKS, strict=False):
        for name, eigenvalues, mode in (
            (metric, report.spectrum, "markers"),
            (f"{metric}, random signs", report.null_spectrum, "lines"),
        ):
            values = [v for v in eigenvalues if v > 0]
            numbers = range(1, len(values) + 1)
            hover = f"{name}: eigenvalue %{{x}} is %{{y:.4g}}"
            traces.append(
                style.curve(
                    name, numbers, values, style.Look(own.color, own.symbol, "dot"), hover, mode=mode, size=5
                )
            )
    caption = (
        "Eigenvalues of the cosine kernel between the distinct responses of the update batch, largest first. "
        "Dotted: the same gradients with random signs on their tokens, as independent responses with the "
        "same unevenness would give. Largest eigenvalues above the dotted line are couplings between "
        "responses; a spectrum that falls is not."
    )
    return style.figure(
        "kernel-spectrum",
        "Spectrum against independent responses",
        caption,
        traces,
        wide=False,
        xaxis=style.axis("eigenvalue number", type="log", dtick=1),
        yaxis=style.axis("eigenvalue of the cosine kernel", **style.LOG),
    )


def _prefixes(forms: Mapping[str, KernelStructure]) -> style.Figure:
    traces = [
        style.curve(
            metric,
            [_bin_name(b.shared_from, b.shared_to) for b in report.shared_prefix],
            [b.mean for b in report.shared_prefix],
            own,
            f"{metric}: mean cosine %{{y:.3g}} over %{{customdata}} pairs",
            size=8,
            width=1.3,
            details=[b.count for b in report.shared_prefix],
        )
        for (metric, report), own in zip(forms.items(), style.LOOKS, strict=False)
    ]
    pairs = sum(b.count for b in next(iter(forms.values())).shared_prefix)
    caption = (
        f"Mean cosine over the {pairs} pairs of responses to one prompt, by the number of tokens they share "
        "from the start. Means over pairs, without error; the number of pairs shows on hover."
    )
    return style.figure(
        "kernel-prefix",
        "Coupling and shared prefix",
        caption,
        traces,
        wide=False,
        xaxis=style.axis("response tokens shared from the start", type="category"),
        yaxis=style.axis("mean cosine", zeroline=True, rangemode="tozero"),
    )


def _bin_name(low: int, high: int) -> str:
    return str(low) if low == high else f"{low}–{high}"
