"""Comparing an answer with a reference of each kind."""

from __future__ import annotations

import re
from collections.abc import Sequence

from stepscope.tasks.equality.formula import Formula, proportional, read_formula, same_formula
from stepscope.tasks.equality.kinds import (
    Bracket,
    Choice,
    Infinite,
    Labelled,
    Measured,
    Parts,
    Relation,
    Value,
    Words,
    classify,
    plain,
)
from stepscope.tasks.equality.moments import Moment, same_moment
from stepscope.tasks.equality.numbers import Number, same_number
from stepscope.tasks.equality.quantities import Quantity, counts

_FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<=", "=": "=", "!=": "!="}


def same(gold: Value, answer: Value) -> bool:
    """Whether an answer says all that the reference says, and nothing else."""
    if isinstance(gold, Measured) or isinstance(answer, Measured):
        return _same_measured(gold, answer)
    if isinstance(gold, Labelled) or isinstance(answer, Labelled):
        return _same_labelled(gold, answer)
    if isinstance(gold, Parts) or isinstance(answer, Parts):
        return _same_parts(gold, answer)
    if isinstance(gold, Relation) or isinstance(answer, Relation):
        return _same_relation(gold, answer)
    if isinstance(gold, (Number, Quantity)) and isinstance(answer, (Number, Quantity)):
        return _same_quantity(gold, answer)
    if isinstance(gold, (Number, Formula)) and isinstance(answer, (Number, Formula)):
        return same_formula(as_formula(gold), as_formula(answer))
    if isinstance(gold, Choice) and isinstance(answer, Choice):
        return gold.letter == answer.letter and _same_texts(gold.text, answer.text)
    if isinstance(gold, Bracket) and isinstance(answer, Bracket):
        return _same_bracket(gold, answer)
    if isinstance(gold, Moment) and isinstance(answer, Moment):
        return same_moment(gold, answer)
    if isinstance(gold, Choice) and gold.text:
        return same(classify(gold.text), answer)
    return gold == answer or _same_letters(gold, answer)


def _same_measured(gold: Value, answer: Value) -> bool:
    """The formulas and, where both have one, the units."""
    units = [v.unit for v in (gold, answer) if isinstance(v, Measured)]
    formulas = [v.formula if isinstance(v, Measured) else v for v in (gold, answer)]
    return (
        all(u == units[0] for u in units)
        and not any(isinstance(f, Measured) or not isinstance(f, Formula) for f in formulas)
        and same(*formulas)
    )


def _same_letters(gold: Value, answer: Value) -> bool:
    """Several letters of choices, written without commas: ``ACD``."""
    parts, run = (gold, answer) if isinstance(gold, Parts) else (answer, gold)
    if not isinstance(parts, Parts) or not isinstance(run, Words) or parts.joiner == "or":
        return False
    letters = [i.letter.casefold() for i in parts.items if isinstance(i, Choice) and not i.text]
    return len(letters) == len(parts.items) and "".join(sorted(letters)) == run.text


def as_formula(value: Number | Formula) -> Formula:
    """A number as a formula without variables."""
    if isinstance(value, Formula):
        return value
    exact = value.value
    return Formula("", lambda context, values: exact, frozenset(), False)


def _same_texts(gold: str, answer: str) -> bool:
    return not gold or not answer or plain(gold) == plain(answer) or same(classify(gold), classify(answer))


def _same_labelled(gold: Value, answer: Value) -> bool:
    """A name may be left out or added; two names must be the same."""
    if isinstance(gold, Labelled) and isinstance(answer, Labelled):
        return gold.label == answer.label and same(gold.value, answer.value)
    if isinstance(gold, Labelled) and isinstance(answer, Relation) and not isinstance(gold.value, Bracket):
        name = read_formula(gold.label)
        return name is not None and _same_relation(Relation((name, gold.value), ("=",)), answer)
    if isinstance(answer, Labelled) and isinstance(gold, Relation):
        return _same_labelled(answer, gold)
    if isinstance(gold, Labelled):
        if isinstance(answer, Parts) and (spelt := _spelt_out(gold)) is not None:
            return same(spelt, answer)
        return same(gold.value, answer)
    assert isinstance(answer, Labelled)
    if isinstance(gold, Parts) and (spelt := _spelt_out(answer)) is not None:
        return same(gold, spelt)
    return same(gold, answer.value)


