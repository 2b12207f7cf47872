"""Numbers with what they count: signs, currencies, percent, units, things."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from stepscope.tasks.equality.numbers import ONES, SCALES, TENS, Number, read_unsigned, read_words
from stepscope.tasks.equality.units import CURRENCY, UNITS, Unit, read_unit, singular, things

_HEAD = re.compile(rf"([+-]?)\s*(US\$|[{CURRENCY}]|USD|EUR|GBP|Rs)?\s*([+-]?)\s*")
_MINUS = re.compile(r"^(?:minus|negative)\s+", re.IGNORECASE)
_PERCENT = re.compile(r"%|percent|per cent|pct|prozent|por ?ciento|pour ?cent|процент[а-я]*", re.IGNORECASE)

_NOT_COUNTED = """
opposite complement contrary false untrue
pi e sin cos tan log ln exp sqrt root factorial choose mod modulo base squared cubed square cube power inverse
reciprocal logarithm half halves third thirds quarter quarters fourth fourths fifth fifths sixth sixths
seventh sevenths eighth eighths ninth ninths tenth tenths hundredth hundredths thousandth thousandths
double twice triple thrice dozen dozens score gross lakh lakhs crore crores mil mille mio million millions
millionen millones milliards milliard milliarden billions billionen hundreds thousands trillions tausend
hundert тысяч тысяча тысячи миллион миллионов миллиона тыс млн млрд half-dozen bn mn
not no never none cannot nobody nothing without except neither nor wrong incorrect unless negative minus plus
times divided multiplied over under above below between least most than more less fewer greater smaller larger
exceeds exceed exceeding about approximately approx around nearly almost roughly circa up until till
or and either if from to through versus vs remainder infinity infinite unknown undefined imaginary
nicht kein keine weniger mehr pas moins no menos más не нет меньше больше north south east west am pm
"""
NOT_COUNTED = frozenset(_NOT_COUNTED.split())
"""Words that change what a number says, so that a number beside one of them is not the number alone."""

_MAGNITUDES = "万萬億亿千百십백천만억兆"
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
_BEFORE = re.compile(rf"(?:(?:(?<=\s)|^)[+-]\s?)?(?:[{CURRENCY}]\s?[+-]?)?$")
CHANGED = NOT_COUNTED | {singular(w) for w in NOT_COUNTED} | ONES.keys() | TENS.keys() | SCALES.keys()
_NUMBERED = re.compile(
    r"\b(?:room|step|day|page|question|chapter|number|no|nr|option|figure|part|line|item|case|level|grade|problem|exercise"
    r"|week|year|version|row|column|bus|platform|gate|seat|of|before|after|since|by)\.?\s*$",
    re.IGNORECASE,
)
_COUNTED_OF = re.compile(r"\b(?:total|answer|value|result) of\s*$", re.IGNORECASE)
_PROSE = re.compile(r"(?:[^\W\d_]|[\u0300-\u036f\u0610-\u065f\u0900-\u0965\u0e31-\u0e4e\s.,:;'’\"،¿¡-])*")


_MORE = re.compile(
    r"(?<=[0-9])\s+(?:more|additional|extra)\s+(?=[A-Za-z]{3})(?!(?:than|or|and)\b|.*\bthan\b)", re.I
)
_NUMERAL = "|".join(sorted([*ONES, *TENS, *SCALES], key=len, reverse=True))
_SPELT = re.compile(rf"\b(?:{_NUMERAL})\b(?:(?:[\s-]+|\s+and\s+)(?:{_NUMERAL})\b)*", re.I)
_CLAUSE = re.compile(
    r"((?:(?:so|thus|hence|then|therefore),?\s+)?(?:(?:the|its|their|his|her)\s[^.,;:]{2,80}?|[a-z]))"
    r"\s+(?:(?:is|are|was|were|equals?)(?:\s+(?:equal to|at|given by))?)\s*:?\s+(.+)"
    r"|((?:[a-z]{2,}\s+){1,7}[a-z]{2,})\s*=\s*(.+)",
    re.DOTALL | re.I,
)
_CORRECT = re.compile(r"(.{1,60}?) is (?:the )?(?:correct|right)(?: (?:answer|option|choice|one))?", re.I)
_COMPARING = frozenset(("remainder", "least", "most", "larger", "smaller", "greater"))
"""These change a number beside them, but not what ``is`` gives to ``The least common multiple``."""
_OTHER = frozenset(("other", "another", "converse", "claim", "statement"))


@dataclass(frozen=True)
class Quantity:
    """A number and its unit, or the things it counts.

    Attributes:
        number: how many.
        unit: of what.
        plural: the words name several things, so that they go without saying.
        summed: it was written in several units.
    """

    number: Number
    unit: Unit
    plural: bool = False
    summed: bool = False


def read_quantity(text: str) -> Number | Quantity | None:
    """A number with or without sign, currency, percent, magnitude, unit or things; None for anything else."""
    text = _MINUS.sub("-", text)
    match = _HEAD.match(text)
    assert match is not None
    first, currency, second = match.groups()
    if first and second:
        return None
    found = read_unsigned(text[match.end() :])
    if found is None:
        return _worded(text)
    number, end = found
    raw = text[match.end() + end :]
    if "-" in (first, second):
        number = replace(number, value=-number.value)
    tail = raw.strip()
    while (scale := SCALES.get(tail.partition(" ")[0].lower())) is not None:
        number, raw = Number(number.value * scale), " "
        tail = tail.partition(" ")[2].strip()
    if currency is not None:
        code = {"USD": "$", "US$": "$", "EUR": "€", "GBP": "£"}.get(currency, currency)
        if tail and (UNITS.get(tail) or UNITS.get(tail.lower()) or ("",))[0] != UNITS[code][0]:
            return None
        return Quantity(number, Unit(((UNITS[code][0], 1),)))
    if not tail:
        return number
    if _PERCENT.fullmatch(tail):
        return Number(number.value / 100, percent=True)
    unit = read_unit(tail)
    if unit is not None and (raw[0] == " " or not tail[0].isalpha() or (len(tail) > 1 and not unit.single)):
        return Quantity(number, unit)
    counted = things(tail)
    if counted is None or (raw[0] != " " and raw[0].isascii()):
        return None
    if any(len(w) < 3 and w.isascii() for w in counted.things[:1]) or _is_formula_word(counted.things):
        return None
    plural = not tail[-1].isascii() or tail[-1] in "sS" or abs(number.value) == 1
    return Quantity(number, counted, plural=plural)


def _worded(text: str) -> Number | Quantity | None:
    """A number in words, and what it counts: ``three apples``, ``seventy-five percent``."""
    words = re.split(r"\s+", text.removeprefix("-").strip())[:12]
    for count in range(len(words), 0, -1):
        value, rest = read_words(" ".join(words[:count])), words[count:]
        if value is None or words[count - 1] == "and":
            continue
        if not rest:
            return Number(-value if text.startswith("-") else value)
        if {"and", "or"} & {w.lower().strip(",") for w in rest}:
            return None
        return read_quantity(f"{'-' * text.startswith('-')}{value} {' '.join(rest)}")
    return None


def _is_formula_word(words: tuple[str, ...]) -> bool:
    return any(w in ("pi", "sin", "cos", "tan", "log", "ln", "exp", "sqrt") for w in words)


def read_quantities(text: str) -> Quantity | None:
    """Figures in units of one kind, largest first, as their sum: ``5 ft 3 in``, ``3 hours 20 minutes``."""
    rest = re.sub(r"""^([0-9]+)'\s*([0-9]+)(?:"|'')?$""", r"\1 ft \2 in", text)
    parts: list[str] = []
    while rest:
        match = re.match(r"\$?[0-9][0-9.,]*\s*(?:[A-Za-z°]+|(?=\s+and\b))\s*(?:,?\s*and\s+|,\s*)?", rest)
        if match is None or len(parts) > 3:
            return None
        part = re.sub(r"(?:,?\s*and\s*|,\s*)$", "", match.group()).strip()
        parts.append(re.sub(r"(?<=[0-9])(?=h(?:[^a-z]|$)|s$)", " ", part))
        rest = rest[match.end() :]
    if len(parts) < 2:
        return None
    read = [q for q in map(read_quantity, parts) if isinstance(q, Quantity)]
    if len(read) != len(parts) or len(read[0].unit.powers) != 1:
        return None
    sizes = [q.unit.size for q in read]
    if any(q.unit.powers != read[0].unit.powers for q in read) or sizes != sorted(set(sizes), reverse=True):
        return None
    total = sum((q.number.value * q.unit.size for q in read), Fraction(0))
    return Quantity(Number(total), replace(read[0].unit, size=Fraction(1), single=False), summed=True)


