"""The gallery under pytest: every notebook is executed by nbmake on one small run, trained for all of them.

``STEPSCOPE_RUN`` names another run folder to execute them on.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

RUN = "STEPSCOPE_RUN"

TRAINING: dict[str, Any] = {
    "model": {
        "source": "tiny",
        "tiny": {"hidden_size": 32, "layers": 2, "heads": 2, "kv_heads": 1, "intermediate_size": 64},
    },
    "task": "arithmetic:terms=2,digits=2,ops=+",
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
        "micro_batch_size": 16,
        "max_response_tokens": 24,
        "max_resample": 1,
        "steps": 2,
        "save_every": 2,
        "optimizer": {"lr": 0.001, "weight_decay": 0.01},
        "report_to": [],
    },
}


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Every notebook finds the run and leaves no plotly.js in its outputs."""
    worker = getattr(item.config, "workerinput", {"testrunuid": str(os.getpid())})
    given = {
        RUN: str(trained(worker["testrunuid"])),
        "PLOTLY_RENDERER": "plotly_mimetype",
        "OMP_NUM_THREADS": "1",
    }
    before = {name: os.environ.get(name) for name in given}
    os.environ.update(given)
    try:
        return (yield)
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def trained(session: str) -> Path:
    """The run folder, made by the first process of a session that asks for it."""
    if RUN in os.environ:
        return Path(os.environ[RUN]).resolve()
    base = Path(tempfile.gettempdir()) / f"stepscope-notebooks-{session}"
    with FileLock(f"{base}.lock"):
        if not (base / "done").is_file():
            from stepscope.config import TrainConfig, build_config
            from stepscope.pipeline import run_train

            run_train(build_config(TrainConfig, TRAINING | {"out": str(base / "run")}))
            (base / "done").touch()
    return base / "run"
