"""Is an answer equal to the reference? Numbers are compared here; expressions go to math-verify in a worker.

Reading untrusted mathematics can take for ever (``9**9**9**9``) or exhaust the memory, and math-verify's own
time limits are signals, which exist in the main thread only. So it runs in a process that can be killed.
"""

from __future__ import annotations

import functools
import itertools
import re
from fractions import Fraction

from stepscope.tasks.worker import shared_worker

MAX_CHARACTERS = 500
"""Longer answers are not equal to anything but the same text."""

TIME_LIMIT = 5.0
"""Seconds after which the worker is killed and the answer counts as wrong."""

_DECIMAL = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
_NUMBER = re.compile(rf"([+-]?)\s*[$€£]?\s*({_DECIMAL})(?:[eE]([+-]?[0-9]{{1,3}}))?", re.ASCII)
_FRACTION = re.compile(r"([+-]?)\s*([0-9]+)\s*/\s*([0-9]+)", re.ASCII)
_ANY_DECIMAL = re.compile(_DECIMAL, re.ASCII)
_JOINT = re.compile(r"[-+*/^=\u00d7\u00f7\u00b7%(){}]|\\[A-Za-z]")


def parse_number(text: str) -> Fraction | None:
    """A plain number, exactly: ``1,000``, ``-3.50``, ``$18``, ``1e3``, ``1/2``; None for anything else."""
    text = text.strip().replace("\N{MINUS SIGN}", "-")
    if len(text) > 60:
        return None
    match = _NUMBER.fullmatch(text)
    if match:
        sign, digits, exponent = match.groups()
        value = Fraction(digits.replace(",", "")) * Fraction(10) ** int(exponent or 0)
        return -value if sign == "-" else value
    match = _FRACTION.fullmatch(text)
    if match and int(match.group(3)):
        value = Fraction(int(match.group(2)), int(match.group(3)))
        return -value if match.group(1) == "-" else value
    return None


def equal(reference: str, answer: str) -> bool:
    """Whether an answer says the same as the reference.

    In this order: the same text up to case and white space; two plain numbers, compared exactly (decimals
    that are close go on, for rounding); otherwise math-verify (Kydlíček 2025), which also evaluates
    expressions, reads LaTeX and strips units. An answer that offers several values (``17 or 18``) is not
    equal to a single number.

    Never raises and never takes much longer than ``TIME_LIMIT``, whatever the text; safe in any thread.
    """
    if _normalise(reference) == _normalise(answer):
        return True
    reference, answer = reference.replace("\\$", "$"), answer.replace("\\$", "$")
    if not answer.strip() or max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    gold, value = parse_number(reference), parse_number(answer)
    if gold is not None and value is not None:
        if gold == value:
            return True
        if abs(gold - value) > abs(gold) / 1000 or (gold.denominator == 1 and value.denominator == 1):
            return False
    if answer.count("$") > 2 or answer.count("boxed") > 1:
        return False
    if gold is not None and _offers_several(answer):
        return False
    return _verified(reference.strip(), answer.strip())


def _normalise(text: str) -> str:
    return " ".join(text.split()).casefold()


def _offers_several(answer: str) -> bool:
    """Whether two numbers stand side by side with no operator between them."""
    found = list(_ANY_DECIMAL.finditer(answer))
    return any(
        _JOINT.search(answer[left.end() : right.start()]) is None for left, right in itertools.pairwise(found)
    )


@functools.lru_cache(maxsize=4096)
def _verified(reference: str, answer: str) -> bool:
    reply = shared_worker().ask(
        {"op": "equal", "reference": reference, "answer": answer}, time_limit=TIME_LIMIT
    )
    return reply is not None and bool(reply["value"])
