from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepscope.tasks.response import read_response

GOOD = "<think>1+1=2</think><answer>2</answer>"
TAGS = ["<think>", "</think>", "<answer>", "</answer>", "7", " ", "\n", "x"]


@pytest.mark.parametrize(
    ("text", "answer", "formatted"),
    [
        (GOOD, "2", True),
        ("\n <think>\n1\n</think>\n\n<answer> 2\n</answer> \n", "2", True),
        ("<think></think><answer>2</answer>", "2", True),
        ("<answer>2</answer>", "2", False),
        ("1+1=2</think><answer>2</answer>", "2", False),
        ("<think>1+1=2<answer>2</answer>", "2", False),
        ("<think>1+1=2</think>2", None, False),
        (GOOD + " so 2", "2", False),
        ("Well. " + GOOD, "2", False),
        ("<think>1</think>so<answer>2</answer>", "2", False),
        ("<answer>2</answer><think>1</think>", "2", False),
        ("<think>1</think><think>1</think><answer>2</answer>", "2", False),
        (GOOD + "<answer>2</answer>", None, False),
        ("<think><answer>1</answer></think><answer>2</answer>", None, False),
        ("<think>1</think><answer>2", None, False),
        ("<think>1</think></answer>2<answer>", None, False),
        ("<think>1</think><answer>2</answer></answer>", None, False),
        ("<THINK>1</THINK><ANSWER>2</ANSWER>", None, False),
        (r"<think>1</think>\boxed{2}", None, False),
        ("", None, False),
    ],
)
def test_reading(text: str, answer: str | None, formatted: bool) -> None:
    reading = read_response(text)
    assert (reading.answer, reading.formatted) == (answer, formatted)


@given(st.lists(st.sampled_from(TAGS), max_size=12).map("".join))
def test_formatted_means_the_grammar(text: str) -> None:
    """Compared with a recursive-descent reading that shares no code with the tested one."""
    reading = read_response(text)
    rest = text.strip()
    expected = False
    if rest.startswith("<think>"):
        thought, end, rest = rest.removeprefix("<think>").partition("</think>")
        rest = rest.strip()
        answer, closed, after = rest.removeprefix("<answer>").partition("</answer>")
        plain = not any(tag in thought + answer for tag in TAGS[:4])
        expected = bool(end and closed and rest.startswith("<answer>") and not after.strip() and plain)
    assert reading.formatted == expected
    if expected:
        assert reading.answer == answer.strip()


@pytest.mark.parametrize("unit", ["<answer>", "</think>", "<think>", "<", " ", "<answer></answer>"])
def test_megabytes_are_read_at_once(unit: str) -> None:
    start = time.perf_counter()
    assert not read_response(unit * (4_000_000 // len(unit))).formatted
    assert time.perf_counter() - start < 1