def _spelt_out(point: Labelled) -> Parts | None:
    """``(x, y) = (3, 4)`` as ``x = 3, y = 4``; None for any other name."""
    names, value = point.label.strip("()").split(","), point.value
    if not point.label.startswith("(") or not isinstance(value, Bracket) or len(names) != len(value.items):
        return None
    return Parts(tuple(map(Labelled, names, value.items)), ",")


def _same_parts(gold: Value, answer: Value) -> bool:
    """As many parts, each the same: in order for a list, else (``and``, ``or``, a set) in any."""
    if isinstance(gold, Parts) and isinstance(answer, Parts):
        names = {i.label for i in gold.items if isinstance(i, Labelled)}
        if _unnumbered(gold) != gold and _unnumbered(answer) == answer:
            gold = _unnumbered(gold)
        elif _unnumbered(gold) == gold:
            answer = _unnumbered(answer) if names else answer
        roots = len(names) < 2 and all(isinstance(i, (Number, Formula, Labelled)) for i in gold.items)
        if not roots and (gold.joiner == "or") != (answer.joiner == "or"):
            return False
        units = {i.unit for i in gold.items if isinstance(i, Quantity)}
        if len(units) > 1 and any(isinstance(i, (Number, Labelled)) for i in answer.items):
            return False
        named = all(isinstance(i, Labelled) for i in (*gold.items, *answer.items))
        choices = all(isinstance(i, Choice) for i in gold.items)
        free = gold.joiner != "," or choices or (named and (len(names) > 1 or answer.joiner == "or"))
        return _pair(gold.items, answer.items, ordered=not free)
    parts, other = (gold, answer) if isinstance(gold, Parts) else (answer, gold)
    if isinstance(other, Words):
        return _same_letters(gold, answer)
    round_or_square = isinstance(other, Bracket) and other.opener + other.closer in ("()", "[]")
    if isinstance(parts, Parts) and isinstance(other, Bracket) and round_or_square:
        labels = [i.label for i in parts.items if isinstance(i, Labelled)]
        point = bool(labels) and other.opener == "(" and labels == sorted(set(labels))
        if parts.joiner == "or" or not (point or (not labels and len(other.items) > 2)):  # two: an interval
            return False
        items = [i.value if isinstance(i, Labelled) else i for i in parts.items]
        mine, theirs = (items, other.items) if parts is gold else (other.items, items)
        return len(labels) in (0, len(items)) and _pair(mine, theirs, ordered=True)
    if isinstance(parts, Parts) and isinstance(other, Bracket) and other.opener == "{":
        items = [i.value if isinstance(i, Labelled) else i for i in parts.items]
        mine, theirs = (items, other.items) if parts is gold else (other.items, items)
        return _pair(mine, theirs, ordered=parts is gold and parts.joiner == ",")
    return False


def _unnumbered(parts: Parts) -> Parts:
    """``x_1 = 2, x_2 = 3`` as ``x = 2 or x = 3``; anything else as it is."""
    labels = [re.fullmatch(r"([a-z])_\{?[0-9]\}?", i.label) for i in parts.items if isinstance(i, Labelled)]
    names = [label.group(1) for label in labels if label]
    if None in labels or len(labels) < len(parts.items) or len(set(names)) != 1:
        return parts
    return Parts(tuple(Labelled(names[0], i.value) for i in parts.items if isinstance(i, Labelled)), "or")


