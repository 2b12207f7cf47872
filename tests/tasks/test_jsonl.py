from __future__ import annotations

from pathlib import Path

import pytest

from stepscope.errors import TaskError
from stepscope.tasks import load_task


def test_split_by_hash_is_stable_and_disjoint(jsonl_file: Path) -> None:
    task = load_task(f"jsonl:{jsonl_file}")
    train, test = task.problems("train"), task.problems("test")
    assert len(train) + len(test) == 200
    assert 5 <= len(test) <= 50
    assert not {p.question for p in train} & {p.question for p in test}
    before = {p.question: p.prompt_id for p in (*train, *test)}
    with jsonl_file.open("a") as file:
        file.write('{"prompt": "one more", "answer": "1"}\n')
    longer = load_task(f"jsonl:{jsonl_file}")
    after = {p.question: p.prompt_id for s in ("train", "test") for p in longer.problems(s)}
    assert before.items() <= after.items()


def test_all_demonstrations_are_correct(jsonl_file: Path) -> None:
    task = load_task(f"jsonl:{jsonl_file}")
    for problem in (*task.problems("train"), *task.problems("test")):
        score = task.score(problem, task.demonstration(problem))
        assert (score.reward, score.correct, score.formatted) == (1.0, True, True)


def test_named_split_and_numbers(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text(
        '{"prompt": "a", "answer": 2, "split": "test"}\n\n{"prompt": "b", "answer": 0.5, "split": "train"}'
    )
    task = load_task(f"jsonl:{path}", template="{question}? <think>")
    assert [(p.prompt_id, p.answer) for p in task.problems("test")] == [("jsonl:own/test/0", "2")]
    (problem,) = task.problems("train")
    assert problem.prompt_id == "jsonl:own/train/2"
    assert task.score(problem, "half</think><answer>1/2</answer>").correct
    assert task.formatted(task.demonstration(problem))


def test_folder_with_two_files(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text(f'{{"prompt": "{split}", "answer": "1"}}\n')
    task = load_task(f"jsonl:{tmp_path}")
    assert [p.question for p in task.problems("test")] == ["test"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt": "a", "answer"', "line 2: not valid JSON"),
        ('{"prompt": "a", "anser": "1"}', "line 1: no field 'answer'"),
        ("[1]", "line 1: expected a JSON object, got list"),
        ('{"prompt": " ", "answer": "1"}', "line 1: prompt must be a text"),
        ('{"prompt": 3, "answer": "1"}', "line 1: prompt must be a text"),
        ('{"prompt": "a", "answer": null}', "line 1: answer must be"),
        ('{"prompt": "a", "answer": "1", "split": "dev"}', "line 1: split must be train or test, got 'dev'"),
        ("\n\n", "holds no problems"),
    ],
)
def test_damaged_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(f"jsonl:{path}")
    assert "\n" not in str(caught.value)


def test_missing_file() -> None:
    with pytest.raises(TaskError, match="no such file"):
        load_task("jsonl:/nowhere.jsonl")
