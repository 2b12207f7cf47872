# ruff: noqa: RUF001 (typographic signs are meant)
"""Noise and signal of the gradient, at this batch size and at others."""

from __future__ import annotations

import math
from typing import Any

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, interval_cell, number_cell, percent_cell, table, trust_cell
from stepscope.results.best_step import BestStep
from stepscope.results.noise import BatchSize, BatchSizes, NoiseScales
from stepscope.stats import Estimate


def section(measurement: Measurement, room: Room) -> Section | None:
    """The noise scale of each signal, and other batch sizes by the loss gradient."""
    noise = measurement.noise
    if noise is None:
        return None
    sizes = noise.batch_sizes.get("sgd")
    best = measurement.curvature.best if measurement.curvature else ()
    return Section(
        "noise",
        "Gradient noise scale",
        intro=" ".join([noise.advice, *(of.advice for of in best)]),
        figures=[
            *([_size_figure(sizes)] if sizes else []),
            *(figure for of in best for figure in _best_figures(of)),
        ],
        tables=[
            _scales(noise),
            *([_size_table(sizes)] if sizes else []),
            *(made(of) for of in best for made in (_best_table, _terms_table)),
        ],
    )


def best_sections(best: BestStep) -> list[Section]:
    """What is known of learning rate and batch size for one quantity, by itself."""
    return [
        Section(
            "best-step",
            "",
            intro=best.advice,
            figures=_best_figures(best),
            tables=[_best_table(best), _terms_table(best)],
        )
    ]


def _best_figures(best: BestStep) -> list[style.Figure]:
    """Best learning rate, and what it is worth, against the batch size; none where nothing of it is known."""
    parts = {
        "batch's part of the step": [(row.prompts, row.lr, row.gain) for row in best.rows],
        "with momentum and decay": [(row.prompts, row.lr_whole, row.gain_whole) for row in best.rows],
    }
    rates: list[Any] = []
    gains: list[Any] = []
    for number, (name, rows) in enumerate(parts.items()):
        look = style.look(number)
        known = [(B, lr, gain) for B, lr, gain in rows if math.isfinite(lr.value)]
        limits = [(B, lr.low) for B, lr, _ in rows if math.isnan(lr.value) and 0 < lr.low < math.inf]
        if known:
            hover = f"%{{x}} prompts: %{{y:.2g}}, {name}"
            for traces, place in ((rates, 1), (gains, 2)):
                traces.append(
                    style.curve(name, [k[0] for k in known], [k[place] for k in known], look, hover)
                )
        if limits:
            rates.append(
                style.curve(
                    f"at least, {name}",
                    [B for B, _ in limits],
                    [low for _, low in limits],
                    style.Look(look.color, "triangle-up-open"),
                    f"%{{x}} prompts: at least %{{y:.2g}}, {name}",
                    mode="markers",
                )
            )
    if not rates:
        return []
    own = style.Look(style.OCHRE, "star")
    rates.append(
        style.curve(
            "this run", [best.run_prompts], [best.lr], own, "%{x} prompts: %{y:.2g}", mode="markers", size=11
        )
    )
    name, size = text.quantity_name(best.quantity), style.axis("prompts per batch", **style.LOG)
    caption = (
        f"Learning rate at which the expected change of {name} is largest to second order in it, against "
        "prompts per batch: of the batch's own part of the step, and of the whole step with momentum and "
        "decay as they are. Error bars: 95 %, over update prompts and folds of probe prompts; open marks are "
        f"lower limits where there is no number. Noise is known from {best.prompts} prompts; P and clipping "
        "are those of this step."
    )
    made = [
        style.figure(
            f"best-lr-{best.quantity}",
            f"Best learning rate and batch size: {name}",
            caption,
            rates,
            wide=False,
            xaxis=size,
            yaxis=style.axis("best learning rate", **style.LOG),
        )
    ]
    if gains:
        made.append(
            style.figure(
                f"best-gain-{best.quantity}",
                f"What the best learning rate is worth: {name}",
                f"Expected change of {name} by one step at the best learning rate of each batch size, "
                f"{best.unit}. Error bars: 95 %, over update prompts and folds of probe prompts.",
                gains,
                wide=False,
                xaxis=size,
                yaxis=style.axis(f"change, {best.unit}", zeroline=True),
            )
        )
    return made


def _best_table(best: BestStep) -> Table:
    """The best learning rate of each batch size by the second-order expansion, and what it is worth."""
    return table(
        f"best-step-{best.quantity}",
        f"Best learning rate by second order: {text.quantity_name(best.quantity)}",
        "Learning rate at which the expected change is largest to second order in it, and that change "
        f"({best.unit}), ± one standard error over update prompts and folds of probe prompts: of this "
        "batch's part of the step alone, and of the whole step with momentum and decay as they are. P and "
        "clipping are those of this step. No number where slope or second order is not resolved, or both go "
        "the same way.",
        [
            {
                "Prompts per batch": row.prompts,
                "Best learning rate": row.lr,
                "at least": number_cell(row.lr.low),
                "at most": number_cell(row.lr.high),
                "Change there": row.gain,
                "Best, with momentum": row.lr_whole,
                "Change there, with momentum": row.gain_whole,
                "Diagnostics": trust_cell(row.lr),
            }
            for row in best.rows
        ],
    )