def counts(quantity: Quantity) -> bool:
    """Whether the words behind a number only say what it counts."""
    words = quantity.unit.things
    return not any(_changes(w) or any(c in w for c in _MAGNITUDES) for w in words)


def _changes(word: str) -> bool:
    return word in CHANGED or word.endswith("n't") or (len(word) == 1 and word.isascii() and word not in "ai")


def _in_figures(text: str) -> str:
    """A sentence with its only number, in words, written in figures; ``one`` is not taken for 1."""
    runs = [] if re.search("[0-9]", text) else list(_SPELT.finditer(text))
    value = read_words(runs[0].group()) if len(runs) == 1 else None
    if value is None or value == 1 or value.denominator > 1:
        return text
    return f"{text[: runs[0].start()]}{value}{text[runs[0].end() :]}"


def statement(text: str) -> str | None:
    """What a sentence says of its subject: ``12`` of ``The area is 12``; None where a word may change it."""
    if match := _CORRECT.fullmatch(text):
        return match.group(1)
    match = _CLAUSE.fullmatch(text)
    subject, said = (
        (match.group(1) or match.group(3), match.group(2) or match.group(4)) if match else ("", "")
    )
    if not subject or not _PROSE.fullmatch(subject):
        return None
    words = [w.casefold() for w in _WORD.findall(subject)]
    if any((w in CHANGED and w not in _COMPARING) or w in _OTHER or w.endswith("n't") for w in words):
        return None
    return said


