"""Measuring and evaluating with the run's own prompts and reward function, from the command line."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.evaluation import read_eval
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.results import read_table
from stepscope.tasks import load_task

TASK = cases.MEASUREMENT["task"]
SMALL = {
    "update": {"num_prompts": 4, "group_size": 4},
    "probe": {"num_prompts": 16, "group_size": 1},
    "lrs": [1e-5],
    "stages": ["rollouts", "step", "change"],
}
REWARDS = """
from stepscope.tasks import load_task
from stepscope.tasks.problem import Problem

task = load_task({task!r}, format_weight={weight!r})


def correct(prompts, completions, answer, **columns):
    problems = [Problem("", "", a) for a in answer]
    return [task.score(p, c).reward for p, c in zip(problems, completions, strict=True)]


def nothing(completions, **_):
    return [0.0] * len(completions)


def short(completions, **_):
    return [0.0]
"""


@pytest.fixture
def own(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working directory with the task's prompts as a file, ``rewards.py``, and settings."""
    settings = load_checkpoint(checkpoint, require_optimizer=False).settings
    template = settings.prompt_template or "{question}="
    task = load_task(TASK, template=template)
    rows = [
        {"prompt": template.replace("{question}", problem.question), "answer": problem.answer, "split": split}
        for split in ("train", "test")
        for problem in task.problems(split)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "rewards.py").write_text(REWARDS.format(task=TASK, weight=settings.format_weight))
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL))
    monkeypatch.chdir(tmp_path)
    sys.modules.pop("rewards", None)
    yield tmp_path
    sys.modules.pop("rewards", None)


def run(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, args)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return " ".join(result.stderr.split())


def without_names(file: Path) -> list[dict[str, Any]]:
    left = ("prompt_id", "question")
    return [{k: v for k, v in row.items() if k not in left} for row in read_table(file).to_pylist()]


def test_own_prompts_and_rewards_give_the_numbers_of_the_task(own: Path, checkpoint: Path) -> None:
    """The task's prompts as a file, graded by a function that grades like it: the same samples and change."""
    measure = ["measure", checkpoint, "--config", "small.yaml"]
    run(*measure, "--task", TASK, "--out", "task")
    given = ["--prompts", "rows.jsonl", "--reward", "rewards:correct"]
    run(*measure, *given, "--out", "own")
    for name in ("update", "probe"):
        ours, theirs = (without_names(own / folder / f"{name}.parquet") for folder in ("own", "task"))
        assert ours == theirs
        assert {row["reward"] for row in ours} != {0.0}
    change = [json.loads((own / folder / "change.json").read_text()) for folder in ("own", "task")]
    assert change[0] == change[1]
    config = yaml.safe_load((own / "own" / "config.yaml").read_text())
    assert (config["prompts"], config["reward"]) == ("rows.jsonl", "rewards:correct")
    provenance = json.loads((own / "own" / "provenance.json").read_text())
    digests = {
        file: hashlib.sha256((own / file).read_bytes()).hexdigest() for file in ("rows.jsonl", "rewards.py")
    }
    assert provenance["own_reward"] == {
        "name": "rewards:correct", "file": str(own / "rewards.py"), "sha256": digests["rewards.py"]
    }  # fmt: skip
    read = provenance["stages"]["rollouts"]["inputs"]["given"]
    assert read == {"prompts": digests["rows.jsonl"], "reward": digests["rewards.py"]}
    assert "done before" in run(*measure, *given, "--out", "own", "--resume")
    text = (own / "rewards.py").read_text()
    (own / "rewards.py").write_text(text + "\n# changed\n")
    said = run(*measure, *given, "--out", "own", "--resume", code=2)
    assert "reward rewards:correct has changed since this run was started" in said
    (own / "rewards.py").write_text(text)
    said = run(*measure, "--prompts", "rows.jsonl", "--out", "own", "--resume", code=2)
    assert "reward ('rewards:correct' there, None here)" in said


