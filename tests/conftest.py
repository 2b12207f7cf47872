"""Shared fixtures: a tiny policy, and a small training that is made once for all that read checkpoints."""
# ruff: noqa: E402 (what comes before the imports is for them)

from __future__ import annotations

import gc
import os

gc.disable()  # until everything is imported, of which nothing goes
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import settings

import cases
from stepscope.config import TrainConfig, load_config
from stepscope.policy.state import Policy

torch.set_num_threads(1)
settings.register_profile("any machine", deadline=None)  # a busy one is slow, not wrong
settings.load_profile("any machine")


def pytest_collection_finish() -> None:
    """Set what the tests have imported apart from what is collected: a third less processor time for most."""
    gc.freeze()
    gc.enable()


@pytest.fixture
def tiny_policy() -> Policy:
    """A float64 policy with AdamW state."""
    return cases.policy()


@pytest.fixture(scope="session")
def small_training(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration file whose training takes seconds."""
    path = tmp_path_factory.mktemp("config") / "small.yaml"
    larger = {"micro_batch_size": 16, "max_response_tokens": 24, "report_to": []}
    sums = {"task": "arithmetic:terms=2,digits=2,ops=+", "rl": cases.TRAINING["rl"] | larger}
    path.write_text(yaml.safe_dump(cases.TRAINING | sums))
    return path


@pytest.fixture(scope="session")
def trained_run(small_training: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of a real small training: warm-up, then four steps of reinforcement learning."""
    from stepscope.pipeline import run_train

    out = tmp_path_factory.mktemp("trained") / "run"
    run_train(load_config(TrainConfig, small_training, [], {"out": str(out)}))
    return out


@pytest.fixture(scope="session")
def recorded(small_training: Path, trained_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five recorded steps after the warm-up of ``trained_run``, clipped, with every second whole state."""
    from stepscope.config import build_config
    from stepscope.training import train

    out = cases.start_from(trained_run, tmp_path_factory.mktemp("recorded") / "run")
    plain = yaml.safe_load(small_training.read_text())
    optimizer = {"lr": 3e-4, "weight_decay": 0.1, "max_grad_norm": 0.02}
    plain["rl"] |= {"steps": 5, "save_every": 5, "record": {"state_every": 2}, "optimizer": optimizer}
    train(build_config(TrainConfig, plain), out, resume=True)
    return out


@pytest.fixture(scope="session")
def checkpoint(trained_run: Path) -> Path:
    """The last checkpoint of the small training; not to be changed, copy it."""
    return trained_run / "checkpoints" / "step-4"


@pytest.fixture(scope="session")
def tiny_measurement(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a real measurement of every stage, small; not to be changed, copy it."""
    from stepscope.config import MeasureConfig, build_config
    from stepscope.pipeline import run_measure

    out = tmp_path_factory.mktemp("measurement") / "step-4"
    settings = cases.MEASUREMENT | {"checkpoint": str(checkpoint), "out": str(out)}
    run_measure(build_config(MeasureConfig, settings))
    return out