def in_sentence(text: str) -> Number | Quantity | None:
    """The only number of a sentence of plain words (``Ann has 73 eggs left``); None if a word changes it."""
    text = _MORE.sub(" ", _in_figures(text))
    first = re.search(r"\.?[0-9]", text)
    if first is None or len(text) > 300 or any(c in text for c in _MAGNITUDES):
        return None
    begin = _BEFORE.search(text[: first.start()])
    assert begin is not None
    found = read_unsigned(text[first.start() :])
    if found is None:
        return None
    head, end = text[: begin.start()], first.start() + found[1]
    value, tail = read_quantity(text[begin.start() : end]), text[end:]
    apart = re.match(r"$|\.(?!\.)|[\s,;:]|[^\W\d_A-Za-z]", tail) and not re.search(r"[A-Za-z0-9_]$", head)
    if value is None or not apart:
        return None
    rest = tail
    for count, stop in reversed(list(enumerate((m.end() for m in re.finditer(r"\S+", tail)), 1))[:3]):
        longer = read_quantity(text[begin.start() : end + stop].rstrip(".,;:!?"))
        if (isinstance(longer, Number) and longer.percent) or (
            isinstance(longer, Quantity) and (longer.unit.powers or count == 1)
        ):
            value, rest = longer, tail[stop:]
            break
    plain = head + " " + (rest if isinstance(value, Number) or value.unit.powers else tail)
    if not _PROSE.fullmatch(plain) or re.search(r"\B-|-\B", plain):
        return None
    if _NUMBERED.search(head) and not _COUNTED_OF.search(head):
        return None
    plain = head + " " + re.sub(r"\bto\b", " ", plain[len(head) :])  # `10 minutes to walk`
    if any(_changes(w.casefold()) for w in _WORD.findall(plain)):
        return None
    return value
