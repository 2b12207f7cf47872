"""One small training, shared by the tests that look at what it left."""

from __future__ import annotations

import os
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
