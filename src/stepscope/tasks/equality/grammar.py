"""A small grammar of plain and LaTeX mathematics: from a text to a term and its variables."""

from __future__ import annotations

import re
import unicodedata
from fractions import Fraction

from stepscope.tasks.equality import arithmetic as ar
from stepscope.tasks.equality.arithmetic import Term

MAX_DEPTH = 40
MAX_TOKENS = 250

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


class UnreadableError(ValueError):
    """The text is no formula of this grammar."""


class Parser:
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
        """The next token, empty at the end."""
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        """The next token, read."""
        token = self.peek()
        self.at += 1
        return token

    def expect(self, token: str) -> None:
        """Read this token."""
        if self.take() != token:
            raise UnreadableError(token)

    def finish(self) -> None:
        """Refuse what is left over."""
        if self.at != len(self.tokens):
            raise UnreadableError(self.peek())

    def sum(self, depth: int) -> Term:
        """Terms joined by plus and minus."""
        if depth > MAX_DEPTH:
            raise UnreadableError("depth")
        term = self.product(depth)
        while self.peek() in ("+", "-"):
            minus = self.take() == "-"
            term = ar.combine(
                ar.add, term, ar.negative(self.product(depth)) if minus else self.product(depth)
            )
        return term

    def product(self, depth: int) -> Term:
        """Factors joined by signs or side by side; ``1/2x`` has two meanings and is not read."""
        term, divided = self.signed(depth), False
        while True:
            if self.peek() == "*":
                self.take()
                term = ar.combine(ar.times, term, self.signed(depth))
            elif self.peek() == "/":
                self.take()
                term, divided = ar.combine(ar.divide, term, self.signed(depth)), True
            elif self.begins_factor():
                number = self.peek()[0] in "0123456789." and self.tokens[self.at - 1] != "!"
                if divided or number:
                    raise UnreadableError("implicit product")
                term = ar.combine(ar.times, term, self.power(depth))
            else:
                return term

    def begins_factor(self) -> bool:
        """Whether the next token begins a factor that is multiplied without a sign."""
        token = self.peek()
        if token == "|" or token in _RIGHT:
            return token == "|" and self.bars == 0
        return bool(token) and (token[0].isalnum() or token[0] in ".\\({[")

    def signed(self, depth: int) -> Term:
        """A factor with signs before it."""
        if self.peek() in ("+", "-"):
            return (
                ar.negative(self.signed(depth + 1))
                if self.take() == "-" and depth < MAX_DEPTH
                else self.signed(depth + 1)
            )
        return self.power(depth)

    def power(self, depth: int) -> Term:
        """A factor and its exponent."""
        base = self.postfix(depth)
        if self.peek() in ("^", "**"):
            self.take()
            exponent = self.exponent(depth + 1)
            return self.mark(ar.combine(ar.power, base, exponent))
        return base

    def exponent(self, depth: int) -> Term:
        """An exponent, with signs before it."""
        if depth > MAX_DEPTH:
            raise UnreadableError("depth")
        if self.peek() in ("+", "-"):
            return ar.negative(self.exponent(depth + 1)) if self.take() == "-" else self.exponent(depth + 1)
        return self.power(depth)

    def postfix(self, depth: int) -> Term:
        """An atom and the signs behind it."""
        return self.mark(self.atom(depth))

    def mark(self, term: Term) -> Term:
        """Factorial, degree and percent signs behind a factor."""
        while self.peek() in ("!", "°", "%"):
            sign = self.take()
            if sign == "!" and self.peek() == "!":
                raise UnreadableError("!!")
            term = {"!": ar.apply(ar.factorial), "°": ar.degrees, "%": ar.percent}[sign](term)
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
        """A number, a name, a bracket, a function or a fraction."""
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
            return ar.function("fabs", inner)
        self.take()
        if not token:
            raise UnreadableError("end")
        if token[0].isdigit() or token[0] == ".":
            return ar.constant(Fraction(token))
        name = token.removeprefix("\\")
        if name == "frac" and token != name:
            top = self.braced(depth + 1)
            return ar.combine(ar.divide, top, self.braced(depth + 1))
        if name == "binom" and token != name:
            top = self.braced(depth + 1)
            return ar.combine(ar.binomial, top, self.braced(depth + 1))
        if name in ("lvert", "lfloor", "lceil") and token != name:
            inner = self.sum(depth + 1)
            self.expect({"lvert": "\\rvert", "lfloor": "\\rfloor", "lceil": "\\rceil"}[name])
            return ar.function({"lvert": "fabs", "lfloor": "floor", "lceil": "ceil"}[name], inner)
        if name in _FUNCTIONS:
            return self.function(name, depth + 1)
        if name in _CONSTANTS:
            self.imaginary |= name == "i"
            return ar.named(_CONSTANTS[name])
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
            return ar.combine(
                ar.power, self.argument(depth), ar.combine(ar.divide, ar.constant(Fraction(1)), degree)
            )
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
            term = ar.function(called, term)
        else:
            term = ar.combine(ar.divide, ar.function("ln", term), ar.function("ln", base))
        return term if outer is None else ar.combine(ar.power, term, outer)

    def argument(self, depth: int) -> Term:
        """What a function without brackets is applied to."""
        if self.peek() in _CLOSERS or self.peek() == "|":
            return self.atom(depth)
        term = self.power(depth)
        while self.begins_factor() and self.peek() not in ("(", "[", "|"):
            token = self.peek().removeprefix("\\")
            if token in _FUNCTIONS or token in ("frac", "binom") or token[0].isdigit():
                break
            term = ar.combine(ar.times, term, self.power(depth))
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
