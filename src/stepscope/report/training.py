"""What training did: logged curves, evaluations with intervals, before against after."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report import text
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
from stepscope.report.load import Table, Training, estimates_of, parse_estimate
from stepscope.report.tables import (
    Column,
    TableBlock,
    difference_of,
    estimate_cell,
    interval_cell,
    text_cell,
)

_LOGGED = (
    ("reward", "Mean reward of each training batch", BLUE, "reward"),
    ("entropy", "Entropy of the policy on each training batch", VERMILLION, "nats/token"),
    ("completions/mean_length", "Mean response length of each training batch", PURPLE, "tokens"),
)
_STEP_AXIS = {"title": {"text": "optimizer step"}}


def training_figures(training: Training) -> list[Figure]:
    """Curves as logged, then as evaluated, then the warm-up's; each only where the run has it."""
    figures = [f for look in _LOGGED if (f := _logged_figure(training.log, *look)) is not None]
    for number, (setting, table) in enumerate(training.evaluations.items()):
        figures.append(_pass_figure(table, setting, f"eval-pass-{number}"))
        if "entropy_per_token_stderr" in table:
            figures.append(_entropy_figure(table, setting, f"eval-entropy-{number}"))
    warmup = _warmup_figure(training.warmup)
    return [*figures, warmup] if warmup else figures


def training_sentences(training: Training) -> list[str]:
    """From the first to the last evaluated checkpoint: pass@k and entropy, with one standard error each."""
    sentences = []
    for setting, table in training.evaluations.items():
        several = len(table["step"]) > 1
        names = [(f"pass_at_{k}", f"pass@{k}", "") for k in _ks(table)]
        parts = []
        for column, name, unit in [*names, ("entropy_per_token", "entropy", " nats/token")]:
            if f"{column}_stderr" in table:
                entries = estimates_of(table, column)
                entries = [entries[0], entries[-1]] if several else entries[:1]
                figures = [text.plus_minus(entry.value, entry.stderr) for entry in entries]
                parts.append(f"{name} {'from ' if several else ''}{' to '.join(figures)}{unit}")
        where = f"on held-out problems ({setting})" if setting else "on held-out problems"
        first, last = table["step"][0], table["step"][-1]
        when = f"From step {first} to step {last}" if several else f"At step {first}"
        sentences.append(f"{when}, {where}: {'; '.join(parts)}.")
    return sentences


def before_after_tables(training: Training) -> list[TableBlock]:
    """First against last evaluated checkpoint, with the difference and its combined error."""
    whole = training.changes[-1] if training.changes else None
    return [
        _before_after(table, setting, number, whole if len(training.evaluations) == 1 else None)
        for number, (setting, table) in enumerate(training.evaluations.items())
        if len(table["step"]) > 1
    ]


def _before_after(table: Table, setting: str, number: int, paired: Mapping[str, Any] | None) -> TableBlock:
    """The table; with ``paired``, the last entry of ``eval_changes.json``, differences come from there."""
    columns = [
        Column("Quantity"),
        Column(f"Before (step {table['step'][0]})", numeric=True, with_error=True),
        Column(f"After (step {table['step'][-1]})", numeric=True, with_error=True),
        Column("Difference", numeric=True, with_error=True),
        Column("Unit"),
        Column("95 % of the difference", "def-estimate"),
    ]
    rows = []
    for column, name, anchor, unit in (
        *((f"pass_at_{k}", f"pass@{k}", "def-pass-at-k", "fraction") for k in _ks(table)),
        ("mean_reward", "mean reward", "def-reward", "reward"),
        ("entropy_per_token", "entropy", "def-entropy", "nats/token"),
        ("surprisal", "surprisal", "def-logprob", "nats/token"),
        ("format_rate", "well-formed responses", "def-batches", "fraction"),
        ("mean_length", "response length", "def-batches", "tokens"),
        ("mean_length_correct", "length of correct responses", "def-batches", "tokens"),
        ("truncated_rate", "truncated responses", "def-batches", "fraction"),
    ):
        if column in table:
            found = estimates_of(table, column, unit=unit)
            first, last = found[0], found[-1]
            difference = (
                parse_estimate(paired["differences"][column], f"eval_changes.json: {column}")
                if paired
                else difference_of(first, last)
            )
            rows.append(
                [
                    text_cell(name, anchor=anchor),
                    estimate_cell(first),
                    estimate_cell(last),
                    estimate_cell(difference),
                    text_cell(unit),
                    interval_cell(difference),
                ]
            )
    caption = (
        f"Held-out problems before and after training{_size(table)}, ± one standard error clustered by "
        "prompt. "
    ) + (
        "The error of the difference is over the same prompts, so what they have in common cancels."
        if paired
        else "The error of the difference treats the two evaluations as independent; where they ask the same "
        "problems it is overstated."
    )
    return TableBlock(f"before-after-{number}", _titled("Before and after", setting), caption, columns, rows)


