"""A line for each section that is folded: what it says, or what is in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Section


def brief(section: Section, measurement: Measurement) -> str:
    """The line of a section; empty where it is shown unfolded."""
    make = _BRIEFS.get(section.key)
    return make(measurement) if make else _OTHERS.get(section.key, "")


def _figure(name: str, words: str) -> Callable[[Measurement], str]:
    """A headline figure in words, or words alone where it is not known."""

    def line(measurement: Measurement) -> str:
        found = measurement.summary.get(name)
        if found is None:
            return words.format(text.NOT_AVAILABLE)
        return words.format(text.bare(found) if math.isfinite(found.value) else text.interval(found))

    return line


def _headline(measurement: Measurement) -> str:
    failed = sum(not value.reliable for value in measurement.summary.values())
    return f"{len(measurement.summary)} figures with errors and methods, {failed} of them flagged"


def _step(measurement: Measurement) -> str:
    found = measurement.step.components if measurement.step else {}
    parts = [f"{name} {text.percent(part.share)}" for name, part in found.items()]
    return f"of its squared length: {', '.join(parts)}"


_BRIEFS: Mapping[str, Callable[[Measurement], str]] = {
    "headline": _headline,
    "change": _figure("linearity_slope", "|true change| grows as the learning rate to the power {}"),
    "step": _step,
    "influence": _figure(
        "rank_reliability_tokens", "every sequence and token with its error; order of tokens reliable to {}"
    ),
    "kernel": _figure("effective_rank", "effective rank of the kernel {} directions"),
    "noise": _figure("noise_scale", "loss gradient {} prompts"),
}

_OTHERS: Mapping[str, str] = {
    "provenance": "checkpoint, batches, seeds, settings, versions",
    "models": "what a forward pass knows of the kernel, and whether the kernel is more than noise",
    "curvature": "what pairs of the step's sequences do together, beyond first order",
    "kinship": "own position, own response, same prompt or other prompts",
    "validation": "predicted against true changes, and their correlations",
    "criteria": "every criterion of the literature against the measured influence",
    "frontier": "what other weights of the same responses would buy, predicted and realised",
    "sampler": "what drew the responses, against the policy that is measured",
    "responses": "the first right and wrong ones of the batch",
}
