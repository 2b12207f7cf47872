from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepscope.errors import TaskError
from stepscope.tasks import load_task

DIALS = st.builds(
    lambda low, more, digits, ops: (
        f"arithmetic:terms={low}-{low + more},digits={digits},ops={ops},train=60,test=9"
    ),
    st.integers(2, 5),
    st.integers(0, 2),
    st.integers(1, 4),
    st.sampled_from(["+", "+-"]),
)


@settings(max_examples=25)
@given(DIALS)
def test_every_sum_is_right_and_demonstrated(spec: str) -> None:
    task = load_task(spec)
    questions = {split: [p.question for p in task.problems(split)] for split in ("train", "test")}
    assert not set(questions["train"]) & set(questions["test"])
    low, high = map(int, re.findall(r"terms=(\d)-(\d)", spec)[0])
    for split in ("train", "test"):
        assert len(set(questions[split])) == len(questions[split]) > 0
        for problem in task.problems(split):
            terms = [int(t) for t in re.findall(r"[+-]?\d+", problem.question)]
            assert low <= len(terms) <= high
            assert sum(terms) == int(problem.answer)
            assert all(sum(terms[:i]) >= 0 for i in range(len(terms)))
            shown = task.demonstration(problem)
            score = task.score(problem, shown)
            assert (score.reward, score.correct, score.formatted) == (1.0, True, True)
            steps = re.fullmatch(r"<think>(.*)</think><answer>(.*)</answer>", shown)
            assert steps is not None
            assert len(steps.group(1).split(";")) == len(terms) - 1
            for step in steps.group(1).split(";"):
                left, _, right = step.partition("=")
                assert sum(int(t) for t in re.findall(r"[+-]?\d+", left)) == int(right)


def test_problems_are_pinned() -> None:
    """Ids and questions are global: published numbers refer to them."""
    task = load_task("arithmetic")
    first = task.problems("train")[0]
    assert (first.prompt_id, first.question) == ("arithmetic/train/0", "3+8+5")
    assert (len(task.problems("train")), len(task.problems("test"))) == (10_000, 1_000)
    assert task.prompt(first, None) == "3+8+5="
    assert task.demonstration(first) == "<think>3+8=11;11+5=16</think><answer>16</answer>"


def test_ids_do_not_depend_on_the_size() -> None:
    large, small = load_task("arithmetic"), load_task("arithmetic:train=40,test=7")
    for split, count in (("train", 40), ("test", 7)):
        assert list(small.problems(split)) == list(large.problems(split))[:count]


def test_ids_name_the_difficulty_once() -> None:
    def first(spec: str) -> str:
        return load_task(spec).problems("test")[3].prompt_id

    assert first("arithmetic:terms=3-5,digits=1,ops=+-") == "arithmetic/test/3"
    assert first("arithmetic:digits=2-2") == "arithmetic:digits=2-2/test/3"
    assert first("arithmetic:terms=2-4,digits=2") == "arithmetic:digits=2,terms=2-4/test/3"


def test_a_small_space_gives_what_it_has() -> None:
    task = load_task("arithmetic:terms=2,digits=1,ops=+")
    assert len(task.problems("train")) + len(task.problems("test")) == 81


@pytest.mark.parametrize(
    "answer", ["3+8+5", "16.0", "16 or 17", "016 ", "+16", "1e1", "", "9" * 10_000, "\uff11\uff16"]
)
def test_only_the_integer_itself_counts(answer: str) -> None:
    task = load_task("arithmetic")
    score = task.score(task.problems("train")[0], f"<think></think><answer>{answer}</answer>")
    assert score.correct is (answer.strip() == "016")
    assert score.formatted


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("arithmetic:term=3", "unknown option 'term' .did you mean 'terms'"),
        ("arithmetic:terms=1", "terms must lie between 2 and 20, got 1"),
        ("arithmetic:terms=4-2", "terms must lie"),
        ("arithmetic:digits=many", "whole number or a range"),
        ("arithmetic:ops=*", r"ops must be \+ or \+-"),
        ("arithmetic:train=0", "train must be a whole number of at least 1"),
        ("arithmetic:terms", "expected key=value"),
        ("arithmetic:terms=3,terms=4", "given twice"),
    ],
)
def test_bad_dial(spec: str, message: str) -> None:
    with pytest.raises(TaskError, match=message) as caught:
        load_task(spec)
    assert "\n" not in str(caught.value)
