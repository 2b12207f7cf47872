"""What an answer is: its kinds, and how a whole text is sorted into one of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from stepscope.tasks.equality.formula import Formula, nearest, read_formula, value_of
from stepscope.tasks.equality.moments import Moment, Ratio, read_moment, read_ratio
from stepscope.tasks.equality.numbers import Number
from stepscope.tasks.equality.quantities import Quantity, read_quantities, read_quantity
from stepscope.tasks.equality.units import Unit, read_unit

MAX_PARTS = 64
MAX_DEPTH = 6


@dataclass(frozen=True)
class Choice:
    """A letter of a multiple choice, with the text that stands behind it."""

    letter: str
    text: str = ""


@dataclass(frozen=True)
class Infinite:
    """Plus or minus infinity."""

    sign: int


@dataclass(frozen=True)
class Parts:
    """Several answers side by side.

    Attributes:
        items: the parts.
        joiner: ``,`` where the order counts; ``and``, ``or`` where it does not.
    """

    items: tuple[Value, ...]
    joiner: Literal[",", "and", "or"]


@dataclass(frozen=True)
class Bracket:
    """A tuple, point, interval, list or set by its brackets, or a matrix of rows (``[[``)."""

    opener: str
    closer: str
    items: tuple[Value, ...]


@dataclass(frozen=True)
class Labelled:
    """A name and what it stands for: ``x = 5``, ``f(2) = 5``, ``D = (0, 1)``."""

    label: str
    value: Value


@dataclass(frozen=True)
class Measured:
    r"""A formula and its unit: ``12\pi cm^2``."""

    formula: Formula
    unit: Unit


@dataclass(frozen=True)
class Relation:
    """A chain of formulas with signs between them: ``x > 3``, ``>= 5``, ``1 < x < 2``, ``3x - y = 4``."""

    sides: tuple[Value | None, ...]
    signs: tuple[str, ...]


@dataclass(frozen=True)
class Words:
    """A text that is none of the other kinds, without regard to case and spaces."""

    text: str


Value = (
    Number | Infinite | Quantity | Choice | Parts | Bracket | Labelled | Relation | Moment | Ratio | Formula
    | Measured | Words
)  # fmt: skip

_CHOICE = re.compile(
    r"(?:(?:option|choice|answer)\s+)?(?:[(\[]\s*([A-J])\s*[)\]](?=\s|$|[.:])|([A-J])(?:\s*[.):](?=\s|$)|\s+-(?=\s+[A-Za-z]{3})|$))\s*[.:]?\s*(.*)",
    re.DOTALL | re.IGNORECASE,
)
SIGN = re.compile(r"<=|>=|!=|==|<|>|=|\\in(?![A-Za-z])|\\to(?![A-Za-z])")
_LABEL = re.compile(
    r"(?:[A-Za-z\u0370-\u03ff]|\\[A-Za-z]+)(?:_(?:\{[^{}]*\}|[A-Za-z0-9]))?'*(?:\s*\([^()=]{0,40}\))?"
    r"|[A-Z]{2,3}|[A-Za-z]{4,20}|\(\s*[a-z](?:\s*,\s*[a-z]){1,3}\s*\)|\\angle\s*[A-Z]{1,3}"
)
_NO_LABEL = re.compile(r"\\?(?:sin|cos|tan|log|ln|exp|sqrt|frac|pm|infty|pi|emptyset)(?![A-Za-z]).*|[ei]")
_MATRIX = re.compile(r"\\begin\s*\{([pbBv]?matrix|array)\}(?:\s*\{[clr|]*\})?(.*)\\end\s*\{\1\}", re.DOTALL)
_COMPARED = (
    (re.compile(r"(?:greater than or equal to)\s+", re.I), ">="),
    (re.compile(r"(?:less than or equal to)\s+", re.I), "<="),
    (re.compile(r"(?:at least|no less than|no fewer than|not less than)\s+", re.I), ">="),
    (re.compile(r"(?:at most|no more than|not more than|up to)\s+", re.I), "<="),
    (re.compile(r"(?:more than|greater than|larger than)\s+", re.I), ">"),
    (re.compile(r"(?:less than|fewer than|smaller than)\s+", re.I), "<"),
)
_OPEN_ENDED = re.compile(
    r"(.+?) (?:or|and) (?:(more|greater|above|over|higher)|less|fewer|below|under|lower)", re.I
)
_RESTATED = re.compile(r"([^()]+?)\s*\(([^()]+)\)")
_SUCH_THAT = re.compile(
    r"\{\s*([a-z])\s*(?:\\in\s*(?:\\mathbb\s*(?:\{R\}|R)|R)\s*)?(?::|\||\\mid(?![A-Za-z]))\s*([^{}]+)\}"
)
_FRENCH = re.compile(r"([\[\]])([^\[\]()]+)([\[\]])")
_AND = re.compile(r",?\s+(?:and|&|und|et|и)\s+|\s*和\s*", re.I)
_OR = re.compile(r",?\s+(?:or|oder|ou|или)\s+|\s*或\s*", re.I)
_INFINITE = re.compile(r"([+-]?)\s*\\infty")
_ONLY_LETTERS = re.compile(r"[A-Za-z\s.,']*")
_PRODUCT = re.compile(r"[A-Za-z]|(?=[a-z]*[xyz])[b-df-hj-np-tv-z]{2,3}")
_CHEMICAL = re.compile(
    r"(?=[^0-9]+[0-9])(?=.*[A-Z].*[A-Z]|[A-Z][a-z]?_?\{?2\}?$)(?:[A-Z][a-z]?(?:_?[0-9]{1,2}|_\{[0-9]{1,2}\})?\s?)+"
)
_HYPHENS = re.compile(r"([0-9]+)-([0-9]+)((?:-[0-9]+)*)", re.ASCII)
_SLASHES = re.compile(r"[0-9]+(?:/[0-9]+){2,}", re.ASCII)


def classify(text: str, depth: int = 0) -> Value:
    """The kind of a text that :func:`~stepscope.tasks.equality.text.tidy` has laid out."""
    text = text.strip()
    if depth > MAX_DEPTH:
        return Words(plain(text))
    return _choice(text) or _value(text, depth) or Words(plain(text))


def plain(text: str) -> str:
    """Words without regard to case, spaces, articles at the start and marks at the end."""
    text = _HYPHENS.sub(r"\1–\2\3", text) if _HYPHENS.fullmatch(text) else text
    text = re.sub(r"_\{([^{}]*)\}", r"_\1", text)
    if _CHEMICAL.fullmatch(text):
        text = re.sub(r"[_ ]", "", text)
    words = " ".join(text.split()).casefold().strip(" .!?,;:\"'")
    return re.sub(r"^(?:the|an?)\s+(?=\w\w)", "", words)


def split_top(text: str, pattern: re.Pattern[str]) -> list[str]:
    """Pieces between the matches that stand in no bracket."""
    pieces, last, depth, at = [], 0, 0, 0
    starts = {m.start(): m.end() for m in pattern.finditer(text)}
    while at < len(text):
        if depth == 0 and at in starts:
            pieces.append(text[last:at])
            at = last = starts[at]
            continue
        depth += (text[at] in "([{") - (text[at] in ")]}")
        at += 1
    return [*pieces, text[last:]]


def _value(text: str, depth: int) -> Value | None:
    text = _without_brackets(text)
    if match := _RESTATED.fullmatch(text):  # `42 (forty-two)`
        once, again = (read_quantity(g.strip()) for g in match.groups())
        if isinstance(again, Number) and once == again:
            return once
    if (match := _FRENCH.fullmatch(text)) and match.groups()[::2] != ("[", "]"):
        text = "(["[match.group(1) == "["] + match.group(2) + ")]"[match.group(3) == "]"]
    exact, *rounded = split_top(text, re.compile(r"\\approx(?![A-Za-z])|≈"))
    if (
        len(rounded) == 1
        and exact.strip()
        and _is_rounding(found := _formula(exact.strip()), read_quantity(rounded[0].strip()))
    ):
        return found
    if match := _SUCH_THAT.fullmatch(text):
        condition = classify(match.group(2), depth + 1)
        return condition if isinstance(condition, Relation) and match.group(1) in match.group(2) else None
    if match := _INFINITE.fullmatch(text):
        return Infinite(-1 if match.group(1) == "-" else 1)
    simple = read_moment(text) or read_quantity(text) or read_ratio(text) or read_quantities(text)
    if simple is not None:
        return simple
    if match := _OPEN_ENDED.fullmatch(text):
        bound = read_quantity(match.group(1))
        return None if bound is None else Relation((None, bound), (">=" if match.group(2) else "<=",))
    for pattern, sign in _COMPARED:
        if match := pattern.match(text):
            return Relation((None, classify(text[match.end() :], depth + 1)), (sign,))
    return (
        _matrix(text, depth)
        or _parts(text, depth)
        or _relation(text, depth)
        or _signs(text, depth)
        or _bracket(text, depth)
        or _measured(text)
        or _formula(text)
    )


def _is_rounding(exact: Number | Formula | None, rounded: Number | Quantity | None) -> bool:
    """Whether a decimal behind a sign of approximation is within a hundredth of the value before it."""
    value = exact.value if isinstance(exact, Number) else None if exact is None else nearest(exact)
    if value is None or not isinstance(rounded, Number):
        return False
    return abs(value - rounded.value) * 100 <= abs(value)


def _measured(text: str) -> Measured | Quantity | None:
    """Figures and what they are measured in; no variables, which could not be told from units."""
    for space in list(re.finditer(r"\s+", text))[-5:]:
        unit = read_unit(text[space.end() :])
        if unit is None or unit.single:
            continue
        figures = _formula(text[: space.start()])
        if isinstance(figures, Number):
            return Quantity(figures, unit)
        if figures is not None and not figures.names:
            return Measured(figures, unit)
    return None


def _choice(text: str) -> Choice | None:
    match = _CHOICE.fullmatch(text)
    if match is None:
        return None
    behind = match.group(3)
    if behind and (behind[0] in "+*/^=<>!_|,;)" or _AND.match(" " + behind) or _OR.match(" " + behind)):
        return None
    return Choice((match.group(1) or match.group(2)).upper(), behind)


def _without_brackets(text: str) -> str:
    """The inside of round brackets that hold the whole text and no comma."""
    while text.startswith("(") and text.endswith(")") and "," not in text and ";" not in text:
        if len(split_top(text[1:-1], re.compile(r"\)"))) > 1 or not text[1:-1].strip():
            break
        inner = text[1:-1].strip()
        if inner.count("(") != inner.count(")"):
            break
        text = inner
    return text


def _matrix(text: str, depth: int) -> Bracket | None:
    match = _MATRIX.fullmatch(text)
    if match is None:
        return None
    rows = [row for row in match.group(2).split("\n") if row.strip()]
    if len(rows) > MAX_PARTS:
        return None
    cells = [tuple(classify(cell, depth + 1) for cell in row.split("&")) for row in rows]
    name = "|" if match.group(1) == "vmatrix" else "[["
    return Bracket(name, name, tuple(Bracket("[", "]", row) for row in cells))


def _parts(text: str, depth: int) -> Parts | None:
    joiner: Literal[",", "and", "or"] = ","
    pieces = split_top(text, _OR)
    if len(pieces) > 1:
        joiner = "or"
    else:
        pieces = split_top(text, _AND)
        joiner = "and" if len(pieces) > 1 else ","
    listed: list[str] = []
    for piece in pieces:
        commas = split_top(piece, re.compile(r"\s*(?:;|\n|,(?=\s))\s*"))
        listed += commas if len(commas) > 1 else _at_commas(piece)
    if joiner == "and" and len(listed) > len(pieces):
        joiner = ","
    listed = [piece for piece in listed if piece.strip()]
    if len(listed) < 2 or len(listed) > MAX_PARTS:
        return None
    items = [classify(piece, depth + 1) for piece in listed]
    if isinstance(items[0], Labelled) and not any(isinstance(i, (Labelled, Relation)) for i in items[1:]):
        return _hoisted(items[0], items[1:], joiner)
    return Parts(tuple(_flat(items, joiner)), joiner)


def at_every_comma(text: str) -> Parts:
    """A list whose numbers look like one grouped number: ``100,200,300``."""
    return Parts(tuple(classify(piece, 1) for piece in split_top(text, re.compile(","))), ",")


def _at_commas(piece: str) -> list[str]:
    return [piece] if read_quantity(piece.strip()) else split_top(piece, re.compile(","))


def _flat(items: list[Value], joiner: str) -> list[Value]:
    """Nested lists of the same kind opened."""
    found: list[Value] = []
    for item in items:
        found += item.items if isinstance(item, Parts) and item.joiner == joiner else (item,)
    return found


def _hoisted(first: Labelled, rest: list[Value], joiner: Literal[",", "and", "or"]) -> Parts:
    """``x = 1, 2`` gives every part its name."""
    return Parts((first, *(Labelled(first.label, item) for item in rest)), joiner)


def _relation(text: str, depth: int) -> Value | None:
    sides = split_top(text, SIGN)
    if len(sides) < 2:
        return None
    signs = tuple(_signs_between(text, sides))
    if all(s in ("=", "\\in", "\\to") for s in signs) and _is_label(sides[0].strip()):
        rest = text[text.index(sides[0]) + len(sides[0]) + len(signs[0]) :]
        inner = classify(rest, depth + 1)
        return Labelled(re.sub(r"\s", "", sides[0]), inner) if rest.strip() else None
    if signs == ("=",) and _is_label(sides[1].strip()):
        figure = read_quantity(sides[0].strip())
        if isinstance(figure, Number):
            return Labelled(re.sub(r"\s", "", sides[1]), figure)
    if len(sides) > 5 or "\\to" in signs or "\\in" in signs:
        return None
    values = tuple(_side(side) if side.strip() else None for side in sides)
    if any(v is None and (i or sides[i].strip()) for i, v in enumerate(values)):
        return None
    if all(s == "=" for s in signs) and isinstance(values[0], Number):
        numbers = {v.value if isinstance(v, Number) else None for v in values}
        return values[0] if len(numbers) == 1 and None not in numbers else Relation(values, signs)
    return Relation(values, signs)


def _signs_between(text: str, sides: list[str]) -> list[str]:
    found, at = [], 0
    for side in sides[:-1]:
        match = SIGN.match(text, at + len(side))
        assert match is not None
        found.append("=" if match.group() == "==" else match.group())
        at = match.end()
    return found


def _is_label(text: str) -> bool:
    return _LABEL.fullmatch(text) is not None and _NO_LABEL.fullmatch(text) is None


def _side(text: str) -> Value | None:
    """A side of a relation: a number, a quantity, infinity or a formula."""
    text = text.strip()
    if match := _INFINITE.fullmatch(text):
        return Infinite(-1 if match.group(1) == "-" else 1)
    return read_quantity(text) or _formula(text)


def _signs(text: str, depth: int) -> Parts | None:
    r"""``\pm`` gives two parts, a union its members."""
    members = split_top(text, re.compile(r"\s*\\cup(?![A-Za-z])\s*|(?<=[)\]])\s*U\s*(?=[(\[])"))
    if 1 < len(members) <= MAX_PARTS:
        return Parts(tuple(classify(member, depth + 1) for member in members), "or")
    pair = re.compile(r"\\pm(?![A-Za-z])|\\mp(?![A-Za-z])")
    if not pair.search(text) or text.count("(") != text.count(")"):
        return None
    upper = pair.sub(lambda m: "+" if m.group() == "\\pm" else "-", text)
    lower = pair.sub(lambda m: "-" if m.group() == "\\pm" else "+", text)
    return Parts((classify(upper, depth + 1), classify(lower, depth + 1)), "or")


def _bracket(text: str, depth: int) -> Bracket | None:
    if re.fullmatch(r"\\mathbb\s*\{?R\}?|(?:all|the set of (?:all )?) ?real numbers", text, re.IGNORECASE):
        return Bracket("(", ")", (Infinite(-1), Infinite(1)))
    if re.fullmatch(r"\\emptyset|(?:the )?(?:empty|null) set", text, re.IGNORECASE):
        return Bracket("{", "}", ())
    if len(text) < 2 or text[0] not in "([{" or text[-1] not in ")]}":
        return None
    inner = text[1:-1]
    level = 0
    for character in inner:
        level += (character in "([{") - (character in ")]}")
        if level < 0:
            return None
    pieces = split_top(inner, re.compile("[,;]"))
    if level or len(pieces) > MAX_PARTS or (len(pieces) == 1 and text[0] == "("):
        return None
    items = tuple(classify(piece, depth + 1) for piece in pieces) if inner.strip() else ()
    if items and all(isinstance(i, Bracket) and i.opener in "[(" and text[0] == "[" for i in items):
        rows = tuple(Bracket("[", "]", i.items) for i in items if isinstance(i, Bracket))
        return Bracket("[[", "[[", rows)
    return Bracket(text[0], text[-1], items)


def _formula(text: str) -> Number | Formula | None:
    hyphens = _HYPHENS.fullmatch(text)
    if hyphens is not None and (hyphens.group(3) or int(hyphens.group(1)) < int(hyphens.group(2))):
        return None  # a range, a telephone number, a score
    if _SLASHES.fullmatch(text) or _CHEMICAL.fullmatch(text):
        return None
    if _ONLY_LETTERS.fullmatch(text) and not all(_PRODUCT.fullmatch(word) for word in text.split()):
        return None
    formula = read_formula(text)
    if formula is None:
        return None
    value = value_of(formula)
    return formula if value is None else Number(value)
