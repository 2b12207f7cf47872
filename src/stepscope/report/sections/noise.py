# ruff: noqa: RUF001 (typographic signs are meant)
"""Noise and signal of the gradient, at this batch size and at others."""

from __future__ import annotations

import math

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, number_cell, percent_cell, table, trust_cell
from stepscope.results.noise import BatchSize, BatchSizes, NoiseScales
from stepscope.stats import Estimate


def section(measurement: Measurement, room: Room) -> Section | None:
    """The noise scale of each signal, and other batch sizes by the loss gradient."""
    noise = measurement.noise
    if noise is None:
        return None
    sizes = noise.batch_sizes.get("sgd")
    return Section(
        "noise",
        "Gradient noise scale",
        figures=[_size_figure(sizes)] if sizes else [],
        tables=[_scales(noise), *([_size_table(sizes)] if sizes else [])],
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
