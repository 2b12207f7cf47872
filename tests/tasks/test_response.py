from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepscope.errors import TaskError
from stepscope.tasks import load_task
from stepscope.tasks.formats.response import answer_formats, load_answer_format

R1 = load_answer_format("tags")
read_response = R1.read

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


@pytest.mark.parametrize(
    ("name", "text", "answer", "formatted"),
    [
        ("boxed", r"So \boxed{3} and \boxed{\frac{1}{2}}.", r"\frac{1}{2}", False),
        ("boxed", r"So $\boxed{\frac{1}{2}}$.", r"\frac{1}{2}", True),
        ("boxed", r"<think>\boxed{3}?</think>\boxed{4}", "4", True),
        ("boxed", r"\boxed{\boxed{4}}", r"\boxed{4}", True),
        ("boxed", r"\boxed{ \{1, 2\} }", r"\{1, 2\}", True),
        ("boxed", r"\boxed{\{1}", r"\{1", True),
        ("boxed", r"\boxed{3 and \boxed{4}", "4", True),
        ("boxed", r"\boxed{3", None, False),
        ("boxed", r"\boxed 3", None, False),
        ("boxed", r"<think>\boxed{3}</think> none", None, False),
        ("boxed", "<answer>3</answer>", None, False),
        ("hash", "3+4=7\n#### 7", "7", True),
        ("hash", "#### 6\n#### 7 ", "7", False),
        ("hash", "#### 7\nDone.", "7", False),
        ("hash", "####", None, False),
        ("hash", "7", None, False),
        ("last_number", "First 3, then -1,234.50 dollars.", "-1,234.50", True),
        ("last_number", "5-3", "3", True),
        ("last_number", "It is 3/4", "3/4", True),
        ("last_number", "It costs $18.", "$18", True),
        ("last_number", "one in 2 300", "300", True),
        ("last_number", "none", None, False),
        (r"regex:(?:is|be) (\S+)\.", "It may be 3. It is 4.", "4", True),
        (r"regex:(?:is|be) (\S+)\.", "4", None, False),
        (r"regex:A(x)?", "A", None, False),
    ],
)
def test_where_the_answer_stands(name: str, text: str, answer: str | None, formatted: bool) -> None:
    reading = load_answer_format(name).read(text)
    assert (reading.answer, reading.formatted) == (answer, formatted)


@pytest.mark.parametrize("stands", answer_formats(), ids=lambda stands: stands.name)
@pytest.mark.parametrize("opening", ["", "<think>", "<think>\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("compact", [False, True])
def test_a_demonstration_keeps_its_format(stands, opening, compact) -> None:
    for thought in ("", "1+1=2;2+2=4"):
        text = stands.lay_out(thought, "4", opening=opening, compact=compact)
        reading = stands.read(opening + text)
        assert (reading.answer, reading.formatted) == ("4", True), text
    assert not stands.read("<think>4").formatted


def test_demonstrations_in_tags_are_laid_out_as_ever() -> None:
    assert R1.lay_out("1+2=3", "3", compact=True) == "<think>1+2=3</think><answer>3</answer>"
    assert R1.lay_out("so", "3", opening="<think>") == "\nso\n</think>\n<answer>3</answer>"
    assert R1.lay_out("so", "3", opening="<think>\n") == "so\n</think>\n<answer>3</answer>"
    assert R1.lay_out("so", "3", opening="<think></think>") == "<answer>3</answer>"


def test_the_prompt_asks_for_the_format_and_the_task_reads_it() -> None:
    task = load_task("arithmetic", answer_format="boxed", format_weight=0.5)
    problem = task.problems("train")[0]
    assert task.demonstration(problem).endswith(f"\\boxed{{{problem.answer}}}")
    assert task.score(problem, task.demonstration(problem)).reward == 1.5
    assert task.score(problem, f"<think>x</think><answer>{problem.answer}</answer>").reward == 0
    assert "boxed" in load_task("rg:chain_sum", answer_format="boxed").prompt(problem, None)
    assert load_task("rg:chain_sum", answer_format="regex:(.)").prompt(problem, None) == problem.question


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("boxd", "did you mean 'boxed'"),
        ("regex:(", "not a regular expression"),
        ("regex:x", "0 groups"),
        ("regex:(x)(y)", "2 groups"),
        ("regex:" + "(x)" * 300, "at most 500"),
    ],
)
def test_a_wrong_answer_format_is_refused(name: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load_task("arithmetic", answer_format=name)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 300


def test_an_expression_has_no_demonstrations() -> None:
    task = load_task("arithmetic", answer_format="regex:(.)")
    with pytest.raises(TaskError, match="not how a demonstration writes it"):
        task.demonstration(task.problems("train")[0])


def test_an_expression_that_explodes_finds_nothing_in_time() -> None:
    start = time.perf_counter()
    with pytest.warns(UserWarning, match="took more than 1 s"):
        assert load_answer_format(r"regex:((?:a|a|aa)+)+$").read("a" * 5000 + "b").answer is None
    assert time.perf_counter() - start < 20


@pytest.mark.parametrize("name", ["boxed", "hash", "last_number"])
@pytest.mark.parametrize("unit", [r"\boxed{", "{", "}", "#", "####", "1", "1,", "-", "</think>", "\n"])
def test_megabytes_are_read_at_once_in_every_format(name: str, unit: str) -> None:
    start = time.process_time()
    load_answer_format(name).read(unit * (2_000_000 // len(unit)))
    assert time.process_time() - start < 4


@pytest.mark.parametrize("unit", ["<answer>", "</think>", "<think>", "<", " ", "<answer></answer>"])
def test_megabytes_are_read_at_once(unit: str) -> None:
    start = time.process_time()
    assert not read_response(unit * (4_000_000 // len(unit))).formatted
    assert time.process_time() - start < 1
