"""Two processes, as on two GPUs: the batch of a step and its dead groups are shared between them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from stepscope.policy.checkpoint import load_checkpoint

SCRIPT = """
import sys
from pathlib import Path
from stepscope.config import TrainConfig, load_config
from stepscope.training import train
train(load_config(TrainConfig, Path(sys.argv[1])), Path(sys.argv[2]))
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
"""


@pytest.mark.slow
def test_two_processes_share_a_step(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*command, str(tmp_path / "script.py"), str(tmp_path / "config.yaml"), str(tmp_path / "run")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = (load_checkpoint(tmp_path / "run" / "checkpoints" / f"step-{n}") for n in (1, 2))
    assert (first.step, second.step) == (1, 2)
    assert second.settings.prompts_per_step == 3
    moved = [n for n in first.parameters if not torch.equal(first.parameters[n], second.parameters[n])]
    assert moved