_TERMS = {
    "slope": "slope",
    "curvature": "curvature along the mean step",
    "noise": "what noise adds for a batch of one prompt",
    "noise_batch": "batch at which noise and curvature are equal",
    "lr_limit": "best learning rate of an infinite batch",
}


def _terms_table(best: BestStep) -> Table:
    """What the expected change is made of: batch's part, whole step, momentum's part, K1 squared."""
    named = {
        **{f"{words}, batch's part": getattr(best.batch, name) for name, words in _TERMS.items()},
        **{f"{words}, whole step": getattr(best.whole, name) for name, words in _TERMS.items()},
        **{f"{name} of momentum and decay": value for name, value in best.of_parts.items()},
        **{name.replace("_", " part of "): value for name, value in best.kinds.items()},
    }
    return table(
        f"best-terms-{best.quantity}",
        "",
        "Terms of the expected change, ± one standard error. Fisher part: product of first-order kernels.",
        [
            {
                "Term": name,
                "Value ± standard error": value,
                "95 % interval": interval_cell(value),
                "Unit": value.unit,
                "n": value.n,
                "Trust": trust_cell(value),
            }
            for name, value in named.items()
        ],
    )


def _scales(noise: NoiseScales) -> Table:
    """Noise scale of the gradient in each metric, and of the batch's effect on each quantity."""
    named = {
        "loss gradient": noise.sgd,
        "loss gradient, optimizer's metric": noise.preconditioned,
        **{f"effect on {key.replace('_', ' ')}": scale for key, scale in noise.effects.items()},
    }
    return table(
        "noise",
        "",
        "Noise scale: the batch at which noise and signal are equal, ± one standard error; no number where "
        "the signal is not resolved from zero. “At least” and “at most” are its 95 % limits. "
        "Within and between prompts: shares of the variance of one prompt group.",
        [
            {
                "Signal": label,
                "Noise scale, prompts": scale.prompts,
                "at least": number_cell(scale.at_least),
                "at most": number_cell(scale.prompts.high),
                "in sequences": scale.sequences,
                "Noise share of this batch": percent_cell(scale.share_of_noise),
                "Within prompts": _part(scale.within_prompts, scale.noise),
                "Between prompts": _part(scale.between_prompts, scale.noise),
                "n": scale.prompts.n,
                "Diagnostics": trust_cell(scale.prompts),
            }
            for label, scale in named.items()
            if scale is not None
        ],
    )


def _part(part: Estimate, whole: Estimate) -> Estimate:
    return part.scaled(1 / whole.value if whole.value else math.nan, unit="1")


def _size_figure(sizes: BatchSizes) -> style.Figure:
    """Noise-to-signal against batch size: by the law, and between disjoint parts of the batch."""
    resolved = all(math.isfinite(row.noise_to_signal.value) for row in sizes.rows)

    def law(row: BatchSize) -> float:
        return row.noise_to_signal.value if resolved else row.noise_to_signal.low

    cut = [(row, row.over_law.scaled(law(row))) for row in sizes.rows if row.over_law is not None]
    traces = [
        style.curve(
            "noise scale / batch size" if resolved else "lower limit of it: the signal is not resolved",
            [row.prompts for row in sizes.rows],
            [law(row) for row in sizes.rows],
            style.Look(style.GREEN),
            "%{x} prompts: %{y:.3g}",
            mode="lines",
        ),
        style.curve(
            "between disjoint batches",
            [row.prompts for row, _ in cut],
            [between for _, between in cut],
            style.Look(style.PURPLE, "diamond"),
            "%{x} prompts: %{y:.3g} from %{customdata} batches",
            mode="markers",
            details=[row.batches for row, _ in cut],
        ),
    ]
    caption = (
        "Variance of the gradient over its squared norm, against batch size (SGD metric). Line: the noise "
        "scale over the batch size. Points: variance between disjoint parts of this update batch, in the "
        f"order of sampling. Log-log slope {text.bare(sizes.slope)}; −1 where the noise "
        "falls like 1/B. Error bars: 95 % interval, jackknife over the batches; the error of the signal is "
        "not in them."
    )
    return style.figure(
        "batch-sizes",
        "Noise to signal and batch size",
        caption,
        traces,
        wide=False,
        xaxis=style.axis("prompts per batch", **style.LOG),
        yaxis=style.axis("noise / signal", **style.LOG),
    )


def _size_table(sizes: BatchSizes) -> Table:
    """Noise-to-signal and the learning rates that other batch sizes admit."""
    return table(
        "batch-sizes",
        "Batch size and learning rate",
        "Noise to signal at other batch sizes, and the largest learning rate that pays there relative to the "
        f"run's own batch of {sizes.run_prompts} prompts. Beyond the size of this update batch the law is "
        "extrapolated. ⚠ marks unreliable figures.",
        [
            {
                "Prompts per batch": row.prompts,
                "Sequences": number_cell(row.sequences, 4),
                "Noise / signal": row.noise_to_signal,
                "Measured noise over 1/B law": row.over_law,
                "Learning rate, SGD": row.lr_sgd,
                "Learning rate, Adam": row.lr_adam,
            }
            for row in sizes.rows
        ],
    )
