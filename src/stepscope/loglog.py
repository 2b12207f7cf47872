"""A power law through magnitudes: a straight line on logarithmic axes; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from stepscope.stats import Number


@dataclass(frozen=True)
class LogLogFit:
    """Least squares of log|y| on log x: |y| = exp(intercept) * x^slope.

    Attributes:
        slope: exponent; 1 where y is linear in x.
        intercept: log|y| at x = 1.
        r2: share of the variance of log|y| explained.
        n: points used.
        lrs: their x.
        slope_stderr: standard error of the slope from the scatter about the line; nan with two points.
    """

    slope: Number
    intercept: Number
    r2: Number
    n: int
    lrs: tuple[float, ...]
    slope_stderr: Number = float("nan")


def loglog_fit(x: npt.ArrayLike, y: npt.ArrayLike) -> LogLogFit:
    """Straight line through log|y| against log x.

    Points where y is zero or not finite have no logarithm and are left out; ``lrs`` lists those used.

    Args:
        x: (lr,) positive abscissae, usually learning rates.
        y: (lr,) ordinates; only their magnitude enters.

    Returns:
        The fit; all nan with fewer than two distinct points.
    """
    xs = np.asarray(x, dtype=np.float64)
    ys = np.abs(np.asarray(y, dtype=np.float64))
    keep = (xs > 0) & np.isfinite(ys) & (ys > 0)
    used = tuple(float(v) for v in xs[keep])
    count = len(used)
    if len(set(used)) < 2:
        return LogLogFit(float("nan"), float("nan"), float("nan"), count, used)
    log_x, log_y = np.log(xs[keep]), np.log(ys[keep])
    dx, dy = log_x - log_x.mean(), log_y - log_y.mean()
    slope = float((dx * dy).sum() / (dx**2).sum())
    residual = float(((dy - slope * dx) ** 2).sum())
    spread = float((dy**2).sum())
    stderr = float(np.sqrt(residual / (count - 2) / float((dx**2).sum()))) if count > 2 else float("nan")
    return LogLogFit(
        slope=slope,
        intercept=float(log_y.mean() - slope * log_x.mean()),
        r2=1 - residual / spread if spread > 0 else float("nan"),
        n=count,
        lrs=used,
        slope_stderr=stderr,
    )