def test_rewards_that_are_all_zero_leave_a_response_to_look_at(own: Path, checkpoint: Path) -> None:
    measure = ["measure", checkpoint, "--config", "small.yaml", "--prompts", "rows.jsonl", "--out", "out"]
    for reward, message in (
        ("nothing", "the rewards of all 4 prompt groups have zero variance (mean reward 0)"),
        ("short", "reward rewards:short: it returned 1 values for 16 responses"),
    ):
        said = run(*measure, "--reward", f"rewards:{reward}", code=2)
        assert message in said
        assert [path.name for path in (own / "out").iterdir()] == ["example.json"]
        example = json.loads((own / "out" / "example.json").read_text())
        assert repr(example["prompt"]) in said
        assert "All of it is in out/example.json" in said
        assert example["reward"] == (0.0 if reward == "nothing" else None)
        assert example["reference"] in (own / "rows.jsonl").read_text()
        assert example["grader"] == f"rewards:{reward}"
    run(*measure, "--reward", "rewards:correct", "stages=[rollouts]")
    assert not (own / "out" / "example.json").exists()
    said = run("measure", checkpoint, "--config", "small.yaml", "--task", TASK, "--out", "hash",
               "loss.answer_format=hash", "loss.format_weight=0", code=2)  # fmt: skip
    assert "no answer found where hash looks, right answer: " in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompts", "rows.jsonl", "--task", TASK], "task and prompts are both given"),
        (["--prompts", "gone.jsonl"], "prompts gone.jsonl: no such file"),
        (
            ["--prompts", "rows.jsonl", "--reward", "rewards"],
            "reward: expected module:function, got 'rewards'",
        ),
        (["--prompts", "rows.jsonl", "--reward", "nowhere:f"], "reward: no module 'nowhere'"),
        (["--prompts", "rows.jsonl", "--reward", "rewards:f"], "rewards has no function 'f'"),
        (["--prompts", "rows.jsonl", "--template", "Q:"], "it is no text with {prompt}"),
        (["--template", "Q: {prompt}", "loss.prompt_template={question}"], "both say how prompts are asked"),
    ],
)
def test_what_cannot_be_used_is_refused(
    own: Path, checkpoint: Path, options: list[str], message: str
) -> None:
    for verb in ("measure", "eval"):
        assert message in run(verb, checkpoint, "--out", "out/eval.parquet", *options, code=2)
    assert not list((own / "out").glob("**/*.parquet"))


def test_a_template_is_asked_in(own: Path, checkpoint: Path) -> None:
    sizes = ["num_prompts=6", "samples_per_prompt=4", "ks=[1]"]
    run("eval", checkpoint, "--task", TASK, "--template", "Q {prompt}=", "--out", "a.parquet", *sizes)
    (own / "bare.jsonl").write_text((own / "rows.jsonl").read_text().replace("=", ""))
    (own / "asked.txt").write_text("Q {prompt}=\n")
    given = ["--prompts", "bare.jsonl", "--template", "asked.txt"]
    run("eval", checkpoint, *given, "--out", "b.parquet", *sizes)
    ours, theirs = (without_names(own / f"{x}_parts" / "step-4_responses.parquet") for x in "ba")
    assert ours == theirs
    assert all(row["prompt"].startswith("Q ") for row in ours)


def test_an_evaluation_asks_and_grades_likewise(own: Path, checkpoint: Path) -> None:
    sizes = ["num_prompts=6", "samples_per_prompt=4", "ks=[1,4]"]
    run("eval", checkpoint, "--task", TASK, "--out", "task.parquet", *sizes)
    given = ["--prompts", "rows.jsonl", "--reward", "rewards:correct"]
    said = run("eval", checkpoint, *given, "--out", "own.parquet", *sizes)
    assert "earned anything" not in said
    (theirs,), (ours,) = (read_eval(own / f"{name}.parquet") for name in ("task", "own"))
    assert ours.mean_reward > 0
    assert ours.pass_at_1 == theirs.pass_at_1
    assert (ours.mean_reward, ours.entropy_per_token) == (theirs.mean_reward, theirs.entropy_per_token)
    said = run("eval", checkpoint, "--prompts", "rows.jsonl", "--reward", "rewards:nothing",
               "--out", "zero.parquet", *sizes)  # fmt: skip
    assert "warning: none of 24 responses earned anything. For example: the prompt" in said
    example = json.loads((own / "zero_example.json").read_text())
    assert (example["reward"], example["grader"]) == (0.0, "rewards:nothing")
    shutil.copy(own / "rewards.py", own / "kept.py")
    (own / "rewards.py").write_text((own / "kept.py").read_text() + "\n# changed\n")
    said = run("eval", checkpoint, *given, "--out", "own.parquet", *sizes, "--resume", code=2)
    assert "reward rewards:correct has changed since this run was started" in said


