# ruff: noqa: RUF001 (typographic signs are meant)
"""Numbers and sentences as a reader of the page sees them."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from typing import Protocol

from stepscope.stats import Estimate

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOT_AVAILABLE = "–"


QUANTITIES: Mapping[str, str] = {
    "reward": "expected reward",
    "kl": "KL divergence",
    "length": "response length",
}
NORMALISATIONS: Mapping[str, str] = {"per_token": "per token", "per_seq": "per response"}
VERSIONS: Mapping[str, str] = {"on_policy": "on-policy", "fixed_prefix": "fixed-prefix"}


class Series(Protocol):
    """What tells the changes of a measurement apart."""

    @property
    def quantity(self) -> str: ...  # noqa: D102
    @property
    def normalisation(self) -> str: ...  # noqa: D102
    @property
    def version(self) -> str: ...  # noqa: D102


def series_label(series: Series) -> str:
    """A change series in words, for example ``entropy per token, on-policy``."""
    how = (
        NORMALISATIONS.get(series.normalisation, series.normalisation),
        VERSIONS.get(series.version, series.version),
    )
    return f"{quantity_name(series.quantity)} {', '.join(how)}"


def quantity_name(quantity: str) -> str:
    """A quantity in words."""
    return QUANTITIES.get(quantity, quantity)


def number(value: float, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, minus sign and power of ten typeset."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        return _minus(f"{value:.{max(0, digits - 1 - exponent)}f}")
    return f"{_minus(f'{value / 10**exponent:.{digits - 1}f}')} × 10{_power(exponent)}"


def plus_minus(value: float, stderr: float) -> str:
    """``value ± stderr`` with two significant digits of the error and one power of ten for both."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    if not math.isfinite(stderr) or stderr <= 1e-9 * abs(value):
        return number(value, 4)
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    scale = exponent if not -4 <= exponent < 6 else 0
    decimals = 1 - math.floor(math.log10(float(f"{stderr / 10.0**scale:.1e}")))
    body = " ± ".join(f"{round(x / 10.0**scale, decimals):.{max(0, decimals)}f}" for x in (value, stderr))
    return _minus(body) if scale == 0 else f"({_minus(body)}) × 10{_power(scale)}"


def bare(value: Estimate) -> str:
    """An estimate with its error."""
    return plus_minus(value.value, value.stderr)


def estimate(value: Estimate) -> str:
    """An estimate with its error and unit."""
    return bare(value) + (f" {value.unit}" if value.unit not in ("", "1") else "")


def interval(value: Estimate) -> str:
    """``low to high`` of the 95 % interval; one end alone where the other is open, nothing where both are."""
    low, high = math.isfinite(value.low), math.isfinite(value.high)
    if low and high:
        return f"{number(value.low)} to {number(value.high)}"
    return (
        f"at least {number(value.low)}" if low else f"at most {number(value.high)}" if high else NOT_AVAILABLE
    )


def percent(share: float, digits: int = 2) -> str:
    """A share as a percentage with ``digits`` significant digits, at most whole percents above 100."""
    if not math.isfinite(share):
        return NOT_AVAILABLE
    value = 100 * share
    if value == 0:
        return "0 %"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _minus(f"{value:.{decimals}f}") + " %"


def joined(words: Sequence[str]) -> str:
    """``a, b and c``."""
    return " and ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


def plotly_text(value: str) -> str:
    """Text of a run made safe for Plotly's hover labels, which read a few HTML tags."""
    return html.escape(value, quote=False)


def lr_text(lr: float) -> str:
    """A learning rate, for example ``1 × 10⁻⁴`` written as ``1e-4``."""
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def power_of_ten(exponent: int) -> str:
    """``10⁻⁶`` for -6."""
    return f"10{_power(exponent)}"


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _power(exponent: int) -> str:
    return str(exponent).translate(_SUPERSCRIPTS)
