# ruff: noqa: RUF001 (typographic signs are meant)
"""What training did: logged curves, evaluations with intervals, before against after, profiles, the law."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go

from stepscope.report import style, text
from stepscope.report.load import Training, estimates_of
from stepscope.report.parts import Section
from stepscope.report.sections.law import law_figure, law_sentences
from stepscope.report.tables import Table, Value, difference_of, interval_cell, linked, table
from stepscope.results.evaluation import EvaluationChange
from stepscope.stats import Estimate

_STEP = style.axis("optimizer step")
_CLUSTERED = "Error bars: 95 % interval, clustered by prompt."

_LOGGED = (
    ("entropy", "Entropy of the policy on each training batch", style.INK, "nats/token"),
    ("reward", "Mean reward of each training batch", style.GREEN, "reward"),
    ("completions/mean_length", "Mean response length of each training batch", style.PURPLE, "tokens"),
)
_CURVES = (
    (
        "eval-length",
        "Response length",
        "tokens",
        {"mean_length": "all responses", "mean_length_correct": "correct responses"},
        "Tokens per response, the end-of-sequence token among them.",
    ),
    (
        "eval-rates",
        "Format and truncation",
        "fraction of responses",
        {"format_rate": "well-formed", "truncated_rate": "truncated"},
        "Fraction of responses that keep the format, and that are cut at the longest length.",
    ),
    (
        "eval-surprisal",
        "Surprisal of the sampled tokens",
        "nats",
        {"surprisal_q50": "median", "surprisal_q90": "0.9 quantile", "surprisal_q99": "0.99 quantile"},
        "Quantiles over all response tokens of −log π(yₖ|sₖ); their errors are Woodruff's.",
    ),
)
_QUANTITIES: Mapping[str, tuple[str, str, str]] = {
    "mean_reward": ("mean reward", "def-reward", "reward"),
    "entropy_per_token": ("entropy", "def-entropy", "nats/token"),
    "surprisal": ("surprisal", "def-logprob", "nats/token"),
    "format_rate": ("well-formed responses", "def-batches", "fraction"),
    "mean_length": ("response length", "def-batches", "tokens"),
    "mean_length_correct": ("length of correct responses", "def-batches", "tokens"),
    "truncated_rate": ("truncated responses", "def-batches", "fraction"),
}
_STATES = {"never": style.BROWN, "sometimes": style.PURPLE, "always": style.GREEN}


def section(training: Training, measured: Mapping[int, str] | None = None) -> Section | None:
    """Curves as logged, entropy first, then as evaluated, then the warm-up's; each only where the run has it.

    Args:
        training: what the run folder holds.
        measured: step to the place on the page of each measurement, which a click on the curve leads to.
    """
    figures = [f for logged in _LOGGED if (f := _logged_figure(training.log, *logged, measured)) is not None]
    for number, (setting, rows) in enumerate(training.evaluations.items()):
        figures.append(_pass_figure(rows, setting, f"eval-pass-{number}"))
        if "entropy_per_token_stderr" in rows:
            figures.append(_entropy_figure(rows, setting, f"eval-entropy-{number}"))
    figures += _warmup_figures(training.warmup)
    if not figures:
        return None
    return Section(
        "training",
        "Training",
        sentences=training_sentences(training),
        tables=_before_after_tables(training),
        figures=figures,
    )


def evaluation(training: Training) -> Section | None:
    """Further curves over the checkpoints, prompts by how often they are solved, profiles, the law."""
    figures = [
        _over_steps(
            rows, key, title, f"{caption} {_CLUSTERED}", present, style.axis(unit, rangemode="tozero")
        )
        for rows in (training.evaluations.values() if len(training.evaluations) == 1 else ())
        for key, title, unit, columns, caption in _CURVES
        if (present := {c: name for c, name in columns.items() if f"{c}_stderr" in rows})
    ]
    sentences, tables = [], []
    if training.changes:
        figures.append(_transitions_figure(training.changes))
        sentences.append(_moved_sentence(training.changes[-1]))
        tables.append(_paired_table(training.changes))
    figures += _profile_figures(training.profiles)
    if training.law:
        figures.append(law_figure({"": training.law}))
        sentences += law_sentences(training.law)
    if not figures:
        return None
    return Section("evaluation", "Evaluation", sentences=sentences, tables=tables, figures=figures)


def training_sentences(training: Training) -> list[str]:
    """From the first to the last evaluated checkpoint: pass@k and entropy, with one standard error each."""
    sentences = []
    for setting, rows in training.evaluations.items():
        several = len(rows) > 1
        parts = []
        for column, name, unit in (
            *((f"pass_at_{k}", f"pass@{k}", "") for k in _ks(rows)),
            ("entropy_per_token", "entropy", " nats/token"),
        ):
            if f"{column}_stderr" in rows:
                found = [text.bare(e) for e in estimates_of(rows, column)]
                parts.append(f"{name} " + (f"from {found[0]} to {found[-1]}" if several else found[0]) + unit)
        first, last = rows.step.iloc[0], rows.step.iloc[-1]
        when = f"From step {first} to step {last}" if several else f"At step {first}"
        where = f" ({setting})" if setting else ""
        sentences.append(f"{when}, on the problems evaluated{where}: {'; '.join(parts)}.")
    return sentences


def _before_after_tables(training: Training) -> list[Table]:
    """First against last evaluated checkpoint, with the difference: paired where that was measured."""
    paired = training.changes[-1].differences if training.changes and len(training.evaluations) == 1 else {}
    return [
        _before_after(rows, setting, number, paired)
        for number, (setting, rows) in enumerate(training.evaluations.items())
        if len(rows) > 1
    ]


def _before_after(rows: Any, setting: str, number: int, paired: Mapping[str, Estimate]) -> Table:
    passes = {f"pass_at_{k}": (f"pass@{k}", "def-pass-at-k", "fraction") for k in _ks(rows)}
    first, last = rows.step.iloc[0], rows.step.iloc[-1]
    found: list[Mapping[str, Value]] = []
    for column, (name, anchor, unit) in {**passes, **_QUANTITIES}.items():
        if column in rows:
            before, *_, after = estimates_of(rows, column, unit=unit)
            difference = paired[column] if paired else difference_of(before, after)
            found.append(
                {
                    "Quantity": linked(name, anchor),
                    f"Before (step {first})": before,
                    f"After (step {last})": after,
                    "Difference": difference,
                    "Unit": unit,
                    "95 % of the difference": interval_cell(difference),
                }
            )
    error = (
        "is over the same prompts, so what they have in common cancels."
        if paired
        else "treats the two evaluations as independent; where they ask the same problems it is overstated."
    )
    return table(
        f"before-after-{number}",
        _titled("Before and after", setting),
        f"Held-out problems before and after training{_size(rows)}, ± one standard error clustered by "
        f"prompt. The error of the difference {error}",
        found,
    )


def _logged_figure(
    log: Sequence[Mapping[str, Any]],
    key: str,
    name: str,
    color: str,
    unit: str,
    measured: Mapping[int, str] | None = None,
) -> style.Figure | None:
    found = _logged(log, key)
    if not found:
        return None
    caption = (
        f"{name}, as the trainer logged it at {len(found)} steps, in {unit}. One batch per point, so the "
        "scatter between neighbours shows the sampling error; no interval is logged."
    )
    curve = style.curve(
        "", found, found.values(), style.Look(color), f"step %{{x}}: %{{y:.4g}} {unit}", size=4
    )
    clicked = _measured(found, measured or {}, unit) if key == "entropy" else None
    return style.figure(
        f"train-{key.split('/')[-1]}",
        name,
        caption + (" Diamonds: measured steps; a click leads to the measurement." if clicked else ""),
        [curve, clicked] if clicked else [curve],
        wide=clicked is not None,
        height=300 if clicked else None,
        xaxis=_STEP,
        yaxis=style.axis(unit),
        showlegend=False,
    )


def _measured(logged: Mapping[int, float], measured: Mapping[int, str], unit: str) -> Any | None:
    """The measured steps on the curve, each at the last logged value up to it; None where none is on it."""
    found = {step: [v for at, v in logged.items() if at <= step] for step in measured}
    points = {step: values[-1] for step, values in found.items() if values}
    if not points:
        return None
    return style.curve(
        "measured",
        points,
        points.values(),
        style.Look(style.PURPLE, "diamond"),
        f"measured step %{{x}}: %{{y:.4g}} {unit}; click to see it",
        mode="markers",
        size=14,
        details=[measured[step] for step in points],
    )


def _logged(log: Sequence[Mapping[str, Any]], key: str) -> dict[int, float]:
    """Step to value of what a trainer logged under a name."""
    return {row["step"]: row[key] for row in log if isinstance(row.get(key), int | float) and "step" in row}


def _warmup_figures(log: Sequence[Mapping[str, Any]]) -> list[style.Figure]:
    names = {"accuracy": "correct", "format_rate": "well-formed"}
    traces = [
        style.curve(name, found, found.values(), own, f"step %{{x}}: %{{y:.3f}} {name}", size=6)
        for (key, name), own in zip(names.items(), style.LOOKS, strict=False)
        if (found := _logged(log, key))
    ]
    caption = (
        "Supervised warm-up before reinforcement learning: fraction of responses to held-out prompts that "
        "are correct and well-formed, as logged; no interval is logged."
    )
    y = style.axis("fraction of responses", range=[0, 1.02])
    x = style.axis("warm-up step")
    return (
        [style.figure("warmup", "Warm-up", caption, traces, wide=False, xaxis=x, yaxis=y)] if traces else []
    )


def _over_steps(
    rows: Any, key: str, title: str, caption: str, columns: Mapping[str, str], y: Any, **layout: Any
) -> style.Figure:
    """Evaluated figures against the optimizer step."""
    traces = _evaluated(rows, "step", columns)
    return style.figure(
        key, title, caption, traces, wide=False, xaxis=_STEP, yaxis=y, **{"showlegend": True, **layout}
    )


def _evaluated(
    rows: Any, along: str, columns: Mapping[str, str], looks: Sequence[style.Look] = style.LOOKS
) -> list[Any]:
    return [
        style.curve(
            name,
            rows[along].tolist(),
            estimates_of(rows, column),
            own,
            f"{along} %{{x}}<br>{name} %{{y:.4g}} {style.BARS}",
        )
        for (column, name), own in zip(columns.items(), looks, strict=False)
    ]


def _pass_figure(rows: Any, setting: str, key: str) -> style.Figure:
    caption = (
        "Fraction of the problems evaluated of which at least one of k sampled responses is right (pass@k), "
        f"unbiased estimator{_size(rows)}. {_CLUSTERED}"
    )
    columns = {f"pass_at_{k}": f"pass@{k}" for k in _ks(rows)}
    title = _titled("Accuracy on the problems evaluated", setting)
    return _over_steps(
        rows, key, title, caption, columns, style.axis("fraction of problems", range=[0, 1.02])
    )


def _entropy_figure(rows: Any, setting: str, key: str) -> style.Figure:
    return style.figure(
        key,
        _titled("Entropy on the problems evaluated", setting),
        f"Entropy of the policy per response token on the problems evaluated{_size(rows)}. {_CLUSTERED}",
        _evaluated(rows, "step", {"entropy_per_token": "entropy"}, [style.Look(style.INK)]),
        wide=False,
        xaxis=_STEP,
        yaxis=style.axis("nats/token", rangemode="tozero"),
        showlegend=False,
    )


def _moved_sentence(whole: EvaluationChange) -> str:
    moved = whole.transitions
    return (
        f"From step {whole.before.step} to step {whole.after.step}, {len(moved.gained)} prompts that were "
        f"never solved are solved at least once, and {len(moved.lost)} that were solved are lost."
    )


def _paired_table(changes: Sequence[EvaluationChange]) -> Table:
    """Paired differences of every figure between checkpoints."""
    return table(
        "paired",
        "Paired differences between checkpoints",
        "Change of every figure between neighbouring checkpoints, and over the whole run, ± one standard "
        "error of the difference: the same prompts before and after, so what they have in common cancels.",
        [
            {
                "From step": change.before.step,
                "To step": change.after.step,
                "Quantity": _QUANTITIES[name][0]
                if name in _QUANTITIES
                else name.replace("pass_at_", "pass@"),
                "Paired difference": value,
                "Unit": value.unit,
            }
            for change in changes
            for name, value in change.differences.items()
        ],
    )


def _transitions_figure(changes: Sequence[EvaluationChange]) -> style.Figure:
    """Prompts solved never, sometimes and always at every checkpoint."""
    neighbours = changes[:-1] if len(changes) > 1 else changes
    steps = [neighbours[0].before.step, *(c.after.step for c in neighbours)]
    matrices = [c.transitions.counts for c in neighbours]
    traces = []
    for state, (name, color) in enumerate(_STATES.items()):
        arrived = [
            ", ".join(f"{s} {row[state]}" for s, row in zip(_STATES, m, strict=True)) for m in matrices
        ]
        traces.append(
            go.Bar(
                x=[str(step) for step in steps],
                y=[sum(matrices[0][state]), *(sum(row[state] for row in m) for m in matrices)],
                name=name,
                marker={"color": color},
                customdata=["", *(f"; from {words}" for words in arrived)],
                hovertemplate=f"step %{{x}}: %{{y}} prompts {name} solved%{{customdata}}<extra></extra>",
            )
        )
    caption = (
        "Held-out prompts by how many of their samples are right: none, some, all. Where the prompts of a "
        "bar came from at the checkpoint before shows on hover. Counts of these samples; no interval."
    )
    return style.figure(
        "eval-transitions",
        "Prompts gained and lost",
        caption,
        traces,
        wide=False,
        barmode="stack",
        xaxis={**_STEP, "type": "category"},
        yaxis=style.axis("prompts"),
    )


def _profile_figures(profiles: Any) -> list[style.Figure]:
    """pass@k and entropy of the last checkpoint against temperature, and against the nucleus."""
    if profiles is None:
        return []
    last = profiles[profiles.step == profiles.step.max()]
    figures = []
    for along, other, title in (
        ("temperature", "top_p", "Temperature profile"),
        ("top_p", "temperature", "Nucleus profile"),
    ):
        if profiles[along].nunique() < 2:
            continue
        fixed = profiles[other].max()
        rows = last[last[other] == fixed].sort_values(along)
        names = [n for n in profiles if n.startswith("pass_at_") and f"{n}_stderr" in profiles]
        columns = {n: n.replace("pass_at_", "pass@") for n in names[:2]}
        caption = (
            f"The last checkpoint (step {last.step.iloc[0]}) sampled in other ways, {other} {fixed:g}, on "
            f"the same prompts; entropy is that of the whole policy at that temperature. {_CLUSTERED} "
            "All checkpoints are in eval_profiles.parquet."
        )
        figures.append(
            style.figure(
                f"eval-profile-{along}",
                title,
                caption,
                _evaluated(rows, along, {**columns, "entropy_per_token": "entropy, nats/token"}),
                wide=False,
                xaxis=style.axis(along),
                yaxis=style.axis("fraction; nats/token", rangemode="tozero"),
            )
        )
    return figures


def _ks(rows: Any) -> list[int]:
    """The k of every pass@k that comes with an error, at most three: smallest, ..., largest."""
    found = sorted(int(m.group(1)) for name in rows if (m := re.fullmatch(r"pass_at_(\d+)_stderr", name)))
    return found if len(found) <= 3 else [*found[:2], found[-1]]


def _size(rows: Any) -> str:
    if "num_prompts" not in rows or "samples_per_prompt" not in rows:
        return ""
    prompts, samples = (
        "/".join(map(str, sorted(set(rows[key])))) for key in ("num_prompts", "samples_per_prompt")
    )
    return f", n = {prompts} prompts with {samples} samples each"


def _titled(title: str, setting: str) -> str:
    return f"{title}, {setting}" if setting else title
