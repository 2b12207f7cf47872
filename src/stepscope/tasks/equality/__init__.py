r"""Is an answer equal to the reference? The contract, with its reasons, is docs/ANSWERS.md.

Both texts are laid out alike (:mod:`.text`), and each as a whole is sorted into one kind (:mod:`.kinds`):

=========== ========================================== ====================================================
kind        reference, for example                     the answer is equal where
=========== ========================================== ====================================================
number      ``1,234.5``, ``2 1/2``, ``25%``, ``3e8``   it has exactly this value
quantity    ``5 km``, ``$18``, ``3 apples``            number and unit agree, converted; a plain unit may go
choice      ``B``, ``(B) 3``                           the letter agrees (and the text, if both have one)
parts       ``1, 2``, ``x=1 or x=2``, ``\pm 2``        it has as many parts, and each is equal
brackets    ``(1,2)``, ``{1,2}``, ``[0,5)``, matrices  brackets and parts agree, in order except in a set
relation    ``x > 3``, ``at least 5``, ``3x - y = 4``  sides and signs agree, or are a constant multiple
moment      ``7:45 pm``, ``17 May 2024``               every field is the same
ratio       ``3:2``                                    the same in lowest terms
formula     ``2\pi``, ``(x-1)(x+1)``                   it has the same values wherever it is real
words       ``Tuesday``, and whatever is left          the same text without regard to case
=========== ========================================== ====================================================

Never a part for the whole: what cannot be read from its first character to its last is words. Around a
number a sentence is allowed if it holds no other number and no word that changes it (``not``, ``half``).

Formulas are compared by their values and not by math-verify, which takes a difference below 1e-15 for none
and a decimal of six digits for an irrational number. It is asked about what the grammar of :mod:`.formula`
leaves out and sympy evaluates: integrals, sums, products, limits. Reading those can take for ever or exhaust
the memory, so that happens in a process that can be killed.
"""

from __future__ import annotations

import functools
import re

from stepscope.tasks.equality.compare import same
from stepscope.tasks.equality.formula import Formula
from stepscope.tasks.equality.kinds import SIGN, Parts, Value, Words, at_every_comma, classify, split_top
from stepscope.tasks.equality.numbers import Number
from stepscope.tasks.equality.quantities import Quantity, in_sentence, statement
from stepscope.tasks.equality.text import tidy
from stepscope.tasks.judge.worker import shared_worker

__all__ = ["MAX_CHARACTERS", "TIME_LIMIT", "equal"]

MAX_CHARACTERS = 500
"""Longer answers are not equal to anything but the same text."""

TIME_LIMIT = 5.0
"""Seconds after which the worker is killed and the answer counts as wrong."""

_EVALUATED = re.compile(r"\\(?:i*nt|sum|prod|lim)(?![A-Za-z])")
_COMPLETE = re.compile(r"\\(?:sum|prod|lim)\s*_|\\i*nt(?![A-Za-z]).*d\s*[a-z]", re.DOTALL)
_INTRODUCED = re.compile(r"[A-Z][a-z']*(?: [A-Za-z']+)+, (?!.*(?: and |,))[A-Za-z']+ .*[0-9a-z].*")
_PROSE = re.compile(r"(?<![\\A-Za-z])[A-Za-z]{3,}")


def equal(reference: str, answer: str) -> bool:
    """Whether an answer says the same as the reference; see the table of this module.

    Never raises and never takes much longer than ``TIME_LIMIT``, whatever the text; safe in any thread.
    """
    if reference.split() == answer.split():
        return True
    if not answer.strip() or max(len(answer), len(reference)) > MAX_CHARACTERS:
        return False
    return _equal(reference, answer)


@functools.lru_cache(maxsize=4096)
def _equal(reference: str, answer: str) -> bool:
    gold_text, text = tidy(reference), tidy(answer)
    if not gold_text or not text:
        return False
    gold, value = classify(gold_text), classify(text)
    if same(gold, value):
        return True
    if isinstance(gold, Parts) and isinstance(value, Number):
        return same(gold, at_every_comma(text))
    sentence = isinstance(value, Words) or _INTRODUCED.fullmatch(text) is not None
    if isinstance(gold, (Number, Quantity)) and sentence and not _EVALUATED.search(text):
        spoken = in_sentence(text)
        if spoken is not None:
            return same(gold, spoken)
    if isinstance(value, (Words, Parts)) and (said := statement(text)) is not None:
        return not _is_verdict(gold) and same(gold, classify(tidy(said) or ""))
    if _left_to_sympy(gold, gold_text) and _left_to_sympy(value, text):
        return _EVALUATED.search(gold_text + text) is not None and _verified(gold_text, text)
    return False


def _is_verdict(gold: Value) -> bool:
    """A bare yes or no, which a sentence may say of something else than was asked."""
    return isinstance(gold, Words) and gold.text in ("yes", "no", "true", "false")


def _left_to_sympy(value: Value, text: str) -> bool:
    """A number, a formula, or a text made of complete integrals and the like, without words and relations."""
    commands = list(_EVALUATED.finditer(text))
    if not isinstance(value, Words) or not commands:
        return isinstance(value, (Number, Formula))
    complete = all(_COMPLETE.match(text, command.start()) for command in commands)
    return complete and _PROSE.search(text) is None and len(split_top(text, SIGN)) == 1


def _verified(reference: str, answer: str) -> bool:
    """Math-verify's verdict (Kydlíček 2025) on two formulas, each marked as one."""
    question = {"op": "equal", "reference": f"${reference}$", "answer": f"${answer}$"}
    reply = shared_worker().ask(question, time_limit=TIME_LIMIT)
    return reply is not None and bool(reply["value"])
