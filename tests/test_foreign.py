"""`stepscope measure` on checkpoints of a plain TRL script that has never heard of stepscope."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from stepscope import cli
from stepscope.tasks import load_task

TASK = "arithmetic:terms=2,digits=2,ops=+"
SETTINGS = [
    "--task", TASK, "loss.format_weight=0.1", "update.num_prompts=6", "update.group_size=4",
    "probe.num_prompts=12", "batch_size=64", "second_order=false",
]  # fmt: skip

SCRIPT = """
import json, sys
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

base, prompts, out = sys.argv[1:]
data = Dataset.from_list([{"prompt": p} for p in json.load(open(prompts))])

def brevity(completions, **kwargs):
    return [-len(c) / 50 + c.count("<answer>") for c in completions]

for name, peft in (("full", None), ("lora", LoraConfig(r=4, target_modules="all-linear"))):
    args = GRPOConfig(
        output_dir=f"{out}/{name}", per_device_train_batch_size=16, num_generations=4,
        max_completion_length=24,
        max_steps=2, save_steps=1, learning_rate=1e-3, weight_decay=0.01, report_to=[], use_cpu=True,
        disable_tqdm=True, temperature=0.9,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(base),
        processing_class=AutoTokenizer.from_pretrained(base, padding_side="left"),
        args=args, train_dataset=data, reward_funcs=brevity, peft_config=peft,
    )
    trainer.train()
assert "stepscope" not in sys.modules
"""


def measure(checkpoint: Path, out: Path):
    return CliRunner().invoke(cli.app, ["measure", str(checkpoint), "--out", str(out), *SETTINGS])


@pytest.fixture(scope="module")
def foreign(trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of the script: full fine-tuning and LoRA, from a base that keeps the answer format."""
    folder = tmp_path_factory.mktemp("foreign")
    task = load_task(TASK)
    prompts = [task.prompt(problem, None) for problem in task.problems("train")[:64]]
    (folder / "prompts.json").write_text(json.dumps(prompts))
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "script.py", str(trained_run / "base"), "prompts.json", str(folder)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", ["full", "lora"])
def test_measure(foreign, name, tmp_path):
    checkpoint = foreign / name / "checkpoint-1"
    assert not (checkpoint / "stepscope.json").exists()
    result = measure(checkpoint, tmp_path / "m")
    assert result.exit_code == 0, (result.output, result.exception)
    step = json.loads((tmp_path / "m" / "step.json").read_text())
    assert step["lr"] == pytest.approx(5e-4), "the second of two steps of a linear schedule"
    summary = json.loads((tmp_path / "m" / "summary.json").read_text())
    assert summary["share_momentum"]["value"] != 0
    assert summary["share_sequences"]["value"] > 0
    assert (tmp_path / "m" / "report.html").is_file()
    for batch in ("update", "probe"):
        responses = pq.read_table(tmp_path / "m" / f"{batch}.parquet")["response"].to_pylist()
        tokens = pq.read_table(tmp_path / "m" / f"{batch}_tokens.parquet").to_pydict()
        joined = [""] * len(responses)
        for sequence, token in zip(tokens["sequence_id"], tokens["token"], strict=True):
            joined[sequence] += token
        assert joined == responses


def test_measure_at_the_end_of_the_schedule(foreign, tmp_path):
    """The next learning rate is 0: the change is given at the initial one, and says so."""
    result = measure(foreign / "full" / "checkpoint-2", tmp_path / "m")
    assert result.exit_code == 0, (result.output, result.exception)
    assert json.loads((tmp_path / "m" / "step.json").read_text())["lr"] == 0
    change = json.loads((tmp_path / "m" / "change.json").read_text())
    assert [p["lr"] for p in change["points"]] == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
    entry = json.loads((tmp_path / "m" / "summary.json").read_text())["change_true_per_token"]
    assert entry["value"] == change["points"][3]["true"]["value"]
    assert not entry["reliable"]
    assert "own learning rate is 0" in entry["reason"]


def test_loss_settings_by_flags_where_the_run_kept_none(foreign, tmp_path):
    checkpoint = Path(shutil.copytree(foreign / "full" / "checkpoint-1", tmp_path / "checkpoint-1"))
    (checkpoint / "training_args.bin").unlink()
    args = ["measure", str(checkpoint), "--out", str(tmp_path / "m"), *SETTINGS, "--stages", "rollouts,step"]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 2
    assert "loss_type" in result.stderr
    flags = [
        "loss_type=dapo",
        "scale_rewards=group",
        "temperature=0.9",
        "max_response_tokens=24",
        "max_grad_norm=1.0",
    ]
    result = CliRunner().invoke(cli.app, [*args, *(f"loss.{flag}" for flag in flags)])
    assert result.exit_code == 0, (result.output, result.exception)
    with_flags = (tmp_path / "m" / "direction.safetensors").read_bytes()
    args[1:4] = [str(foreign / "full" / "checkpoint-1"), "--out", str(tmp_path / "own")]
    assert CliRunner().invoke(cli.app, args).exit_code == 0
    assert (tmp_path / "own" / "direction.safetensors").read_bytes() == with_flags


def test_run_folder_of_the_trainer_is_evaluated(foreign, tmp_path):
    args = [
        "eval",
        str(foreign / "lora"),
        "--task",
        TASK,
        "--out",
        str(tmp_path / "e.parquet"),
        "num_prompts=4",
    ]
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 0, (result.output, result.exception)
