"""Two processes, as on two GPUs: what they do together is what one process does with the same batch."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from recorded_steps import errors_of_gradients

import cases
from stepscope.config import MeasureConfig, build_config
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline import run_measure
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.recorded import RecordedTraining
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts, read_table

SCRIPT = """
import json, os, sys
from pathlib import Path
import torch
from stepscope.config import MeasureConfig, TrainConfig, build_config, load_config
from stepscope.pipeline import run_measure, run_train
from stepscope.training.rl import OnPolicyTrainer

folder, rank = Path(sys.argv[1]), os.environ["RANK"]
generate = OnPolicyTrainer._generate_and_score_completions

def recorded(self, inputs):
    output = generate(self, inputs)
    torch.save(dict(output), folder / f"batch-{self.state.global_step}-{rank}.pt")
    return output

OnPolicyTrainer._generate_and_score_completions = recorded
run_train(load_config(TrainConfig, folder / "config.yaml", [], {"out": str(folder / "run")}))
run_measure(build_config(MeasureConfig, json.loads((folder / "measure.json").read_text())))
"""

CONFIG = """
model: {source: tiny, tiny: {hidden_size: 16, layers: 1, heads: 2, kv_heads: 1, intermediate_size: 32}}
task: "arithmetic:terms=2,ops=+"
format_weight: 0.5
sft:
  {examples: 40, epochs: 15, batch_size: 10, check_every: 30, check_prompts: 16, optimizer: {lr: 0.01}}
rl:
  group_size: 4
  prompts_per_step: 3
  micro_batch_size: 2
  max_response_tokens: 20
  max_resample: 2
  steps: 2
  save_every: 1
  probe: {every: 1, num_prompts: 8}
  record: {state_every: 4}
  optimizer: {lr: 0.001, weight_decay: 0.01, max_grad_norm: 0.01}
"""


def batch_of(folder: Path, step: int, policy: Policy) -> Rollouts:
    """The batch that both processes sampled before ``step``, as one."""
    parts = [torch.load(folder / f"batch-{step}-{rank}.pt", weights_only=False) for rank in (0, 1)]
    settings = policy.settings
    return cases.from_trl(
        parts, temperature=settings.temperature, max_response_tokens=settings.max_response_tokens
    )


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(CONFIG)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-1"
    settings = {
        "checkpoint": str(checkpoint),
        "out": str(tmp_path / "two"),
        "stages": ["rollouts", "step", "change"],
        "update": {"num_prompts": 4, "group_size": 4},
        "probe": {"num_prompts": 8},
    }
    (tmp_path / "measure.json").write_text(json.dumps(settings))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]

    policy, after = load_checkpoint(checkpoint), load_checkpoint(checkpoint.with_name("step-2"))
    assert (policy.step, after.step, after.settings.prompts_per_step) == (1, 2, 3)
    update = batch_of(tmp_path, 1, policy)
    assert update.num_prompts == 3
    logprobs, entropies = score_rollouts(policy, update)
    update = replace(update, logprobs=logprobs, entropies=entropies)
    step = reconstruct_step(policy, update)
    assert step.clip_coefficient < 1
    moved = {n: (after.parameters[n] - p).detach() for n, p in policy.parameters.items()}
    expected = vectors.scale(step.direction, step.lr)
    missed = vectors.norm(vectors.add(moved, vectors.scale(expected, -1.0)))
    assert missed < 1e-3 * vectors.norm(expected)

    probes = read_table(tmp_path / "run" / "probes.parquet").to_pylist()
    assert [row["step"] for row in probes] == [1, 2]
    assert probes[1]["grad_norm"] == pytest.approx(0.01, rel=1e-3)
    assert not any("token weights give" in row["noise_scale_reason"] for row in probes)

    training = RecordedTraining.load(tmp_path / "run")
    assert training.folder.record.complete
    recorded = training.step(2)
    assert sorted(recorded.rollouts.response_token_ids) == sorted(update.response_token_ids)
    assert all(torch.equal(p, recorded.after.parameters[n]) for n, p in after.parameters.items())
    assert max(errors_of_gradients(training, policy.model, policy.tokenizer)) < 1e-5

    run_measure(build_config(MeasureConfig, settings | {"out": str(tmp_path / "one")}))
    two, one = (json.loads((tmp_path / out / "summary.json").read_text()) for out in ("two", "one"))
    assert one.keys() == two.keys()
    assert {k: v for k, v in one.items() if "seconds" not in k} == {
        k: v for k, v in two.items() if "seconds" not in k
    }


PROBED = """
import sys
from pathlib import Path
from test_probes_source import make_trainer, plain_rows
import stepscope as ss

run, out = map(Path, sys.argv[1:])
probe = ss.StepProbe(every=2, num_prompts=8)
sizes = {"max_steps": 4, "per_device_train_batch_size": 4, "logging_steps": 10}
make_trainer(run / "base", out, probe, rows=plain_rows(), **sizes).train()
"""


@pytest.mark.slow
def test_a_probe_in_two_processes_that_log_rarely(small_run: Path, tmp_path: Path) -> None:
    """Every process logs the steps that are probed, or their collectives would not meet."""
    (tmp_path / "script.py").write_text(PROBED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    threads = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(small_run), str(tmp_path / "out")],
        env={**os.environ, **threads, "PYTHONPATH": str(Path(__file__).parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    rows = read_table(tmp_path / "out" / "probes.parquet").to_pylist()
    assert [row["step"] for row in rows] == [1, 3]
    for row in rows:
        assert row["prompts"] == "train_dataset without the prompts of the batch"
        assert row["reward_reason"] == "the responses are not graded"
        assert row["entropy_logged"] == pytest.approx(row["entropy"], rel=0.4)
