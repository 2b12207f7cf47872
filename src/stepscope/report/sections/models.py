"""What can be known of the kernel without its gradients, and whether its spectrum is more than noise."""

from __future__ import annotations

import math

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, table
from stepscope.results.models import KernelModel, ModelsReport

_KINDS = {
    "diagonal": "a response with itself",
    "same_prompt": "two responses to one prompt",
    "different_prompts": "responses to different prompts",
}
_COUPLINGS = {"responses": "between responses", "prompts": "between prompts"}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Models as a figure and a table, tests as another."""
    found = measurement.models
    if found is None:
        return None
    return Section(
        "models",
        "What a forward pass knows of the kernel",
        intro=" ".join(filter(None, (_sentence(found), _shares(found), _tests_in_words(found)))),
        figures=[_figure(found)] if found.models else [],
        tables=[
            *([_models(found)] if found.models else []),
            *([_tests(found)] if found.tests else []),
        ],
    )


def _best(found: ModelsReport, metric: str, kind: str) -> KernelModel | None:
    known = [m for m in found.models if m.metric == metric and math.isfinite(m.r2[kind].value)]
    return max(known, key=lambda m: m.r2[kind].value, default=None)


def _sentence(found: ModelsReport) -> str:
    """In words: which model predicts most of each kind of entry."""
    if not found.models:
        return f"No models of the kernel: {'; '.join(found.left_out.values())}."
    metric = found.models[-1].metric
    parts = []
    for kind, words in _KINDS.items():
        best = _best(found, metric, kind)
        if best is not None:
            parts.append(f"{text.bare(best.r2[kind])} of {words} ({best.name})")
    return (
        f"Share of the variance of the {metric} kernel's entries that the best model predicts for prompts it "
        f"has not seen: {', '.join(parts)}."
    )


def _shares(found: ModelsReport) -> str:
    if not found.shares:
        return ""
    head = text.percent(found.shares["head"])
    more = (
        f"; the head is also the embedding, whose own part is {text.percent(found.shares['embedding'])}, and "
        f"twice their product {text.percent(found.shares['cross'])}"
        if found.shares["embedding"]
        else ""
    )
    return f"The last layer alone is {head} of the plain kernel's trace{more}."


def _tests_in_words(found: ModelsReport) -> str:
    parts = [
        f"{_COUPLINGS[t.coupling]} p = {text.number(t.p, 2)}"
        for t in found.tests
        if t.statistic == "largest eigenvalue"
    ]
    return f"Couplings by the largest eigenvalue: {', '.join(parts)}." if parts else ""


def _figure(found: ModelsReport) -> style.Figure:
    """R^2 of every model by kind of entry, in the last metric."""
    metric = found.models[-1].metric
    own = [m for m in found.models if m.metric == metric]
    traces = [
        style.curve(
            words,
            [m.name.replace("_", " ") for m in own],
            [m.r2[kind] for m in own],
            looks,
            f"{words}, %{{x}}: %{{y:.3f}}",
            mode="markers",
        )
        for (kind, words), looks in zip(_KINDS.items(), style.LOOKS, strict=False)
    ]
    caption = (
        f"Share of the variance of the {metric} kernel's entries that each model predicts for prompts it has "
        f"not seen ({found.folds} folds of prompts, {found.distinct} distinct responses), by kind of entry. "
        "Error bars: 95 %, over prompts, given what was fitted. The axis ends at -1."
    )
    return style.figure(
        "kernel-models",
        "Models of the kernel",
        caption,
        traces,
        xaxis=style.axis("", type="category"),
        yaxis=style.axis("R²", zeroline=True, range=[-1, 1.05]),
    )


def _models(found: ModelsReport) -> Table:
    return table(
        "kernel-models",
        "Models of the kernel",
        f"Every model on prompts it has not seen, {found.folds} folds; ± is one standard error over prompts. "
        "Passes: forward passes over the batch that predictions need.",
        [
            {
                "Model of the kernel": m.name.replace("_", " "),
                "Kernel": m.metric,
                "Entries": words,
                "R²": m.r2[kind],
                "Rank correlation": m.spearman[kind],
                "Passes": m.passes,
                "Made of": m.formula,
            }
            for m in found.models
            for kind, words in _KINDS.items()
        ],
    )


def _tests(found: ModelsReport) -> Table:
    return table(
        "kernel-null",
        "The spectrum against its null",
        f"{found.tests[0].draws} draws of the null each. Couplings between responses: signs of each "
        "response's own. Between prompts: responses to a prompt keep what they share.",
        [
            {
                "Statistic of the spectrum": t.statistic,
                "Kernel": t.metric,
                "Couplings": _COUPLINGS[t.coupling],
                "Batch": t.value,
                "Null, mean": t.null_mean,
                "Null, 95 % below": t.null_high,
                "p": t.p,
            }
            for t in found.tests
        ],
    )
