"""Data of tasks from end to end: batches exclude each other by text, and runs keep to their data."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from stepscope import cli
from stepscope.results import read_table, same_text
from stepscope.runs import read_json
from stepscope.tasks import load_task

TRAINING = """
model:
  source: tiny
  tiny: {{hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32}}
task: "jsonl:{data}"
template: short
sft: null
rl: {{group_size: 2, prompts_per_step: 2, micro_batch_size: 4, max_response_tokens: 4, max_resample: 0,
     steps: 1, save_every: 1, report_to: []}}
"""
BATCHES = ["update.num_prompts=4", "update.group_size=4", "probe.num_prompts=12", "lrs=[1e-5]",
           "second_order=false", "baseline=none"]  # fmt: skip


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twenty-four sums that both splits ask, in the training split with other white space."""
    folder = tmp_path / "sums"
    folder.mkdir()
    problems = load_task("arithmetic:terms=2,digits=2,ops=+").problems("train")[:24]
    for split, tail in (("train", ""), ("test", "\r\n")):
        rows = [json.dumps({"prompt": p.question + tail, "answer": int(p.answer)}) for p in problems]
        (folder / f"{split}.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def edited(data: Path) -> Callable[[], Path]:
    """Change one answer of the training split, or put it back."""
    file = data / "train.jsonl"
    before = file.read_text()

    def toggle() -> Path:
        now = file.read_text()
        row = json.loads(before.splitlines()[0])
        longer = before + "\n" + json.dumps({"prompt": "1+1", "answer": 2})
        assert row["answer"]
        file.write_text(longer if now == before else before)
        return data

    return toggle


def stepscope(*args: object, code: int = 0) -> str:
    result = CliRunner().invoke(cli.app, [*map(str, args)])
    assert result.exit_code == code, (result.output, result.exception)
    return result.stderr


def refused(*args: object, what: object) -> None:
    """One line, exit code 2, and nothing changed in the run folder."""
    said = [line for line in stepscope(*args, code=2).splitlines() if not line.startswith("warning:")]
    assert len(said) == 1, said
    assert f"{what}: the data of task jsonl:" in said[0]
    assert "have changed since then" in said[0]


def test_measure(checkpoint: Path, data: Path, edited: Callable[[], Path], tmp_path: Path) -> None:
    """The probe's prompts are none of the update's, whatever their ids; other data are not measured on."""
    out = tmp_path / "m"
    call = ["measure", checkpoint, "--task", f"jsonl:{data}", "--out", out, *BATCHES,
            "loss={prompt_template: short}"]  # fmt: skip
    said = stepscope(*call, "--stages", "rollouts")
    assert "warning: task jsonl:" in said
    assert "24 question(s) of the test split are asked in the training split, too" in said
    update, probe = (
        {same_text(text) for text in read_table(out / f"{name}.parquet")["question"].to_pylist()}
        for name in ("update", "probe")
    )
    assert (len(update), len(probe)) == (4, 12)
    assert not update & probe
    provenance = read_json(out / "provenance.json")
    assert provenance["task_data"] == {f"jsonl:{data}": load_task(f"jsonl:{data}").digest}
    edited()
    refused(*call, "--resume", "--stages", "rollouts,step", what=out)
    assert read_json(out / "provenance.json") == provenance
    edited()
    stepscope(*call, "--resume", "--stages", "step")


def test_eval(checkpoint: Path, data: Path, edited: Callable[[], Path], tmp_path: Path) -> None:
    out = tmp_path / "eval.parquet"
    call = ["eval", checkpoint, "--task", f"jsonl:{data}", "--out", out, "num_prompts=4",
            "samples_per_prompt=2", "ks=[1]", "loss={prompt_template: short}"]  # fmt: skip
    stepscope(*call)
    edited()
    refused(*call, "--resume", what=tmp_path / "eval_parts")
    edited()
    stepscope(*call, "--resume")


def test_train_and_check(data: Path, edited: Callable[[], Path], tmp_path: Path) -> None:
    """Refused by the run folder, and by the checkpoint where there is no record in the folder."""
    from stepscope.config import TrainConfig, load_config
    from stepscope.errors import TaskError
    from stepscope.training import train

    config, out = tmp_path / "c.yaml", tmp_path / "run"
    config.write_text(TRAINING.format(data=data))
    shown = CliRunner().invoke(cli.app, ["check", str(config)]).output
    assert "24 question(s) of the test split are asked" in " ".join(shown.split())
    stepscope("train", config, "--out", out)
    last = out / "checkpoints" / "step-1"
    assert read_json(last / "stepscope.json")["task_digest"] == load_task(f"jsonl:{data}").digest
    edited()
    refused("train", config, "--out", out, "--resume", what=out)
    with pytest.raises(TaskError, match="step-1: the data of task"):
        train(load_config(TrainConfig, config, [], {"out": str(out)}), out, resume=True)
    said = stepscope("eval", last, "num_prompts=2", "samples_per_prompt=1", "ks=[1]")
    assert "have changed since the training" in said


def test_study(checkpoint: Path, data: Path, edited: Callable[[], Path], tmp_path: Path) -> None:
    config, out = tmp_path / "s.yaml", tmp_path / "study"
    batches = {"update": {"num_prompts": 4, "group_size": 4}, "probe": {"num_prompts": 6}}
    measure = {
        "task": f"jsonl:{data}",
        "lrs": [1e-5],
        "second_order": False,
        "baseline": "none",
        "loss": {"prompt_template": "short"},
    }
    settings = {"checkpoints": [str(checkpoint)], "measure": measure | batches}
    config.write_text(json.dumps(settings))
    stepscope("study", config, "--out", out)
    edited()
    refused("study", config, "--out", out, what=out)
    edited()
    stepscope("study", config, "--out", out)
