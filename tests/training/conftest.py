"""Small trainings, shared by the tests that look at what they left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

from stepscope.config import TrainConfig, build_config

TINY = {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64}


def small_config(**changes: Any) -> TrainConfig:
    """A training of seconds; ``changes`` replace whole sections."""
    settings: dict[str, Any] = {
        "model": {"source": "tiny", "tiny": TINY},
        "task": "arithmetic:terms=2,digits=1,ops=+",
        "format_weight": 0.1,
        "sft": {
            "examples": 40,
            "epochs": 12,
            "batch_size": 20,
            "check_every": 8,
            "check_prompts": 16,
            "format_threshold": 1.0,
            "optimizer": {"lr": 0.01},
        },
        "rl": {
            "group_size": 4,
            "prompts_per_step": 4,
            "micro_batch_size": 8,
            "max_response_tokens": 20,
            "max_resample": 1,
            "steps": 4,
            "save_every": 2,
            "optimizer": {"lr": 0.001, "weight_decay": 0.01},
        },
    }
    return build_config(TrainConfig, settings | changes)


@pytest.fixture(name="small_config", scope="session")
def _small_config() -> Callable[..., TrainConfig]:
    return small_config


@pytest.fixture(scope="session")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of :func:`small_config`."""
    from stepscope.training import train

    out = tmp_path_factory.mktemp("run") / "small"
    train(small_config(), out)
    return out


def probed_config(probe: dict[str, Any], **rl: Any) -> TrainConfig:
    """The training of :func:`small_config` with a probe; ``rl`` changes single settings."""
    settings = small_config().rl
    assert settings is not None
    return small_config(rl=settings.model_dump() | {"probe": probe} | rl)


def start_from(run: Path, out: Path) -> Path:
    """A new run folder that has the warm-up of ``run`` behind it."""
    out.mkdir()
    shutil.copytree(run / "base", out / "base")
    return out


@pytest.fixture(scope="session")
def every_step() -> TrainConfig:
    """The configuration of :func:`small_run` with a probe at every step."""
    return probed_config({"every": 1, "num_prompts": 8, "top_tokens": 3})


@pytest.fixture(scope="session")
def probed_run(every_step: TrainConfig, small_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``small_run`` again, from the same warm-up, with a probe at every step."""
    from stepscope.training import train

    out = start_from(small_run, tmp_path_factory.mktemp("probed") / "run")
    train(every_step, out, resume=True)
    return out


@pytest.fixture(name="probed_config", scope="session")
def _probed_config() -> Callable[..., TrainConfig]:
    return probed_config


@pytest.fixture(name="start_from", scope="session")
def _start_from() -> Callable[[Path, Path], Path]:
    return start_from