def _logged_figure(
    log: Sequence[Mapping[str, Any]], key: str, name: str, color: str, unit: str
) -> Figure | None:
    rows = [row for row in log if isinstance(row.get(key), int | float) and "step" in row]
    if not rows:
        return None
    trace = go.Scatter(
        x=[row["step"] for row in rows],
        y=rounded(row[key] for row in rows),
        mode="lines+markers",
        line={"color": color, "width": 1.5},
        marker={"size": 4, "color": color},
        hovertemplate=f"step %{{x}}: %{{y:.4g}} {unit}<extra></extra>",
    )
    spec = make_spec([trace], xaxis=_STEP_AXIS, yaxis={"title": {"text": unit}}, showlegend=False)
    caption = (
        f"{name}, as the trainer logged it at {len(rows)} steps, in {unit}. One batch per point, so the "
        "scatter between neighbours shows the sampling error; no interval is logged."
    )
    return Figure(f"train-{key.split('/')[-1]}", name, caption, spec, height=300, wide=False)


def _evaluated_curve(table: Table, column: str, name: str, look: tuple[str, str, str]) -> Any:
    color, symbol, dash = look
    return go.Scatter(
        x=table["step"],
        y=rounded(table[column]),
        error_y=error_bars(estimates_of(table, column), color),
        mode="lines+markers",
        name=name,
        line={"color": color, "width": 1.5, "dash": dash},
        marker={"size": 8, "color": color, "symbol": symbol},
        hovertemplate=f"step %{{x}}<br>{name} %{{y:.4g}} {BARS}<extra></extra>",
    )


def _pass_figure(table: Table, setting: str, key: str) -> Figure:
    ks = _ks(table)
    traces = [
        _evaluated_curve(table, f"pass_at_{k}", f"pass@{k}", look) for k, look in zip(ks, LOOKS, strict=False)
    ]
    spec = make_spec(
        traces, xaxis=_STEP_AXIS, yaxis={"title": {"text": "fraction of problems"}, "range": [0, 1.02]}
    )
    caption = (
        "Fraction of held-out problems of which at least one of k sampled responses is right (pass@k), "
        f"unbiased estimator{_size(table)}. Error bars: 95 % interval, clustered by prompt."
    )
    title = _titled("Accuracy on held-out problems", setting)
    return Figure(key, title, caption, spec, height=300, wide=False)


def _entropy_figure(table: Table, setting: str, key: str) -> Figure:
    spec = make_spec(
        [_evaluated_curve(table, "entropy_per_token", "entropy", (VERMILLION, "circle", "solid"))],
        xaxis=_STEP_AXIS,
        yaxis={"title": {"text": "nats/token"}, "rangemode": "tozero"},
        showlegend=False,
    )
    caption = (
        f"Entropy of the policy per response token on held-out problems{_size(table)}. Error bars: 95 % "
        "interval, clustered by prompt."
    )
    title = _titled("Entropy on held-out problems", setting)
    return Figure(key, title, caption, spec, height=300, wide=False)


def _warmup_figure(log: Sequence[Mapping[str, Any]]) -> Figure | None:
    traces = []
    for (key, name), (color, symbol, dash) in zip(
        (("accuracy", "correct"), ("format_rate", "well-formed")), LOOKS, strict=False
    ):
        rows = [row for row in log if isinstance(row.get(key), int | float) and "step" in row]
        if rows:
            traces.append(
                go.Scatter(
                    x=[row["step"] for row in rows],
                    y=rounded(row[key] for row in rows),
                    mode="lines+markers",
                    name=name,
                    line={"color": color, "width": 1.5, "dash": dash},
                    marker={"size": 6, "color": color, "symbol": symbol},
                    hovertemplate=f"step %{{x}}: %{{y:.3f}} {name}<extra></extra>",
                )
            )
    if not traces:
        return None
    spec = make_spec(
        traces,
        xaxis={"title": {"text": "warm-up step"}},
        yaxis={"title": {"text": "fraction of responses"}, "range": [0, 1.02]},
    )
    caption = (
        "Supervised warm-up before reinforcement learning: fraction of responses to held-out prompts that "
        "are correct and well-formed, as logged; no interval is logged."
    )
    return Figure("warmup", "Warm-up", caption, spec, height=300, wide=False)


def _ks(table: Table) -> list[int]:
    """The k of every pass@k that comes with an error, at most three: smallest, ..., largest."""
    found = sorted(int(m.group(1)) for name in table if (m := re.fullmatch(r"pass_at_(\d+)_stderr", name)))
    return found if len(found) <= 3 else [*found[:2], found[-1]]


def _size(table: Table) -> str:
    if "num_prompts" not in table or "samples_per_prompt" not in table:
        return ""
    prompts, samples = (
        "/".join(map(str, sorted(set(table[key])))) for key in ("num_prompts", "samples_per_prompt")
    )
    return f", n = {prompts} prompts with {samples} samples each"


def _titled(title: str, setting: str) -> str:
    return f"{title}, {setting}" if setting else title
