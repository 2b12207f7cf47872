from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepscope.errors import TaskError
from stepscope.tasks import load_task
from stepscope.tasks.sources.gsm8k import Gsm8k


def test_all_demonstrations_are_correct(gsm8k_folder: Path) -> None:
    task = load_task(f"gsm8k:{gsm8k_folder}")
    assert (len(task.problems("train")), len(task.problems("test"))) == (7473, 1319)
    questions = {split: {p.question for p in task.problems(split)} for split in ("train", "test")}
    assert not questions["train"] & questions["test"]
    for split in ("train", "test"):
        for number, problem in enumerate(task.problems(split)):
            assert problem.prompt_id == f"gsm8k/{split}/{number}"
            shown = task.demonstration(problem)
            assert "<<" not in shown
            assert "####" not in shown
            score = task.score(problem, shown)
            assert (score.reward, score.correct, score.formatted) == (1.0, True, True)


def test_answers_to_a_real_problem(gsm8k_folder: Path) -> None:
    task = load_task(f"gsm8k:{gsm8k_folder}", format_weight=0.1)
    problem = task.problems("test")[0]
    assert problem.answer == "18"
    for answer, reward in (("$18", 1.1), ("18.00 dollars", 1.1), ("9*2", 1.1), ("17", 0.1), ("17, 18", 0.1)):
        score = task.score(problem, f"<think>eggs</think>\n<answer>{answer}</answer>")
        assert score.reward == pytest.approx(reward)
        assert score.correct is (reward > 1)
    bare = task.score(problem, "<answer>18</answer>")
    assert (bare.reward, bare.correct, bare.formatted) == (1.0, True, False)


def test_missing_folder() -> None:
    with pytest.raises(TaskError, match=r"no file /nowhere/train.jsonl"):
        load_task("gsm8k:/nowhere")


def test_missing_answer(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text('{"question": "q", "answer": "no mark"}\n')
    with pytest.raises(TaskError, match=r"train\.jsonl line 1: no answer after ####"):
        load_task(f"gsm8k:{tmp_path}")


@pytest.mark.parametrize(
    ("answer", "gold"),
    [
        ("1,234", "1234"),
        ("2, 3", "2, 3"),
        ("3,5", "3,5"),
        ("-1,234,567.5", "-1234567.5"),
        ("1,23,456", "1,23,456"),
    ],
)
def test_only_thousands_separators_go(answer: str, gold: str) -> None:
    rows = [{"question": "q", "answer": f"so #### {answer}"}]
    task = Gsm8k.from_data({"train": rows, "test": []})
    assert [p.answer for p in task.problems("train")] == [gold]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": None, "answer": "#### 1"}, "question must be a text that is not empty, got null"),
        (
            {"question": [{"role": "user", "content": "q"}], "answer": "#### 1"},
            "question must be a text, got a l",
        ),
        ({"question": "q", "answer": 3}, "answer must be a text that is not empty, got 3"),
        ({"question": "q", "answer": "#### NaN"}, "the answer after #### must be a number, got 'NaN'"),
        (
            {"question": "q", "answer": "<answer>5</answer> #### 5"},
            "answer has tags that are not one <think>",
        ),
        ({"question": "q\ud800", "answer": "#### 5"}, "question holds half a surrogate pair at character 2"),
        ({"question": "q"}, r"no field 'answer' among \['question'\]"),
    ],
)
def test_damaged_rows_of_hub_and_folder(tmp_path: Path, row: dict[str, Any], message: str) -> None:
    good = {"question": "other", "answer": "#### 1"}
    with pytest.raises(TaskError, match=f"^openai/gsm8k test row 1: {message}"):
        Gsm8k.from_data({"train": [], "test": [good, row]})
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(good) + "\n" + json.dumps(row))
    with pytest.raises(TaskError, match=f"train.jsonl line 2: {message}"):
        load_task(f"gsm8k:{tmp_path}")


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError, match="without a network give gsm8k:DIR"):
        load_task("gsm8k")
