"""Reading a number, exactly: digits grouped as in several countries, fractions, powers of ten, words."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

_GROUPED = r"[0-9]{1,3}(?:(?:,[0-9]{3})+|(?: [0-9]{3})+|(?:_[0-9]{3})+|(?:'[0-9]{3})+)(?:\.[0-9]+)?"
_CONTINENTAL = r"[0-9]{1,3}(?:(?:\.[0-9]{3}){2,}(?:,[0-9]+)?|(?:\.[0-9]{3})+,[0-9]+|(?: [0-9]{3})+,[0-9]+)"
_PLAIN = r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+"
UNSIGNED = rf"(?:{_CONTINENTAL}|{_GROUPED}|{_PLAIN})(?![0-9])"
_POWER = (
    r"(?:[eE]([+-]?[0-9]{1,3})|\s*[*xX]\s*10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?[0-9]{1,3})\s*\}|([+-]?[0-9]{1,3}))"
    r"|\s*[*xX]\s*10\s*(?:\^|\*\*)\s*\(\s*([+-]?[0-9]{1,3})\s*\))"
)
_DECIMAL = re.compile(rf"({UNSIGNED})(?:{_POWER})?", re.ASCII)
_RATIO = (
    r"(?:\\frac\s*\{\s*([0-9]+)\s*\}\s*\{\s*([0-9]+)\s*\}|\\frac\s*([0-9])\s*([0-9])(?![0-9])"
    r"|([0-9]+)\s*/\s*([0-9]+))"
)
_FRACTION = re.compile(rf"(?:([0-9]+)(?:\s+|\s*(?=\\)|\s+and\s+))?{_RATIO}", re.ASCII)
_RECURRING = re.compile(
    r"([0-9]*)\.([0-9]*?)(?:\\(?:overline|bar|dot)\s*\{([0-9]+)\}|\(([0-9]+)\)|((?:[0-9]\u0305)+)|([0-9]+)\.{3})",
    re.ASCII,
)
_REPEATS = re.compile(r"([0-9]*?)(?:([0-9]{1,2})\2{2,}|([0-9]{3,}?)\3+)")

_ONES = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen
sixteen seventeen eighteen nineteen"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
ONES = {word: value for value, word in enumerate(_ONES.split())}
TENS = {word: 10 * value for value, word in enumerate(_TENS.split(), 2)}
PIECES = {"half": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8}
_PIECES = re.compile(rf"(?:(.+) and )?(an?|[a-z]+(?:-[a-z]+)?)[ -]({'|'.join(PIECES)}|halve)(s?)")
SCALES = {"hundred": 100, "thousand": 1_000, "million": 10**6, "billion": 10**9, "trillion": 10**12}


@dataclass(frozen=True)
class Number:
    """A number.

    Attributes:
        value: what it is; a percentage counts its hundredths.
        digits: significant digits and decimal places as written; None for whole numbers and fractions.
        percent: it was written with a percent sign.
    """

    value: Fraction
    digits: tuple[int, int] | None = None
    percent: bool = False


def read_unsigned(text: str) -> tuple[Number, int] | None:
    """The number that a text begins with, and where it ends; None if it begins with none."""
    for read in (_read_recurring, _read_fraction, _read_decimal):
        found = read(text)
        if found is not None:
            return found
    return None


def _read_recurring(text: str) -> tuple[Number, int] | None:
    match = _RECURRING.match(text)
    if match is None:
        return None
    whole, fixed, *periods = match.groups()
    period = next((p for p in periods[:3] if p), "").replace("\u0305", "")
    if not period:
        tail = _REPEATS.fullmatch(fixed + periods[3])
        if tail is None:
            return None
        fixed, period = tail.group(1), tail.group(2) or tail.group(3)
    if len(whole + fixed + period) > 60:
        return None
    repeated = Fraction(int(period), 10 ** len(period) - 1)
    value = int(whole or 0) + (int(fixed or 0) + repeated) / 10 ** len(fixed)
    return Number(Fraction(value)), match.end()


def _read_fraction(text: str) -> tuple[Number, int] | None:
    match = _FRACTION.match(text)
    if match is None:
        return None
    whole, *parts = match.groups()
    top, bottom = (int(p) for p in parts if p is not None)
    if bottom == 0 or (whole is not None and top >= bottom):
        return None
    return Number(int(whole or 0) + Fraction(top, bottom)), match.end()


def _read_decimal(text: str) -> tuple[Number, int] | None:
    match = _DECIMAL.match(text)
    if match is None:
        return None
    written, *powers = match.groups()
    if re.fullmatch(_CONTINENTAL, written):
        written = written.replace(".", "").replace(",", ".")
    written = re.sub(r"[, _']", "", written)
    power = int(next((p for p in powers if p is not None), "0"))
    value = Fraction(written + ("0" if written.endswith(".") else "")) * Fraction(10) ** power
    if value.denominator == 1:
        return Number(value), match.end()
    places = len(written.partition(".")[2]) - power
    return Number(value, (len(written.replace(".", "").lstrip("0")), places)), match.end()


def same_number(gold: Number, answer: Number) -> bool:
    """Exactly equal, or one the rounding of the other to at least six digits.

    A percentage answers a reference without a sign by its figure (``25 percent`` for ``25``) or its value
    (``25%`` for ``0.25``), and the reverse; but ``0.5`` is not ``0.5%``: up to one they cannot be told apart.
    """
    if gold.percent == answer.percent:
        return _same_value(gold, answer)
    bare, percent = (answer, gold) if gold.percent else (gold, answer)
    if _same_value(bare, percent):
        return True
    return abs(bare.value) > 1 and percent.value * 100 == bare.value


def _same_value(a: Number, b: Number) -> bool:
    if a.value == b.value:
        return True
    rough = [n for n in (a, b) if n.digits is not None]
    if not rough or any(n.digits is not None and min(n.digits) < 6 for n in rough):
        return False
    coarse = min(rough, key=lambda n: n.digits or (0, 0))
    places = (coarse.digits or (0, 0))[1]
    return abs(a.value - b.value) * 2 * Fraction(10) ** places <= 1


def read_words(text: str) -> Fraction | None:
    """A number in English words, or digits and words: ``seventy-three``, ``two thirds``, ``20 million``."""
    text = re.sub(r"^an?\s+(?=(?:hundred|thousand|million|billion)\b)", "one ", text.lower().strip())
    if text == "half":
        return Fraction(1, 2)
    if pieces := _PIECES.fullmatch(text):
        whole = read_words(pieces.group(1)) if pieces.group(1) else Fraction(0)
        count = Fraction(1) if pieces.group(2) in ("a", "an") else read_words(pieces.group(2))
        if whole is None or count is None or (count == 1) == bool(pieces.group(4)) or whole.denominator > 1:
            return None
        return whole + count / PIECES.get(pieces.group(3), 2)
    total: Fraction = Fraction(0)
    group: Fraction = Fraction(0)
    last, any_word = 0, False
    words = [w for w in re.split(r"[\s-]+", text.lower().strip()) if w and w != "and"]
    if not words or len(words) > 12:
        return None
    for i, word in enumerate(words):
        if word in SCALES and (i or word != "hundred"):
            if not i:
                return None
            scale = SCALES[word]
            group = (group or Fraction(1)) * scale
            if scale > 100:
                total, group = total + group, Fraction(0)
            last, any_word = scale, True
        elif word in TENS or word in ONES:
            value = TENS.get(word, ONES.get(word, 0))
            if last and last < 100 and not (last >= 20 and value < 10 and value):
                return None
            group, last, any_word = group + value, value or 1, True
        elif i == 0 and (found := read_unsigned(word)) and found[1] == len(word):
            group, last = found[0].value, 1
        else:
            return None
    return total + group if any_word else None