def _pair(gold: Sequence[Value], answer: Sequence[Value], *, ordered: bool) -> bool:
    if len(gold) != len(answer):
        return False
    if ordered:
        return all(same(g, a) for g, a in zip(gold, answer, strict=True))
    left = list(answer)
    for item in gold:
        found = next((i for i, other in enumerate(left) if same(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return True


def _same_bracket(gold: Bracket, answer: Bracket) -> bool:
    if (gold.opener, gold.closer) != (answer.opener, answer.closer):
        return False
    return _pair(gold.items, answer.items, ordered=gold.opener != "{")


def _same_quantity(gold: Number | Quantity, answer: Number | Quantity) -> bool:
    """Numbers in the same unit, converted; a unit that only says what is counted may go or come."""
    if isinstance(gold, Number):
        if isinstance(answer, Number):
            return same_number(gold, answer)
        return not gold.percent and counts(answer) and same_number(gold, answer.number)
    if isinstance(answer, Number):
        return not answer.percent and may_be_left_out(gold) and same_number(gold.number, answer)
    if gold.unit.things or answer.unit.things:
        return gold.unit.things == answer.unit.things and same_number(gold.number, answer.number)
    if gold.unit.powers != answer.unit.powers:
        return False
    if gold.unit.size == answer.unit.size:
        return same_number(gold.number, answer.number)
    return gold.number.value * gold.unit.size == answer.number.value * answer.unit.size


def may_be_left_out(gold: Quantity) -> bool:
    """Known units and counted things in the plural go without saying; ``3 red`` and ``5 km north`` do not."""
    if not gold.unit.things:
        return not gold.summed
    return len(gold.unit.things) == 1 and gold.plural and counts(gold)


def _same_relation(gold: Value, answer: Value) -> bool:
    if isinstance(gold, Relation) and isinstance(answer, Relation):
        return _same_relations(gold, answer) or _same_relations(gold, _turned(answer))
    relation, other = (gold, answer) if isinstance(gold, Relation) else (answer, gold)
    assert isinstance(relation, Relation)
    span = as_interval(relation)
    return span is not None and isinstance(other, Bracket) and _same_bracket(span, other)


def _turned(relation: Relation) -> Relation:
    return Relation(relation.sides[::-1], tuple(_FLIPPED[s] for s in relation.signs[::-1]))


def _same_relations(a: Relation, b: Relation) -> bool:
    if len(a.signs) != len(b.signs):
        return False
    if a.signs == b.signs and all(_same_side(x, y) for x, y in zip(a.sides, b.sides, strict=True)):
        return True
    if len(a.signs) != 1 or None in a.sides or None in b.sides:
        return False
    left, right = ([_formula_of(s) for s in r.sides] for r in (a, b))
    if None in left or None in right:
        return False
    sign = proportional((left[0], left[1]), (right[0], right[1]))  # type: ignore[arg-type]
    return sign != 0 and (b.signs[0] if sign > 0 else _FLIPPED[b.signs[0]]) == a.signs[0]


def _same_side(a: Value | None, b: Value | None) -> bool:
    if a is None or b is None:  # `> 3` for `x > 3`
        other = b if a is None else a
        return other is None or (
            isinstance(other, Formula) and len(other.names) == 1 and len(other.text.strip()) == 1
        )
    return same(a, b)


def _formula_of(value: Value | None) -> Formula | None:
    return as_formula(value) if isinstance(value, (Number, Formula)) else None


def as_interval(relation: Relation) -> Bracket | None:
    """``x < 3`` as the interval it means; None for what is none."""
    signs, sides = relation.signs, relation.sides
    if len(signs) == 1 and not _is_variable(sides[0]) and _is_variable(sides[1]):
        return as_interval(_turned(relation))
    if len(signs) == 2 and all(sign[0] == ">" for sign in signs):
        return as_interval(_turned(relation))
    closed = [sign.endswith("=") for sign in signs]
    if len(signs) == 1 and _is_variable(sides[0]) and sides[1] is not None:
        if signs[0] in ("<", "<="):
            return Bracket("(", ")]"[closed[0]], (Infinite(-1), sides[1]))
        if signs[0] in (">", ">="):
            return Bracket("(["[closed[0]], ")", (sides[1], Infinite(1)))
    if len(signs) == 2 and all(s in ("<", "<=") for s in signs) and _is_variable(sides[1]):
        low, _, high = sides
        if low is not None and high is not None:
            return Bracket("(["[closed[0]], ")]"[closed[1]], (low, high))
    return None


def _is_variable(value: Value | None) -> bool:
    return value is None or (
        isinstance(value, Formula) and len(value.names) == 1 and value.text.strip() in value.names
    )
