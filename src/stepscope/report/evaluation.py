# ruff: noqa: RUF001 (typographic signs are meant)
"""What an evaluation says beyond pass@k and entropy: lengths, surprisal, prompts moved, profiles, law."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report.figures import (
    BARS,
    BLUE,
    LOOKS,
    PURPLE,
    VERMILLION,
    Figure,
    error_bars,
    make_spec,
    rounded,
)
from stepscope.report.law import law_figure, law_sentences
from stepscope.report.load import Table, Training, estimates_of, parse_estimate
from stepscope.report.tables import Column, TableBlock, count_cell, estimate_cell, text_cell
from stepscope.stats import Estimate

_STEP_AXIS = {"title": {"text": "optimizer step"}}
_CURVES = (
    (
        "eval-length",
        "Response length",
        "tokens",
        (("mean_length", "all responses"), ("mean_length_correct", "correct responses")),
        "Tokens per response, the end-of-sequence token among them.",
    ),
    (
        "eval-rates",
        "Format and truncation",
        "fraction of responses",
        (("format_rate", "well-formed"), ("truncated_rate", "truncated")),
        "Fraction of responses that keep the format, and that are cut at the longest length.",
    ),
    (
        "eval-surprisal",
        "Surprisal of the sampled tokens",
        "nats",
        (("surprisal_q50", "median"), ("surprisal_q90", "0.9 quantile"), ("surprisal_q99", "0.99 quantile")),
        "Quantiles over all response tokens of −log π(yₖ|sₖ); their errors are Woodruff's.",
    ),
)
_STATES = ("never", "sometimes", "always")
_NAMES = {
    "mean_reward": "mean reward",
    "format_rate": "well-formed responses",
    "truncated_rate": "truncated responses",
    "mean_length": "response length",
    "mean_length_correct": "length of correct responses",
    "entropy_per_token": "entropy",
    "surprisal": "surprisal",
}


def evaluation_figures(training: Training) -> list[Figure]:
    """Curves over the checkpoints, prompts by how often they are solved, profiles and the entropy law."""
    figures = []
    for table in training.evaluations.values() if len(training.evaluations) == 1 else ():
        for key, title, unit, curves, caption in _CURVES:
            present = [(column, name) for column, name in curves if f"{column}_stderr" in table]
            if present:
                figures.append(_curves_figure(table, key, title, unit, present, caption))
    figures += [f for f in (_transitions_figure(training.changes),) if f]
    figures += _profile_figures(training.profiles)
    return [*figures, law_figure({"": training.law})] if training.law else figures


def evaluation_sentences(training: Training) -> list[str]:
    """Prompts gained and lost over the run, and what the entropy law says."""
    sentences = []
    if training.changes:
        whole = training.changes[-1]
        moved = whole["transitions"]
        sentences.append(
            f"From step {whole['before']['step']} to step {whole['after']['step']}, {len(moved['gained'])} "
            f"prompts that were never solved are solved at least once, and {len(moved['lost'])} that were "
            "solved are lost."
        )
    return sentences + (law_sentences(training.law) if training.law else [])


def evaluation_tables(training: Training) -> list[TableBlock]:
    """Paired differences of every figure between checkpoints."""
    if not training.changes:
        return []
    columns = [
        Column("From step", numeric=True),
        Column("To step", numeric=True),
        Column("Quantity"),
        Column("Difference", "def-paired", numeric=True, with_error=True),
        Column("Unit"),
    ]
    rows = []
    for change in training.changes:
        before, after = change["before"]["step"], change["after"]["step"]
        for name, value in change["differences"].items():
            found = parse_estimate(value, f"eval_changes.json: step {after}, {name}")
            label = _NAMES.get(name, name.replace("pass_at_", "pass@"))
            rows.append(
                [
                    count_cell(before),
                    count_cell(after),
                    text_cell(label),
                    estimate_cell(found),
                    text_cell(found.unit),
                ]
            )
    caption = (
        "Change of every figure between neighbouring checkpoints, and over the whole run, ± one standard "
        "error of the difference: the same prompts before and after, so what they have in common cancels."
    )
    return [TableBlock("paired", "Paired differences between checkpoints", caption, columns, rows)]


def _curves_figure(
    table: Table, key: str, title: str, unit: str, curves: Sequence[tuple[str, str]], caption: str
) -> Figure:
    traces = [
        _curve(table["step"], estimates_of(table, column), name, look, "step %{x}")
        for (column, name), look in zip(curves, LOOKS, strict=False)
    ]
    spec = make_spec(
        traces, xaxis=_STEP_AXIS, yaxis={"title": {"text": unit}, "rangemode": "tozero"}, showlegend=True
    )
    return Figure(
        key, title, f"{caption} Error bars: 95 % interval, clustered by prompt.", spec, height=300, wide=False
    )


def _curve(
    x: Sequence[Any], values: Sequence[Estimate], name: str, look: tuple[str, str, str], at: str
) -> Any:
    color, symbol, dash = look
    return go.Scatter(
        x=list(x),
        y=rounded(v.value for v in values),
        error_y=error_bars(values, color),
        mode="lines+markers",
        name=name,
        line={"color": color, "width": 1.5, "dash": dash},
        marker={"size": 7, "color": color, "symbol": symbol},
        hovertemplate=f"{at}<br>{name} %{{y:.4g}} {BARS}<extra></extra>",
    )


def _transitions_figure(changes: Sequence[Mapping[str, Any]]) -> Figure | None:
    """Prompts solved never, sometimes and always at every checkpoint."""
    if not changes:
        return None
    neighbours = changes[:-1] if len(changes) > 1 else changes
    steps = [neighbours[0]["before"]["step"], *(c["after"]["step"] for c in neighbours)]
    matrices = [c["transitions"]["counts"] for c in neighbours]
    traces = []
    for state, (name, color) in enumerate(zip(_STATES, (VERMILLION, PURPLE, BLUE), strict=True)):
        counts = [sum(matrices[0][state]), *(sum(row[state] for row in m) for m in matrices)]
        arrived = [
            "",
            *(f"; from {', '.join(f'{_STATES[i]} {m[i][state]}' for i in range(3))}" for m in matrices),
        ]
        traces.append(
            go.Bar(
                x=[str(step) for step in steps],
                y=counts,
                name=name,
                marker={"color": color},
                customdata=arrived,
                hovertemplate=f"step %{{x}}: %{{y}} prompts {name} solved%{{customdata}}<extra></extra>",
            )
        )
    spec = make_spec(
        traces,
        barmode="stack",
        xaxis={**_STEP_AXIS, "type": "category"},
        yaxis={"title": {"text": "prompts"}},
    )
    caption = (
        "Held-out prompts by how many of their samples are right: none, some, all. Where the prompts of a "
        "bar came from at the checkpoint before shows on hover. Counts of these samples; no interval."
    )
    return Figure("eval-transitions", "Prompts gained and lost", caption, spec, height=300, wide=False)


def _profile_figures(profiles: Table | None) -> list[Figure]:
    """pass@k and entropy of the last checkpoint against temperature, and against the nucleus."""
    if profiles is None:
        return []
    last = max(profiles["step"])
    figures = []
    for axis, other, title in (
        ("temperature", "top_p", "Temperature profile"),
        ("top_p", "temperature", "Nucleus profile"),
    ):
        if len(set(profiles[axis])) < 2:
            continue
        fixed = max(set(profiles[other]))
        rows = [
            row
            for row in range(len(profiles["step"]))
            if profiles["step"][row] == last and profiles[other][row] == fixed
        ]
        rows.sort(key=lambda row: float(profiles[axis][row]))
        names = [n for n in profiles if n.startswith("pass_at_") and f"{n}_stderr" in profiles]
        curves = [(n, n.replace("pass_at_", "pass@")) for n in names[:2]]
        curves.append(("entropy_per_token", "entropy, nats/token"))
        traces = [
            _curve(
                [profiles[axis][r] for r in rows],
                [estimates_of(profiles, column)[r] for r in rows],
                name,
                look,
                f"{axis} %{{x}}",
            )
            for (column, name), look in zip(curves, LOOKS, strict=False)
        ]
        spec = make_spec(
            traces,
            xaxis={"title": {"text": axis}},
            yaxis={"title": {"text": "fraction; nats/token"}, "rangemode": "tozero"},
        )
        caption = (
            f"The last checkpoint (step {last}) sampled in other ways, {other} {fixed:g}, on the same "
            "prompts; entropy is that of the whole policy at that temperature. Error bars: 95 % interval, "
            "clustered by prompt. All checkpoints are in eval_profiles.parquet."
        )
        figures.append(Figure(f"eval-profile-{axis}", title, caption, spec, height=300, wide=False))
    return figures
