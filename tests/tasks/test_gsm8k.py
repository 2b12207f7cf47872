from __future__ import annotations

from pathlib import Path

import pytest

from stepscope.errors import TaskError
from stepscope.tasks import load_task


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
    with pytest.raises(TaskError, match="gsm8k train row 0: no answer after ####"):
        load_task(f"gsm8k:{tmp_path}")


def test_hub_without_a_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(TaskError, match="without a network give gsm8k:DIR"):
        load_task("gsm8k")
