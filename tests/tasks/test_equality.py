from __future__ import annotations

import json
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepscope.tasks.equality import MAX_CHARACTERS, equal
from stepscope.tasks.equality.numbers import Number
from stepscope.tasks.equality.quantities import read_quantity
from stepscope.tasks.judge.worker import Worker, shared_worker

PAIRS = [
    json.loads(line) for line in Path(__file__).with_name("answers.jsonl").read_text("utf-8").splitlines()
]
"""References, each with what says the same and what does not."""

HOSTILE = [
    "9**9**9**9",
    "$9^{9^{9^9}}$",
    "$10000000!$",
    "$" + r"\frac{1}{" * 40 + "2" + "}" * 40 + "$",
    "$" + "{" * 400,
    "(" * 400,
    r"$\int_0^{1000} x^{x^x} dx$",
    "1" * 4_000_000,
    "\x00\x00",
    "\ud800",
    "9" * 59 + "e999",
    "1/0",
    "\n18\n" * 50,
    "2^{20000}",
    "x + 2^{20000}",
]


@pytest.mark.parametrize(
    ("reference", "answer", "same"),
    [
        ("1000", "1,000", True),
        ("1,000", "1000", True),
        ("1000", "1,00", False),
        ("1/2", "0.5", True),
        ("0.5", "1/2", True),
        ("0.5", "2/4", True),
        ("18", "18.00", True),
        ("18", "$18", True),
        ("18", "-18", False),
        ("18", "180", False),
        ("18", "", False),
        ("-3", "\N{MINUS SIGN}3", True),
        ("1000", "1e3", True),
        ("1/3", "0.333333", True),
        ("1/3", "0.33", False),
        ("18", "18 dollars", True),
        ("18", r"\$18", True),
        ("18", r"17 \\ 18", False),
        ("18", "17 (18)", False),
        ("18", r"\boxed{18}", True),
        ("18", "17 or 18", False),
        ("18", "17 18", False),
        ("18", r"$17$ $18$", False),
        ("18", r"\boxed{17}\boxed{18}", False),
        ("18", r"\{17, 18\}", False),
        ("1", "x^2+1", False),
        ("5", "5x", False),
        ("x^2+1", "1+x^2", True),
        (r"\frac{1}{2}", "0.5", True),
        (r"2\sqrt{2}", r"\sqrt{8}", True),
        ("(1,2)", "$(1, 2)$", True),
        ("(1,2)", "(2,1)", False),
        ("Paris", " paris\n", True),
        ("Paris", "sirap", False),
        ("Paris", "London", False),
    ],
)
def test_verdict(reference: str, answer: str, same: bool) -> None:
    assert equal(reference, answer) is same


def value(text: str) -> Fraction | None:
    number = read_quantity(text)
    return number.value if isinstance(number, Number) else None


@given(st.fractions(), st.booleans())
def test_exact_numbers_are_read_exactly(fraction: Fraction, spaced: bool) -> None:
    assert value(f"{fraction.numerator} / {fraction.denominator}" if spaced else str(fraction)) == fraction


@given(st.integers(-(10**12), 10**12), st.integers(0, 6))
def test_layout_of_a_number_does_not_matter(number: int, zeros: int) -> None:
    layouts = [f"{number:,}", f"{number:_}", str(number), f"{number}." + "0" * zeros]
    assert {value(text) for text in layouts} == {Fraction(number)}


@pytest.mark.parametrize(
    "pairs", PAIRS, ids=lambda pairs: pairs["reference"].encode("unicode_escape").decode()
)
def test_verdict_on_pairs(pairs: dict[str, Any]) -> None:
    assert [a for a in pairs["right"] if not equal(pairs["reference"], a)] == []
    assert [a for a in pairs["wrong"] if equal(pairs["reference"], a)] == []