def test_an_entropy_far_from_the_logged_one_is_warned_of(own: Path, checkpoint: Path) -> None:
    """The training's own prompts give its entropy; another template does not."""
    sizes = ["num_prompts=12", "samples_per_prompt=4", "ks=[1]"]
    said = run("eval", checkpoint, "--prompts", "rows.jsonl", "--out", "a.parquet", *sizes)
    assert "the trainer logged" not in said
    strange = ["--prompts", "rows.jsonl", "--template", "aa bb {prompt} ??"]
    said = run("eval", checkpoint, *strange, "--out", "b.parquet", *sizes)
    assert "warning: " in said
    assert "nats per token, and the trainer logged" in said
    assert "likely causes are the prompt or chat template, the temperature" in said
    given = ["--prompts", "rows.jsonl", "--reward", "rewards:correct", "stages=[rollouts]"]
    run("measure", checkpoint, "--config", "small.yaml", *given, "--out", "m")
    found = json.loads((own / "m" / "provenance.json").read_text())["entropy_logged"]
    assert found["doubt"] == ""
    log = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    logged = [entry["entropy"] for entry in log if "entropy" in entry]
    assert found["value"] == pytest.approx(sum(logged) / len(logged))
    assert (found["count"], found["last_step"]) == (len(logged), 4)


def shown(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, ["check", *map(str, args)], env={"COLUMNS": "300"})
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return " ".join(result.output.split())


def test_check_shows_what_is_asked_answered_and_earned_and_what_is_next(own: Path, checkpoint: Path) -> None:
    given = ["--prompts", "rows.jsonl", "--reward", "rewards:correct"]
    text = shown(checkpoint, *given, "update.num_prompts=8")
    prompts = [json.loads(line)["prompt"] for line in (own / "rows.jsonl").read_text().splitlines()]
    _, _, rest = text.partition("a prompt, as the policy gets it")
    prompt, _, rest = rest.partition("its response")
    assert prompt.strip(" ─") in {" ".join(p.split()) for p in prompts}
    assert "by rewards:correct, right answer: " in rest
    assert "rewards of 16 responses by rewards:correct: " in text
    assert "nats per token, the trainer logged" in text
    took = r"measure would take about [\d.]+ (seconds|minutes); [\d.]+ GiB of memory, of [\d.e+]+ GiB"
    assert re.search(took, text)
    asked = "--prompts rows.jsonl --reward rewards:correct"
    assert f"Next: stepscope explain {checkpoint} {asked} update.num_prompts=8" in text
    measure = f"stepscope measure {checkpoint} {asked} --out runs/step-4 update.num_prompts=8"
    assert f"all of it: {measure}" in text
    assert "answers found in 16 responses" in shown(checkpoint)
    text = shown(checkpoint, "--prompts", "rows.jsonl", "--reward", "rewards:nothing")
    assert "all the same make no step" in text
    text = shown(checkpoint, "--prompts", "rows.jsonl", "--reward", "rewards:short", code=2)
    assert "it returned 1 values for 16 responses" in text
    assert "not graded" in text
    assert (
        f"Next: mend what stands against it, then again: stepscope check {checkpoint} --prompts rows.jsonl"
        in text
    )
    foreign = shutil.copytree(checkpoint, own / "foreign")
    settings = json.loads((foreign / "stepscope.json").read_text())
    (foreign / "stepscope.json").write_text(json.dumps(settings | {"task": ""}))
    text = shown(foreign)
    assert f"Next: stepscope check {foreign} --task TASK, or with the run's own: --prompts FILE" in text
    (own / "own.yaml").write_text("prompts: rows.jsonl\nreward: rewards:correct\nquantities: [entropy]\n")
    assert "prompts rows.jsonl: " in shown("own.yaml")
