from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stepscope.errors import TaskError
from stepscope.tasks import load_task


def test_unknown_task_names_the_nearest() -> None:
    with pytest.raises(
        TaskError, match=r"unknown task 'aritmetic'.*gsm8k.*did you mean 'arithmetic"
    ) as caught:
        load_task("aritmetic")
    assert "\n" not in str(caught.value)


NAMES = st.sampled_from(["arithmetic:", "jsonl:", "gsm8k:/nowhere", "rg", ""])
OPTIONS = st.lists(
    st.sampled_from(
        ["terms", "digits", "ops", "train", "=", ",", "-", "+", "3", "1e999", "NaN", "[", "9" * 30]
    )
    | st.text(max_size=3),
    max_size=12,
).map("".join)


@given(NAMES, OPTIONS)
@settings(max_examples=300)
def test_any_specification_is_a_task_or_one_line(name: str, options: str) -> None:
    refused = ""
    try:
        load_task(name + options)
    except TaskError as error:
        refused = str(error)
    assert refused.isprintable()
    assert refused or name == "arithmetic:"


def test_unknown_split() -> None:
    with pytest.raises(TaskError, match="unknown split 'valid'"):
        load_task("arithmetic").problems("valid")


def test_template_and_its_default() -> None:
    problem = load_task("arithmetic").problems("train")[0]
    for template in (None, "", "short"):
        assert load_task("arithmetic", template=template).prompt(problem, None) == "3+8+5="
    task = load_task("arithmetic", template="r1-text")
    assert task.prompt(problem, None).endswith("User: 3+8+5 Assistant:")
    assert task.score(problem, task.demonstration(problem)).correct


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("<think>x</think><answer>16</answer>", 1.25),
        ("<think>x</think><answer>17</answer>", 0.25),
        ("<answer>16</answer>", 1.0),
        ("<think>x</think><answer>16</answer><answer>16</answer>", 0.0),
        ("16", 0.0),
        ("<think>" + "8" * 5000 + "</think><answer>16</answer>", 1.25),
    ],
)
def test_format_weight(response: str, reward: float) -> None:
    task = load_task("arithmetic", format_weight=0.25)
    score = task.score(task.problems("train")[0], response)
    assert score.reward == reward
    assert score.formatted is task.formatted(response)


def test_no_torch_is_imported() -> None:
    code = (
        "import sys; from stepscope.tasks import load_task; t = load_task('arithmetic');"
        "p = t.problems('train')[0]; assert t.score(p, t.demonstration(p)).correct;"
        "print({'torch', 'transformers', 'datasets', 'math_verify', 'reasoning_gym'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
