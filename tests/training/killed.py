"""Trainings in processes of their own, to be killed, and what two trainings have to share to the bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from stepscope.config import TrainConfig


def write_config(config: TrainConfig, folder: Path) -> Path:
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    return path


SCRIPT = """
import sys
from pathlib import Path
from stepscope.config import TrainConfig, load_config
from stepscope.training import train
config = load_config(TrainConfig, Path(sys.argv[1]))
print("ready", flush=True)
train(config, Path(sys.argv[2]), resume=True)
"""


def start(config: Path, out: Path) -> subprocess.Popen[str]:
    """A training in a process of its own that has imported everything."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(config), str(out)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def kill(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None, f"the training ended without {path}"
        time.sleep(0.005)


def same_state(one: Path, two: Path) -> None:
    """Weights, moments, schedule and random states of two checkpoints are the same bits."""
    weights, others = (load_file(folder / "model.safetensors") for folder in (one, two))
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        assert_same(*(torch.load(folder / name, weights_only=False) for folder in (one, two)))


def assert_same(one: Any, two: Any) -> None:
    assert type(one) is type(two)
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_same(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two, strict=True):
            assert_same(left, right)
    elif hasattr(one, "tobytes"):
        assert one.tobytes() == two.tobytes()
    else:
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two


def with_ten_kills(config: Path, once: Path, often: Path) -> int:
    """A training, and the same killed ten times at random moments, and how often it was at work then."""
    begin = time.perf_counter()
    finish(start(config, once))
    seconds = time.perf_counter() - begin
    moments, kills = random.Random(0), 0
    for _ in range(10):
        process = start(config, often)
        try:
            process.wait(timeout=moments.uniform(0.0, 1 / 6) * seconds)
        except subprocess.TimeoutExpired:
            kill(process)
            kills += 1
    finish(start(config, often))
    return kills


def finish(process: subprocess.Popen[str]) -> None:
    process.communicate()
    assert process.returncode == 0
