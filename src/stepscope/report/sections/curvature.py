"""What pairs of sequences do together: the second-order kernel, its parts, its noise."""

from __future__ import annotations

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, interval_cell, table, trust_cell
from stepscope.results.curvature import CurvatureReport, PairReport, PairSums

_KINDS = {
    "diagonal": "a sequence with itself",
    "same_prompt": "two sequences of one prompt",
    "different_prompts": "sequences of different prompts",
    "batch": "all pairs of sequences",
    "batch_with_parts": "a sequence and momentum or decay",
    "parts": "momentum and decay among themselves",
    "total": "the whole step",
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Sums over kinds of pairs, spectrum, and first against second order of each sequence."""
    found = measurement.curvature
    if found is None:
        return None
    return Section(
        "curvature",
        "What pairs of responses do together",
        sentences=[_sentence(found, found.pairs[0])],
        intro=intro(found.pairs[0]),
        figures=[spectrum_figure(found.pairs[0])],
        tables=[_sums(found, pairs) for pairs in found.pairs],
    )


def _sentence(found: CurvatureReport, pairs: PairReport) -> str:
    whole, half = pairs.whole, found.lr**2 / 2
    parts = ", ".join(
        f"{text.bare(getattr(whole, kind).scaled(half))} {words}"
        for kind, words in (
            ("diagonal", "by sequences alone"),
            ("same_prompt", "by pairs of one prompt"),
            ("different_prompts", "by pairs across prompts"),
        )
    )
    return (
        f"To second order this batch changes {text.quantity_name(pairs.quantity)} by "
        f"{text.estimate(whole.batch.scaled(half, unit=pairs.unit))} at learning rate "
        f"{text.lr_text(found.lr)}: {parts}."
    )


def intro(pairs: PairReport) -> str:
    """In words: whether sequences have rows of their own, and how much is noise."""
    how = "Every sequence has a row of its own."
    if pairs.num_sketches:
        how = (
            f"{pairs.num_sketches} random signs of the sequences stand for single ones, so that the diagonal "
            "is an estimate; sums over prompts are exact given the batch."
        )
    elif pairs.spectrum.level == "prompts":
        how = "Whole prompts have rows, single sequences have none."
    return (
        f"{how} Of the squares of the kernel as estimated, {text.percent(pairs.noise.value)} "
        "are noise of the probe batch."
    )


def _sums(found: CurvatureReport, pairs: PairReport) -> Table:
    """Second-order change by kind of pair, and its two parts."""
    half = found.lr**2 / 2
    forms: dict[str, PairSums | None] = {
        "M₂": pairs.whole,
        "Fisher part": pairs.fisher,
        "rest": pairs.rest,
    }
    rows = [
        {
            "Pairs": words,
            "Part of the kernel": name,
            "Second-order change": value,
            "95 % interval": interval_cell(value),
            "Unit": value.unit,
            "n": value.n,
            "Trust": trust_cell(value),
        }
        for name, sums in forms.items()
        if sums is not None
        for kind, words in _KINDS.items()
        for value in [getattr(sums, kind).scaled(half, unit=pairs.unit)]
    ]
    return table(
        f"curvature-{pairs.quantity}-{pairs.normalisation}",
        f"Second order by kind of pair: {text.series_label(pairs)}",
        f"lr²/2 times the sum of the second-order kernel over kinds of ordered pairs at learning rate "
        f"{text.lr_text(found.lr)}, ± one standard error over folds of probe prompts, for this update batch. "
        "Fisher part: the product of first-order kernels. n counts folds.",
        rows,
    )


def spectrum_figure(pairs: PairReport) -> style.Figure:
    """Eigenvalues as estimated and on other probe prompts."""
    spectrum = pairs.spectrum
    numbers = list(range(1, len(spectrum.eigenvalues) + 1))
    own, other = style.LOOKS[0], style.LOOKS[1]
    traces = [
        style.curve(
            "as estimated",
            numbers,
            spectrum.eigenvalues.tolist(),
            own,
            "number %{x}: %{y:.4g}",
            mode="markers",
            size=5,
        ),
        style.curve(
            "on other probe prompts",
            numbers,
            spectrum.held_out.tolist(),
            other,
            "number %{x}, on prompts that did not choose it: %{y:.4g}",
            mode="markers",
            size=5,
        ),
    ]
    caption = (
        f"Eigenvalues of the second-order kernel between {spectrum.level} of the update batch, "
        f"{text.series_label(pairs)}, largest size first, and the same directions on folds of probe prompts "
        "that had no part in choosing them: what shrinks there is noise of the probe."
    )
    return style.figure(
        "curvature-spectrum",
        "Spectrum of the second-order kernel",
        caption,
        traces,
        wide=False,
        xaxis=style.axis("number, by size", type="log", dtick=1),
        yaxis=style.axis(f"eigenvalue, {pairs.unit}/lr²", zeroline=True),
    )