MARKS = [
    *"0123456789+-*/^!|().,:;%$={}[]_<> \\",
    *(
        r"\frac",
        r"\sqrt",
        r"\pm",
        r"\infty",
        r"\text{",
        r"\boxed{",
        r"\int",
        "\n",
        "\ud800",
        "\x00",
        "½",
        "²",
    ),
    *(
        "x",
        "e",
        "i",
        "pi",
        " or ",
        " and ",
        "cm",
        "million",
        "10^",
        "9^",
        "\N{MINUS SIGN}",
        "\N{EN DASH}",
        "\N{UNION}",
    ),
]
REFERENCES = [
    "18",
    "1, 2",
    "x>3",
    "(1,2)",
    "5 km",
    "B",
    r"2\pi",
    "7:45",
    "Tuesday",
    "{1,2}",
    "y=x+1",
    r"\pm 2",
    "3:2",
]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(MARKS), max_size=30).map("".join), st.sampled_from(REFERENCES))
def test_no_text_raises_and_every_text_equals_itself(text: str, reference: str) -> None:
    assert equal(text, text)
    equal(reference, text)
    equal(text, reference)


@settings(max_examples=60)
@given(st.text(max_size=40))
def test_noise_is_not_the_answer(text: str) -> None:
    assert equal(text, text)
    assert not equal("918273", text) or "918273" in "".join(filter(str.isdigit, text))


@given(
    st.lists(st.sampled_from(["x", "y", "2", "3"]), min_size=1, max_size=5),
    st.lists(st.sampled_from(["+", "-", "*"]), min_size=4, max_size=4),
    st.integers(1, 50),
)
def test_formulas_are_equal_where_sympy_says_so(terms: list[str], signs: list[str], shift: int) -> None:
    import sympy

    text = terms[0] + "".join(s + t for s, t in zip(signs, terms[1:], strict=False))
    expanded = str(sympy.expand(sympy.sympify(text) * sympy.Symbol("x")))
    assert equal(f"({text})*x", expanded)
    assert not equal(f"({text})*x", f"{expanded} + {shift}")


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:12].encode("unicode_escape").decode())
def test_hostile_text_is_wrong_within_the_limit(text: str) -> None:
    alive = {"op": "equal", "reference": "18", "answer": "9*2"}
    shared_worker().ask(alive, time_limit=9)
    start = time.perf_counter()
    assert not equal("18", text)
    assert time.perf_counter() - start < 8
    assert shared_worker().ask(alive, time_limit=9) == {"value": True}


def test_too_long_is_equal_to_itself_only() -> None:
    text = "1+" * MAX_CHARACTERS + "1"
    assert equal(text, text)
    assert not equal(str(MAX_CHARACTERS + 1), text)


def test_threads_get_the_same_verdicts() -> None:
    questions = [(str(n), f"{n}*{m}", m == 1) for n in range(3, 9) for m in (1, 2)]
    verdicts: dict[int, bool] = {}

    def work(i: int) -> None:
        verdicts[i] = equal(*questions[i][:2])

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(questions))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [verdicts[i] for i in range(len(questions))] == [q[2] for q in questions]


def test_a_killed_worker_starts_again() -> None:
    worker = Worker()
    question = {"op": "equal", "reference": "18", "answer": "9*2"}
    assert worker.ask(question, time_limit=30) == {"value": True}
    assert worker.ask({"op": "equal", "reference": "1", "answer": "$9^{9^{9^9}}$"}, time_limit=0.05) is None
    assert worker.ask(question, time_limit=30) == {"value": True}
    assert worker.ask({"op": "equal", "wrong": 1}, time_limit=30) is None  # it crashes over this
    assert worker.ask(question, time_limit=30) == {"value": True}
    worker.close()


def test_the_worker_runs_no_code_of_an_answer(tmp_path: Path) -> None:
    """The scorer of countdown evaluates an answer that is arithmetic; evaluated, these make a file."""
    worker = Worker()
    item = {"name": "countdown", "config": "{}", "seed": 0, "index": 0}
    for number, code in enumerate(
        [
            "__import__('os').system('touch {}')",
            "__import__('pathlib').Path('{}').touch()",
            "__import__('subprocess').run(['touch', '{}'])",
            "open('{}', 'w')",
        ]
    ):
        target = tmp_path / str(number)
        answer = code.replace("{}", str(target))
        reply = worker.ask({"op": "score", "answer": answer, **item}, time_limit=60)
        assert reply is None or reply["value"] < 1
        assert not target.exists()
    worker.close()
