"""95 % limits of a noise scale that hold whether or not the signal is resolved.

A jackknife error of noise / signal says little: where the signal happens to be small so is its error, and
the ratio runs off. So each noise scale B is asked whether the batch is compatible with it (as in Fieller's
theorem and in score intervals), and the limits are the ends of those that are. Were B the truth, with N the
noise of one group and n groups,

    Q = n |mean g|^2    has mean N (1 + n/B) and variance 2 tr(S^2) + 4 n (N/B) k + (1 + n/B)^2 var(N)

with S the covariance of the groups' gradients, k = g' S g / |g|^2 along their mean, and the error of N in
the last term. Q is close to a gamma variable of these moments (a noncentral chi square of few degrees of
freedom, whose long upper tail a normal variable would miss). B is compatible where Q lies between the 2.5 %
and the 97.5 % quantile; if an infinite B is, the signal is not resolved and there is a lower limit alone.
"""

from __future__ import annotations

import numpy as np
from scipy.optimize import brentq
from scipy.special import gammainc

from stepscope.intervals import TAIL
from stepscope.results import FloatArray

FARTHEST = 1e12
"""Signal per noise beyond which nothing is looked for."""

ROUND_OFF = 1e-10
"""Share of the groups' squared gradients below which that of their sum is what round-off left of 0."""


def noise_limits(products: FloatArray) -> tuple[float, float]:
    """Lower and upper 95 % limit of noise / signal, in groups; the upper one is infinite if not resolved.

    Args:
        products: (group, group) inner products of the groups' gradients.

    Returns:
        Both limits; nan with fewer than three groups, or where fewer than two have a gradient that varies;
        0 and infinity where the groups' gradients cancel.
    """
    count = len(products)
    nan = float("nan")
    if count < 3:
        return nan, nan
    total, trace = float(products.sum()), float(np.trace(products))
    noise = trace / count - (total - trace) / (count * (count - 1))
    means = products.mean(1)
    centred = products - means[:, None] - means[None, :] + means.mean()
    own = np.diag(centred)
    shrunk = (count / (count - 1)) ** 2
    square = float((centred**2).sum() - (own**2).sum()) / (count * (count - 1)) * shrunk
    if not (noise > 0 and square > 0 and total > ROUND_OFF * trace):
        return (0.0, float("inf")) if noise > 0 else (nan, nan)
    along = float(means.var(ddof=1) / means.mean())
    of_noise = float(own.var(ddof=1)) / count * shrunk
    seen = total / count

    def below(signal: float) -> float:
        """Chance of a smaller Q, for a signal in units of the noise of one group."""
        mean = noise * (1 + count * signal)
        variance = 2 * square + 4 * count * noise * signal * along + (1 + count * signal) ** 2 * of_noise
        return float(gammainc(mean**2 / variance, seen * mean / variance))

    def signal_at(level: float) -> float:
        return float(brentq(lambda signal: below(signal) - level, 0.0, FARTHEST, xtol=1e-15, rtol=1e-10))

    none = below(0.0)
    # where even no signal at all is too much (once in forty times), half of that chance still gives a limit
    highest = signal_at(TAIL if none > TAIL else none / 2)
    lowest = signal_at(1 - TAIL) if none > 1 - TAIL else 0.0
    return 1 / highest, 1 / lowest if lowest > 0 else float("inf")
