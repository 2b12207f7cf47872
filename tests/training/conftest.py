"""Small trainings, shared by the tests that look at what they left."""

from __future__ import annotations

from pathlib import Path

import pytest

import cases
from stepscope.config import TrainConfig


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of :func:`cases.training`."""
    from stepscope.training import train

    out = tmp_path_factory.mktemp("run") / "small"
    train(cases.training(), out)
    return out


@pytest.fixture(scope="session")
def every_step() -> TrainConfig:
    """The configuration of :func:`small_run` with a probe at every step."""
    return cases.training(rl={"probe": {"every": 1, "num_prompts": 8, "top_tokens": 3}})


@pytest.fixture(scope="session")
def probed_run(every_step: TrainConfig, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_run`` again, from the same warm-up, with a probe at every step."""
    from stepscope.training import train

    out = cases.start_from(small_run, tmp_path_factory.mktemp("probed") / "run")
    train(every_step, out, resume=True)
    return out
