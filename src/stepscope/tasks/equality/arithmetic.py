"""Arithmetic of formulas: exact fractions as far as a value is rational, a hundred digits elsewhere.

A *term* is a function of an mpmath context and the values of the variables. Where there is no value, or none
small enough to be computed, an operation raises an ArithmeticError, ValueError or TypeError.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

DIGITS, MOST_DIGITS = 100, 300
MAX_BITS = 100_000
MAX_POWER = 10_000

Values = dict[str, Fraction]
Term = Callable[[Any, Values], Any]
"""A formula as a function of an arithmetic context and the values of its variables."""

_LOG_BASE = Fraction(2718281, 1000003)
"""A logarithm without a base may be natural or decimal: it is one of an unknown base, equal to neither."""


def context(digits: int = DIGITS) -> Any:
    """An arithmetic context of its own for every question: a shared one is not safe in threads."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = digits
    return context


def number(context: Any, value: Any) -> Any:
    """A fraction as a number of the context."""
    return context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def real(value: Any) -> Any:
    """The real part."""
    return value if isinstance(value, Fraction) else value.real


def is_real(value: Any, context: Any) -> bool:
    """Whether a value is real to sixty digits."""
    return isinstance(value, Fraction) or abs(value.imag) <= abs(value) * context.mpf(10) ** -60


def close(a: Any, b: Any, context: Any) -> bool:
    """Whether two values are equal: exactly as fractions, else but for round-off."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = number(context, a), number(context, b)
    scale = max(abs(a), abs(b))
    if scale > 0 and (a == 0 or b == 0):  # round-off leaves about 1e-100 of a zero, and no less
        return bool(-3 * DIGITS < 2 * context.log10(scale) < -1.2 * DIGITS)
    return bool(abs(a - b) <= scale * context.mpf(10) ** (40 - context.dps))


def add(context: Any, a: Any, b: Any) -> Any:
    """A + b."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    return number(context, a) + number(context, b)


def times(context: Any, a: Any, b: Any) -> Any:
    """A b."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return small(a * b)
    return number(context, a) * number(context, b)


def divide(context: Any, a: Any, b: Any) -> Any:
    """A / b."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return small(a / b)
    return number(context, a) / number(context, b)


def small(value: Fraction) -> Fraction:
    """The fraction itself, if it can still be computed with."""
    if value.numerator.bit_length() + value.denominator.bit_length() > 2 * MAX_BITS:
        raise OverflowError
    return value


def power(context: Any, base: Any, exponent: Any) -> Any:
    """A base to an exponent, exactly where both are rational and it stays small."""
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if bits * abs(exponent.numerator) <= MAX_BITS:
            return Fraction(base**exponent.numerator)
    base, exponent = number(context, base), number(context, exponent)
    if abs(exponent) > MAX_POWER or (base and abs(context.mag(base)) > MAX_POWER):
        raise OverflowError
    return context.power(base, exponent)


def call(context: Any, name: str, value: Any) -> Any:
    """A function by mpmath's name."""
    if name == "fabs" and isinstance(value, Fraction):
        return abs(value)
    if name == "sqrt" and isinstance(value, Fraction) and value >= 0:
        return root(context, value)
    value = number(context, value)
    if (
        context.isfinite(value)
        and value
        and context.mag(value) > (20 if name in ("exp", "sinh", "cosh") else 2000)
    ):
        raise OverflowError
    if name == "log":
        return context.ln(value) / context.ln(number(context, _LOG_BASE))
    return getattr(context, name)(value)


def root(context: Any, value: Fraction) -> Any:
    """The square root, exactly where it is rational."""
    top, bottom = math.isqrt(value.numerator), math.isqrt(value.denominator)
    exact = top * top == value.numerator and bottom * bottom == value.denominator
    return Fraction(top, bottom) if exact else context.sqrt(number(context, value))


def factorial(context: Any, value: Any) -> Any:
    """n!, exactly for whole numbers; the gamma function elsewhere."""
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 5000:
        return Fraction(math.factorial(value.numerator))
    value = number(context, value)
    if abs(value) > MAX_POWER:
        raise OverflowError
    return context.factorial(value)


def binomial(context: Any, n: Any, k: Any) -> Any:
    """N over k."""
    below = times(
        context,
        factorial(context, k),
        factorial(context, add(context, n, times(context, Fraction(-1), k))),
    )
    return divide(context, factorial(context, n), below)


def combine(operation: Callable[[Any, Any, Any], Any], a: Term, b: Term) -> Term:
    """The term of an operation on two terms."""
    return lambda context, values: operation(context, a(context, values), b(context, values))


def apply(operation: Callable[[Any, Any], Any]) -> Callable[[Term], Term]:
    """From an operation on one value to one on terms."""
    return lambda term: lambda context, values: operation(context, term(context, values))


def function(name: str, term: Term) -> Term:
    """The term of a function by mpmath's name."""
    return lambda context, values: call(context, name, term(context, values))


def negative(term: Term) -> Term:
    """The term with its sign turned."""
    return combine(times, constant(Fraction(-1)), term)


def constant(value: Fraction) -> Term:
    """The term of a number."""
    return lambda context, values: value


def named(name: str) -> Term:
    """The term of a constant by mpmath's name."""
    return lambda context, values: +getattr(context, name)


def degrees(term: Term) -> Term:
    """An angle in degrees."""
    return combine(times, term, combine(divide, named("pi"), constant(Fraction(180))))


def percent(term: Term) -> Term:
    """A hundredth."""
    return combine(times, term, constant(Fraction(1, 100)))
