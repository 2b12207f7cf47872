from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stepscope.errors import TaskError
from stepscope.tasks import Problem, TemplatedTask, load_task
from stepscope.tasks.sources import rows


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
        ("[1]", "line 1: expected a JSON object, got a list"),
        ('{"prompt": " ", "answer": "1"}', "line 1: prompt must be a text"),
        ('{"prompt": 3, "answer": "1"}', "line 1: prompt must be a text"),
        ('{"prompt": "a", "answer": null}', "line 1: answer must be"),
        ('{"prompt": "a", "answer": "1", "split": "dev"}', "line 1: split must be train or test, got 'dev'"),
        ("\n\n", "holds no problems"),
        ('{"prompt": "a", "answer": true}', "line 1: answer must be a text or a number, got true"),
        ('{"prompt": "a", "answer": NaN}', "line 1: not valid JSON .NaN is no number"),
        ('{"prompt": "a", "answer": -Infinity}', "line 1: not valid JSON .-Infinity is no number"),
        ('{"prompt": "a", "answer": "nan"}', "line 1: answer must be an answer, got 'nan'"),
        ('{"prompt": "a", "answer": ["1"]}', "line 1: answer must be a text or a number, got a list"),
        (
            '{"prompt": [{"role": "user", "content": "a"}], "answer": 1}',
            "line 1: prompt must be a text, got a l",
        ),
        ('{"prompt": null, "answer": 1}', "line 1: prompt must be a text that is not empty, got null"),
        (
            '\n{"prompt": "a\\udc00b", "answer": 1}',
            "line 2: prompt holds half a surrogate pair at character 2",
        ),
        ('{"prompt": "a", "answer": 1, "solution": 3}', "line 1: solution must be a text"),
        ('{"prompt": "a", "answer": 1, "split": null}', "line 1: split must be train or test, got null"),
        ('{"prompt": "a", "answer": 1, "answer": 2}', "line 1: not valid JSON .key 'answer' appears twice"),
        ('{"prompt": "a", "answer": "x <answer>1</answer>"}', "line 1: answer has tags inside"),
        ('{"prompt": "a", "answer": 1, "solution": "<answer>1</answer>"}', "line 1: solution has tags that"),
        ("[" * 100_000, "line 1: not valid JSON .nested too deeply"),
        ('{"prompt": "a", "answer": ' + '{"b":' * 9999, "line 1: not valid JSON .nested too deeply"),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": " a\\r\\n", "answer": 2}',
            "line 2: asks what .*line 1 asks",
        ),
    ],
)
def test_damaged_file(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(TaskError, match=message) as caught:
        load_task(f"jsonl:{path}")
    assert "\n" not in str(caught.value)


def one_row(tmp_path: Path, content: bytes) -> tuple[TemplatedTask, Problem]:
    path = tmp_path / "own.jsonl"
    path.write_bytes(content)
    task = load_task(f"jsonl:{path}")
    (problem,) = (*task.problems("train"), *task.problems("test"))
    return task, problem


@pytest.mark.parametrize("number", ["1.10", "1e22", "-0.1000000000000000055", "9" * 5000])
def test_numbers_stay_as_they_are_written(tmp_path: Path, number: str) -> None:
    task, problem = one_row(tmp_path, f'{{"prompt": "a", "answer": {number}}}'.encode())
    assert problem.answer == number
    assert task.score(problem, task.demonstration(problem)).correct


def test_a_byte_order_mark_is_no_content(tmp_path: Path) -> None:
    _, problem = one_row(tmp_path, '\ufeff{"prompt": "é", "answer": "1"}\r\n'.encode())
    assert (problem.question, problem.answer) == ("é", "1")


@pytest.mark.parametrize(
    ("solution", "shown"),
    [
        ("null", "<think>\n\n</think>\n<answer>6</answer>"),
        ('" "', "<think>\n\n</think>\n<answer>6</answer>"),
        ('"2 * 3"', "<think>\n2 * 3\n</think>\n<answer>6</answer>"),
        ('"<think>2 * 3</think>"', "<think>\n2 * 3\n</think>\n<answer>6</answer>"),
        ('"<think> 2 * 3 </think> <answer>6.0</answer>"', "<think>\n2 * 3\n</think>\n<answer>6.0</answer>"),
    ],
)
def test_solutions_with_and_without_tags(tmp_path: Path, solution: str, shown: str) -> None:
    row = f'{{"prompt": "a", "answer": "<answer> 6 </answer>", "solution": {solution}}}'
    task, problem = one_row(tmp_path, row.encode())
    assert problem.answer == "6"
    assert task.demonstration(problem) == shown


def test_a_demonstration_of_another_answer_is_refused(tmp_path: Path) -> None:
    row = b'{"prompt": "a", "answer": 6, "solution": "<think>2 * 3</think><answer>7</answer>"}'
    task, problem = one_row(tmp_path, row)
    with pytest.raises(TaskError, match=r"own.jsonl line 1: its demonstration does not score.*'7'.*'6'"):
        task.demonstration(problem)


def test_digest_is_of_the_content(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    first, _ = one_row(tmp_path, b'{"prompt": "a", "answer": 1}')
    spaced, _ = one_row(tmp_path / "elsewhere", b'\xef\xbb\xbf{"answer":1, "prompt":"a", "source": "x"}\n')
    assert first.digest == spaced.digest
    for other in (
        b'{"prompt": "a", "answer": 2}',
        b'\n{"prompt": "a", "answer": 1}',
        b'{"prompt": "b", "answer": 1}',
    ):
        assert one_row(tmp_path, other)[0].digest != first.digest
    assert load_task("arithmetic").digest == ""


def test_splits_that_share_questions_say_so(tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"
    texts = [("cafe\u0301", "train"), ("caf\u00e9 ", "test"), ("x", "train"), ("X", "test")]
    path.write_text("\n".join(json.dumps({"prompt": p, "answer": 1, "split": s}) for p, s in texts))
    task = load_task(f"jsonl:{path}")
    assert task.shared == {"caf\u00e9"}
    assert "1 question(s) of the test split are asked in the training split" in task.overlap
    assert load_task("arithmetic").overlap == ""


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("\ud800"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=4,
)
ROWS = st.fixed_dictionaries(
    {}, optional={name: st.just("a") | JSON for name in ("prompt", "answer", "solution", "split", "other")}
).map(lambda row: json.dumps(row).encode())


@given(st.lists(ROWS | st.binary(max_size=20), max_size=3).map(b"\n".join))
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_file_is_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.jsonl"
    path.write_bytes(content)
    refused = ""
    problems: list[Problem] = []
    try:
        task = load_task(f"jsonl:{path}")
        problems = [*task.problems("train"), *task.problems("test")]
    except TaskError as error:
        refused = str(error)
    assert bool(problems) is not bool(refused)
    assert len(refused.splitlines()) <= 1
    assert "any.jsonl" in refused or not refused
    for problem in problems:
        assert problem.question.encode().strip()
        assert problem.answer.strip()


@pytest.mark.parametrize("path", ["/nowhere.jsonl", "a\0b", "x" * 5000, "/dev/zero"])
def test_missing_file(path: str) -> None:
    for name in ("jsonl", "gsm8k"):
        with pytest.raises(TaskError, match=r"no (such )?file|cannot be printed"):
            load_task(f"{name}:{path}")


def test_a_folder_of_pipes_does_not_hang(tmp_path: Path) -> None:
    for split in ("train", "test"):
        os.mkfifo(tmp_path / f"{split}.jsonl")
    with pytest.raises(TaskError, match=r"train.jsonl: no such file"):
        load_task(f"jsonl:{tmp_path}")


def test_files_and_lines_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "own.jsonl"
    with path.open("wb") as file:
        file.truncate(rows.MAX_FILE_BYTES + 1)
    with pytest.raises(TaskError, match=r"own.jsonl: 1073741825 bytes, expected at most 1073741824"):
        load_task(f"jsonl:{path}")
    path.write_text('\n{"prompt": "a", "answer": 1}')
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 20)
    with pytest.raises(TaskError, match=r"own.jsonl line 2: longer than 20 bytes"):
        load_task(f"jsonl:{path}")
