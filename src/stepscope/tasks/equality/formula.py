"""Formulas, and whether two of them are the same function.

Equality is decided by values: exact fractions as far as a formula is rational, a hundred digits elsewhere, at
fixed points for the variables (two different rational functions of low degree do not agree at all of them).
A small difference does not vanish as it would in a comparison to fifteen digits: 1/2004! is not 1/2006!.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from stepscope.tasks.equality import arithmetic as ar
from stepscope.tasks.equality.arithmetic import DIGITS, MOST_DIGITS, Term, Values
from stepscope.tasks.equality.grammar import Parser, UnreadableError


@dataclass(frozen=True)
class Formula:
    """A readable formula.

    Attributes:
        text: as written.
        term: its value as a function of the variables.
        names: its variables.
        imaginary: the imaginary unit stands in it.
    """

    text: str
    term: Term
    names: frozenset[str]
    imaginary: bool


@functools.lru_cache(maxsize=4096)
def read_formula(text: str) -> Formula | None:
    """Read a whole text as a formula; None if any of it is something else."""
    try:
        parser = Parser(text)
        term = parser.sum(0)
        parser.finish()
    except UnreadableError:
        return None
    return Formula(text, term, frozenset(parser.names), parser.imaginary)


def same_formula(a: Formula, b: Formula) -> bool:
    """Whether two formulas have equal values wherever both are real (or everywhere, if nowhere real)."""
    names = a.names | b.names
    real: list[bool] = []
    unreal: list[bool] = []
    for values in _points(names):
        try:
            x, y, context = _pair_at(a, b, values)
        except (ArithmeticError, ValueError, TypeError):
            continue
        either = a.imaginary or b.imaginary or ar.is_real(x, context) or ar.is_real(y, context)
        (real if either else unreal).append(ar.close(x, y, context))
    counted = real or unreal
    return bool(counted) and all(counted)


def _pair_at(a: Formula, b: Formula, values: Values) -> tuple[Any, Any, Any]:
    """Two values, to so many digits that a difference of 1 is seen.

    Raises:
        ArithmeticError: they are not finite, or too large for that.
    """
    for digits in (DIGITS, MOST_DIGITS):
        context = ar.context(digits)
        x, y = a.term(context, values), b.term(context, values)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x, y, context
        size = max(abs(ar.number(context, x)), abs(ar.number(context, y)))
        if not context.isfinite(size) or size > context.mpf(10) ** (MOST_DIGITS - 70):
            break
        if size < context.mpf(10) ** (digits - 70):
            return x, y, context
    raise OverflowError


def proportional(a: tuple[Formula, Formula], b: tuple[Formula, Formula]) -> int:
    """Sign of the constant c with (a0 - a1) = c (b0 - b1) whatever the variables; 0 if there is none."""
    ratios: list[Any] = []
    top, bottom = _difference(*a), _difference(*b)
    for values in _points(top.names | bottom.names):
        try:
            x, y, context = _pair_at(top, bottom, values)
            if x == 0 or y == 0:
                return 0
            ratios.append(ar.divide(context, x, y))
        except (ArithmeticError, ValueError, TypeError):
            return 0
    context = ar.context()
    if not all(ar.is_real(r, context) and ar.close(ratios[0], r, context) for r in ratios):
        return 0
    return 1 if ar.real(ratios[0]) > 0 else -1


def _difference(a: Formula, b: Formula) -> Formula:
    return Formula(
        "", ar.combine(ar.add, a.term, ar.negative(b.term)), a.names | b.names, a.imaginary or b.imaginary
    )


def value_of(formula: Formula) -> Fraction | None:
    """The value of a formula of numbers alone that is rational all through; None for any other."""
    if formula.names or formula.imaginary:
        return None
    try:
        value = formula.term(ar.context(), {})
    except (ArithmeticError, ValueError, TypeError):
        return None
    return value if isinstance(value, Fraction) else None


def nearest(formula: Formula) -> Fraction | None:
    """A fraction near the value of a real formula without variables; None for any other."""
    if formula.names or formula.imaginary:
        return None
    try:
        context = ar.context()
        value = formula.term(context, {})
        return (
            Fraction(str(context.nstr(ar.real(ar.number(context, value)), 20)))
            if ar.is_real(value, context)
            else None
        )
    except (ArithmeticError, ValueError, TypeError):
        return None


def _points(names: frozenset[str]) -> list[Values]:
    """Fixed values of the variables: three positive, three of mixed signs; one point without variables."""
    if not names:
        return [{}]
    ordered, points = sorted(names), []
    for k in range(6):
        values = {}
        for j, name in enumerate(ordered):
            value = Fraction(7919 * (j + 2) * (k + 3) % 1009 + 211, 607 - 53 * k + 2 * j)
            values[name] = -value if k >= 3 and (j + k) % 2 else value
        points.append(values)
    return points
