"""The error of a statistic that rests on two samples: the update batch's prompts, and the probe's.

How well a criterion ranks a truth is a function of the tokens that are ranked and of the probe batch on which
their truth was measured; both were drawn. With t the statistic, t_g without the g-th of G groups of update
prompts, and t_f against the truth without the f-th of F folds of probe prompts,

    U = (G-1)/G sum_g (t_g - mean)^2        P = (F-1)/F sum_f (t_f - mean)^2        stderr^2 = U + P

Each way's jackknife holds what the two do together once, so that it enters twice: the error is not too small,
and at most 1.4 times too large (Owen 2007, "The pigeonhole bootstrap"). Taking it off again by a jackknife of
both ways was tried: that term is itself overestimated, and intervals became too short where it mattered.

The interval is Student's t with (U + P)^2 / (U^2/(G-1) + P^2/(F-1)) degrees of freedom (Satterthwaite 1946),
taken on a scale on which the statistic's error depends less on its value: atanh for correlations (Fisher
1921), logit for shares and probabilities. Its ends stay within what the statistic can be.

What this covers is measured in ``tests/measure/test_two_way.py``. The statistic is against a truth from a
probe of that size, not against the limit of many prompts: noise in the truth lowers correlations, and more
probe prompts raise them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from stepscope.intervals import FEWEST, FLAT, student
from stepscope.results import FloatArray
from stepscope.stats import Estimate, jackknife

Scale = Literal["correlation", "share", "difference"]

_RANGE: dict[Scale, tuple[float, float]] = {
    "correlation": (-1.0, 1.0),
    "share": (0.0, 1.0),
    "difference": (-np.inf, np.inf),
}


@dataclass(frozen=True)
class Way:
    """One of the samples.

    Attributes:
        name: of its units, in words.
        count: independent units, prompts.
        without: (part,) the statistic without each part of them.
    """

    name: str
    count: int
    without: FloatArray

    @property
    def variance(self) -> float:
        """Jackknife variance; nan where a part is not finite, or there are fewer than two."""
        return jackknife(self.without)[1] ** 2

    @property
    def words(self) -> str:
        """How many of what."""
        parts = len(self.without)
        pooled = f" in {parts} groups" if 1 < parts < self.count else ""
        return f"{self.count} {self.name}{pooled}"


def two_way(value: float, ways: tuple[Way, ...], *, unit: str, scale: Scale) -> Estimate:
    """A statistic with its error over one sample or both.

    Args:
        value: the statistic of everything.
        ways: update prompts, and probe prompts where the truth rests on them; ``n`` is that of the first.
        unit: of the value.
        scale: what kind of number it is, for the interval.

    Returns:
        The estimate, flagged where a way has fewer than 8 prompts, where the statistic or what is left of it
        is undefined, and where nothing varies.
    """
    variances = np.array([way.variance for way in ways])
    stderr = float(np.sqrt(variances.sum()))
    low = high = float("nan")
    if stderr > 0:
        freedom = np.array([len(way.without) - 1 for way in ways])
        effective = variances.sum() ** 2 / (variances**2 / freedom).sum()
        low, high = _ends(value, student(1 + float(effective)) * stderr, scale)
    method = "jackknife over " + " and ".join(way.words for way in ways)
    found = Estimate(value, stderr, ways[0].count, unit, method, low=low, high=high)
    return found.doubted(_why_not(value, stderr, ways))


def _ends(value: float, half: float, scale: Scale) -> tuple[float, float]:
    """Value ± half on the scale, with the delta method, and back."""
    least, most = _RANGE[scale]
    if scale == "difference" or not least < value < most:  # at an edge there is no such scale
        return max(least, value - half), min(most, value + half)
    if scale == "correlation":
        centre, step = np.arctanh(value), half / (1 - value**2)
        return float(np.tanh(centre - step)), float(np.tanh(centre + step))
    centre, step = np.log(value / (1 - value)), half / (value * (1 - value))
    return float(0.5 + 0.5 * np.tanh((centre - step) / 2)), float(0.5 + 0.5 * np.tanh((centre + step) / 2))


def _why_not(value: float, stderr: float, ways: tuple[Way, ...]) -> str:
    if not np.isfinite(value):
        return "undefined: the criterion or the truth is the same for all"
    for way in ways:
        if len(way.without) < 2:
            return f"{way.count} {way.name}: an error needs at least two"
        if not np.isfinite(way.without).all():
            return f"undefined without some of the {way.name}"
    for way in ways:
        if way.count < FEWEST:
            return f"{way.count} {way.name}, where an interval needs at least {FEWEST}"
    if stderr <= FLAT * abs(value):
        return f"the {ways[0].count} {ways[0].name} are too much alike for an interval"
    return ""
