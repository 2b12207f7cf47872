"""Formulas: a small grammar of plain and LaTeX mathematics, and whether two formulas are the same function.

Equality is decided by values: exact fractions as far as a formula is rational, a hundred digits elsewhere, at
fixed points for the variables (two different rational functions of low degree do not agree at all of them).
A small difference does not vanish as it would in a comparison to fifteen digits: 1/2004! is not 1/2006!.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import factorial, isqrt
from typing import Any

DIGITS, MOST_DIGITS = 100, 300
MAX_DEPTH = 40
MAX_TOKENS = 250
MAX_BITS = 100_000
MAX_POWER = 10_000

Values = dict[str, Fraction]
Term = Callable[[Any, Values], Any]
"""A formula as a function of an arithmetic context and the values of its variables."""

_TOKEN = re.compile(
    r"\s*(?:([0-9]+(?:\.[0-9]+)?|\.[0-9]+)|(\\[A-Za-z]+)|([A-Za-z]+)|(\*\*|[-+*/^!|(){}\[\]_°%,\u0370-\u03ff']))",
    re.ASCII,
)
_LETTERS = """
alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi rho sigma tau
upsilon phi varphi chi psi omega Gamma Delta Theta Lambda Xi Sigma Phi Psi Omega ell
"""
_GREEK = _LETTERS.split()
_FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan",
    "sinh": "sinh", "cosh": "cosh", "tanh": "tanh", "exp": "exp", "ln": "ln", "log": "log", "lg": "log",
    "sqrt": "sqrt", "cbrt": "cbrt", "abs": "fabs",
}  # fmt: skip
_INVERSE = {"sin": "asin", "cos": "acos", "tan": "atan", "sinh": "asinh", "cosh": "acosh", "tanh": "atanh"}
_CONSTANTS = {"pi": "pi", "e": "e", "i": "j"}
_RIGHT = ("\\rvert", "\\rfloor", "\\rceil")
_CLOSERS = {"(": ")", "{": "}", "[": "]"}
_NAMES = sorted([*_FUNCTIONS, *_GREEK, "pi"], key=len, reverse=True)
_LOG_BASE = Fraction(2718281, 1000003)
"""A logarithm without a base may be natural or decimal: it is one of an unknown base, equal to neither."""


class UnreadableError(ValueError):
    """The text is no formula of this grammar."""


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
        parser = _Parser(text)
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
        either = a.imaginary or b.imaginary or _is_real(x, context) or _is_real(y, context)
        (real if either else unreal).append(_close(x, y, context))
    counted = real or unreal
    return bool(counted) and all(counted)


def _pair_at(a: Formula, b: Formula, values: Values) -> tuple[Any, Any, Any]:
    """Two values, to so many digits that a difference of 1 is seen.

    Raises:
        ArithmeticError: they are not finite, or too large for that.
    """
    for digits in (DIGITS, MOST_DIGITS):
        context = _context(digits)
        x, y = a.term(context, values), b.term(context, values)
        if isinstance(x, Fraction) and isinstance(y, Fraction):
            return x, y, context
        size = max(abs(_number(context, x)), abs(_number(context, y)))
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
            ratios.append(_divide(context, x, y))
        except (ArithmeticError, ValueError, TypeError):
            return 0
    context = _context()
    if not all(_is_real(r, context) and _close(ratios[0], r, context) for r in ratios):
        return 0
    return 1 if _real(ratios[0]) > 0 else -1


def _difference(a: Formula, b: Formula) -> Formula:
    return Formula(
        "", _combine(_add, a.term, _negative(b.term)), a.names | b.names, a.imaginary or b.imaginary
    )


def value_of(formula: Formula) -> Fraction | None:
    """The value of a formula of numbers alone that is rational all through; None for any other."""
    if formula.names or formula.imaginary:
        return None
    try:
        value = formula.term(_context(), {})
    except (ArithmeticError, ValueError, TypeError):
        return None
    return value if isinstance(value, Fraction) else None


def nearest(formula: Formula) -> Fraction | None:
    """A fraction near the value of a real formula without variables; None for any other."""
    if formula.names or formula.imaginary:
        return None
    try:
        context = _context()
        value = formula.term(context, {})
        return (
            Fraction(str(context.nstr(_real(_number(context, value)), 20)))
            if _is_real(value, context)
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


def _context(digits: int = DIGITS) -> Any:
    """An arithmetic context of its own for every question: a shared one is not safe in threads."""
    from mpmath.ctx_mp import MPContext

    context = MPContext()
    context.dps = digits
    return context


def _number(context: Any, value: Any) -> Any:
    return context.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value


def _real(value: Any) -> Any:
    return value if isinstance(value, Fraction) else value.real


def _is_real(value: Any, context: Any) -> bool:
    return isinstance(value, Fraction) or abs(value.imag) <= abs(value) * context.mpf(10) ** -60


def _close(a: Any, b: Any, context: Any) -> bool:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    a, b = _number(context, a), _number(context, b)
    scale = max(abs(a), abs(b))
    if scale > 0 and (a == 0 or b == 0):  # round-off leaves about 1e-100 of a zero, and no less
        return bool(-3 * DIGITS < 2 * context.log10(scale) < -1.2 * DIGITS)
    return bool(abs(a - b) <= scale * context.mpf(10) ** (40 - context.dps))


def _add(context: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a + b
    return _number(context, a) + _number(context, b)


def _times(context: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _small(a * b)
    return _number(context, a) * _number(context, b)


def _divide(context: Any, a: Any, b: Any) -> Any:
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return _small(a / b)
    return _number(context, a) / _number(context, b)


def _small(value: Fraction) -> Fraction:
    if value.numerator.bit_length() + value.denominator.bit_length() > 2 * MAX_BITS:
        raise OverflowError
    return value


def _power(context: Any, base: Any, exponent: Any) -> Any:
    if isinstance(exponent, Fraction) and exponent.denominator == 1 and isinstance(base, Fraction):
        bits = base.numerator.bit_length() + base.denominator.bit_length()
        if bits * abs(exponent.numerator) <= MAX_BITS:
            return Fraction(base**exponent.numerator)
    base, exponent = _number(context, base), _number(context, exponent)
    if abs(exponent) > MAX_POWER or (base and abs(context.mag(base)) > MAX_POWER):
        raise OverflowError
    return context.power(base, exponent)


def _call(context: Any, name: str, value: Any) -> Any:
    if name == "fabs" and isinstance(value, Fraction):
        return abs(value)
    if name == "sqrt" and isinstance(value, Fraction) and value >= 0:
        return _root(context, value)
    value = _number(context, value)
    if (
        context.isfinite(value)
        and value
        and context.mag(value) > (20 if name in ("exp", "sinh", "cosh") else 2000)
    ):
        raise OverflowError
    if name == "log":
        return context.ln(value) / context.ln(_number(context, _LOG_BASE))
    return getattr(context, name)(value)


def _root(context: Any, value: Fraction) -> Any:
    """The square root, exactly where it is rational."""
    top, bottom = isqrt(value.numerator), isqrt(value.denominator)
    exact = top * top == value.numerator and bottom * bottom == value.denominator
    return Fraction(top, bottom) if exact else context.sqrt(_number(context, value))


def _factorial(context: Any, value: Any) -> Any:
    if isinstance(value, Fraction) and value.denominator == 1 and 0 <= value <= 5000:
        return Fraction(factorial(value.numerator))
    value = _number(context, value)
    if abs(value) > MAX_POWER:
        raise OverflowError
    return context.factorial(value)


def _binomial(context: Any, n: Any, k: Any) -> Any:
    below = _times(
        context,
        _factorial(context, k),
        _factorial(context, _add(context, n, _times(context, Fraction(-1), k))),
    )
    return _divide(context, _factorial(context, n), below)


class _Parser:
    """Recursive descent; every method returns a term and leaves ``at`` behind what it read."""

    def __init__(self, text: str) -> None:
        self.names: set[str] = set()
        self.imaginary = False
        self.at = 0
        self.bars = 0
        self.tokens: list[str] = []
        at = 0
        text = text.strip()
        while at < len(text):
            match = _TOKEN.match(text, at)
            if match is None:
                raise UnreadableError(text)
            word = match.group(3)
            self.tokens += _letters(word) if word else [match.group().strip()]
            at = match.end()
        if not 0 < len(self.tokens) <= MAX_TOKENS:
            raise UnreadableError(text)

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise UnreadableError(token)

    def finish(self) -> None:
        if self.at != len(self.tokens):
            raise UnreadableError(self.peek())

    def sum(self, depth: int) -> Term:
        """Terms joined by plus and minus."""
        if depth > MAX_DEPTH:
            raise UnreadableError("depth")
        term = self.product(depth)
        while self.peek() in ("+", "-"):
            minus = self.take() == "-"
            term = _combine(_add, term, _negative(self.product(depth)) if minus else self.product(depth))
        return term

    def product(self, depth: int) -> Term:
        """Factors joined by signs or side by side; ``1/2x`` has two meanings and is not read."""
        term, divided = self.signed(depth), False
        while True:
            if self.peek() == "*":
                self.take()
                term = _combine(_times, term, self.signed(depth))
            elif self.peek() == "/":
                self.take()
                term, divided = _combine(_divide, term, self.signed(depth)), True
            elif self.begins_factor():
                number = self.peek()[0] in "0123456789." and self.tokens[self.at - 1] != "!"
                if divided or number:
                    raise UnreadableError("implicit product")
                term = _combine(_times, term, self.power(depth))
            else:
                return term

    def begins_factor(self) -> bool:
        token = self.peek()
        if token == "|" or token in _RIGHT:
            return token == "|" and self.bars == 0
        return bool(token) and (token[0].isalnum() or token[0] in ".\\({[")

    def signed(self, depth: int) -> Term:
        if self.peek() in ("+", "-"):
            return (
                _negative(self.signed(depth + 1))
                if self.take() == "-" and depth < MAX_DEPTH
                else self.signed(depth + 1)
            )
        return self.power(depth)

    def power(self, depth: int) -> Term:
        base = self.postfix(depth)
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.exponent(depth + 1)
            return self.mark(_combine(_power, base, exponent))
        return base

    def exponent(self, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise UnreadableError("depth")
        if self.peek() in ("+", "-"):
            return _negative(self.exponent(depth + 1)) if self.take() == "-" else self.exponent(depth + 1)
        return self.power(depth)

    def postfix(self, depth: int) -> Term:
        return self.mark(self.atom(depth))

    def mark(self, term: Term) -> Term:
        """Factorial, degree and percent signs behind a factor."""
        while self.peek() in ("!", "°", "%"):
            sign = self.take()
            if sign == "!" and self.peek() == "!":
                raise UnreadableError("!!")
            term = {"!": _apply(_factorial), "°": _degrees, "%": _percent}[sign](term)
        return term

    def group(self, depth: int) -> Term:
        """A bracket and what it holds."""
        closer = _CLOSERS[self.take()]
        bars, self.bars = self.bars, 0
        term = self.sum(depth + 1)
        self.bars = bars
        self.expect(closer)
        return term

    def braced(self, depth: int) -> Term:
        """An argument in braces, or the next digit or letter."""
        if self.peek() == "{":
            return self.group(depth)
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = list(token)
        return self.atom(depth)

    def atom(self, depth: int) -> Term:
        if depth > MAX_DEPTH:
            raise UnreadableError("depth")
        token = self.peek()
        if token in _CLOSERS:
            return self.group(depth)
        if token == "|":
            self.take()
            self.bars += 1
            inner = self.sum(depth + 1)
            self.bars -= 1
            self.expect("|")
            return _function("fabs", inner)
        self.take()
        if not token:
            raise UnreadableError("end")
        if token[0].isdigit() or token[0] == ".":
            return _constant(Fraction(token))
        name = token.removeprefix("\\")
        if name == "frac" and token != name:
            top = self.braced(depth + 1)
            return _combine(_divide, top, self.braced(depth + 1))
        if name == "binom" and token != name:
            top = self.braced(depth + 1)
            return _combine(_binomial, top, self.braced(depth + 1))
        if name in ("lvert", "lfloor", "lceil") and token != name:
            inner = self.sum(depth + 1)
            self.expect({"lvert": "\\rvert", "lfloor": "\\rfloor", "lceil": "\\rceil"}[name])
            return _function({"lvert": "fabs", "lfloor": "floor", "lceil": "ceil"}[name], inner)
        if name in _FUNCTIONS:
            return self.function(name, depth + 1)
        if name in _CONSTANTS:
            self.imaginary |= name == "i"
            return _named(_CONSTANTS[name])
        if name == "infty" and token != name:
            raise UnreadableError(name)
        return self.variable(token, name)

    def variable(self, token: str, name: str) -> Term:
        """A letter, with its index and primes; a Greek one by its name."""
        if "\u0370" <= name <= "\u03ff" and len(name) == 1:
            name = unicodedata.name(name, "?").rpartition(" ")[2].lower().replace("lamda", "lambda")
            name = name.capitalize() if token.isupper() else name
        if not (len(name) == 1 or name in _GREEK) or not name.isalpha():
            raise UnreadableError(token)
        if name in "fghPFG" and self.peek() == "(":
            raise UnreadableError("a function of the question")
        if self.peek() == "_":
            self.take()
            index = self.take()
            if index == "{":
                index = ""
                while self.peek() not in ("}", ""):
                    index += self.take()
                self.expect("}")
            if not index or index[0] in "^_(":
                raise UnreadableError("index")
            name += "_" + index
        while self.peek() == "'":
            name += self.take()
        self.names.add(name)
        return lambda context, values: values[name]

    def function(self, name: str, depth: int) -> Term:
        """A function, its power or base, and its argument, which may stand without brackets."""
        called, outer, base = _FUNCTIONS[name], None, None
        if name == "sqrt" and self.peek() == "[":
            degree = self.group(depth)
            return _combine(_power, self.argument(depth), _combine(_divide, _constant(Fraction(1)), degree))
        if self.peek() == "_" and called == "log":
            self.take()
            base = self.braced(depth)
        if self.peek() == "^":
            self.take()
            if self.tokens[self.at : self.at + 4] == ["{", "-", "1", "}"] and called in _INVERSE:
                self.at += 4
                called = _INVERSE[called]
            else:
                outer = self.braced(depth)
        term = self.argument(depth)
        if base is None:
            term = _function(called, term)
        else:
            term = _combine(_divide, _function("ln", term), _function("ln", base))
        return term if outer is None else _combine(_power, term, outer)

    def argument(self, depth: int) -> Term:
        if self.peek() in _CLOSERS or self.peek() == "|":
            return self.atom(depth)
        term = self.power(depth)
        while self.begins_factor() and self.peek() not in ("(", "[", "|"):
            token = self.peek().removeprefix("\\")
            if token in _FUNCTIONS or token in ("frac", "binom") or token[0].isdigit():
                break
            term = _combine(_times, term, self.power(depth))
        return term


def _letters(word: str) -> list[str]:
    """A run of letters as function and letter names; refused where it looks like a word."""
    found = []
    rest = word
    while rest:
        name = next(
            (n for n in _NAMES if rest.startswith(n) and (n == word or n in _FUNCTIONS or n == "pi")), rest[0]
        )
        found.append(name)
        rest = rest[len(name) :]
    if sum(len(n) == 1 for n in found) > 3:
        raise UnreadableError(word)
    return found


def _combine(operation: Callable[[Any, Any, Any], Any], a: Term, b: Term) -> Term:
    return lambda context, values: operation(context, a(context, values), b(context, values))


def _apply(operation: Callable[[Any, Any], Any]) -> Callable[[Term], Term]:
    return lambda term: lambda context, values: operation(context, term(context, values))


def _function(name: str, term: Term) -> Term:
    return lambda context, values: _call(context, name, term(context, values))


def _negative(term: Term) -> Term:
    return _combine(_times, _constant(Fraction(-1)), term)


def _constant(value: Fraction) -> Term:
    return lambda context, values: value


def _named(name: str) -> Term:
    return lambda context, values: +getattr(context, name)


def _degrees(term: Term) -> Term:
    return _combine(_times, term, _combine(_divide, _named("pi"), _constant(Fraction(180))))


def _percent(term: Term) -> Term:
    return _combine(_times, term, _constant(Fraction(1, 100)))
