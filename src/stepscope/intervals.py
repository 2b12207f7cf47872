"""95 % intervals that hold for few prompts; numpy, and scipy where it is needed, since it loads slowly.

A mean of independent prompts has Student's t behind it, and that is the interval of every estimate that says
nothing else. It is too short where few prompts carry most of the estimate, as with residuals of a
peaked policy: below :data:`FEW` prompts the number of standard errors comes from the symmetric studentised
bootstrap instead (Hall 1988). Fractions near 0 or 1 get a beta interval, which stays open where all prompts
agree. ``tests/measure/test_coverage.py`` measures what each covers.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float64]

TAIL = 0.025
"""Left out at either end."""

FEW = 128
"""Prompts from which Student's t holds for residuals, too."""

FEWEST = 8
"""Fewest prompts for which the coverage of any interval here is known."""

NUM_RESAMPLES = 999

FLAT = 1e-12
"""A spread below this share of the whole is round-off."""


def student(count: float) -> float:
    """Half width of a 95 % interval in standard errors, for ``count`` independent units; nan with one.

    Degrees of freedom that are no whole number (Satterthwaite 1946) come as ``count`` - 1.
    """
    from scipy.special import stdtrit

    return float(stdtrit(count - 1, 1 - TAIL)) if count > 1 else float("nan")


def studentised(sums: FloatArray) -> FloatArray:
    """Half width of a 95 % interval in standard errors, from what each prompt adds to the error.

    From :data:`FEW` prompts on Student's t. Below, the 95 % quantile of |t*| over 999 resamples of the
    prompts, t* = mean/standard error of the resample, or Student's t where that is larger. A resample has
    n - sqrt(n) prompts: with n of them the few that matter are drawn too often, and for 16 prompts intervals
    cover 92 %. The resamples are the same on every call.

    Args:
        sums: (prompt, item) residuals summed over each prompt, mean zero.

    Returns:
        (item,) standard errors to either side; infinite where one resample in twenty shows no spread.
    """
    count = len(sums)
    least = student(count)
    if count >= FEW or count < 2:
        return np.full(sums.shape[1], least)
    drawn = _resamples(count)
    size = float(drawn[0].sum())
    whole = (sums**2).mean(0)
    mean = drawn @ sums / size
    variance = (drawn @ sums**2 / size - mean**2) / (size - 1)
    ratio = np.where(mean**2 > FLAT * whole, np.inf, 0.0)
    np.divide(np.abs(mean), np.sqrt(np.maximum(variance, 0.0)), out=ratio, where=variance > FLAT * whole)
    quantile = np.partition(ratio, _RANK, axis=0)[_RANK]
    return np.asarray(np.maximum(quantile, least), dtype=np.float64)


_RANK = round((1 - 2 * TAIL) * (NUM_RESAMPLES + 1)) - 1


@lru_cache(maxsize=8)
def _resamples(count: int) -> FloatArray:
    """(resample, prompt) copies of each prompt."""
    size = max(2, round(count - np.sqrt(count)))
    drawn = np.random.default_rng(0).multinomial(size, np.full(count, 1 / count), size=NUM_RESAMPLES)
    return drawn.astype(np.float64)


def proportion(shares: FloatArray) -> tuple[float, float]:
    """95 % interval of the mean of numbers between 0 and 1, one per prompt, open where all are equal.

    Jeffreys' beta interval at the effective number of trials m(1 - m)/stderr^2 (Korn & Graubard 1998), whose
    standard error counts half a prompt of 0 and half a prompt of 1 more than there are, so that it does not
    vanish where all agree, and whose t quantile replaces the normal one.

    Args:
        shares: (prompt,) for example the unbiased pass@k of each prompt.

    Returns:
        Lower and upper end; nan with one prompt.
    """
    count = len(shares)
    if count < 2:
        return float("nan"), float("nan")
    from scipy.special import betaincinv, ndtri

    mean = float(shares.mean())
    centre = (float(shares.sum()) + 0.5) / (count + 1)
    scatter = float(((shares - centre) ** 2).sum()) + 0.5 * ((1 - centre) ** 2 + centre**2)
    trials = centre * (1 - centre) * count**2 / scatter * (float(ndtri(1 - TAIL)) / student(count)) ** 2
    a, b = trials * mean + 0.5, trials * (1 - mean) + 0.5
    low = 0.0 if mean <= 0 else float(betaincinv(a, b, TAIL))
    high = 1.0 if mean >= 1 else float(betaincinv(a, b, 1 - TAIL))
    return low, high
