"""A tokenizer of single characters, every architecture, and a tiny task that needs no file."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from transformers import PreTrainedTokenizerFast

import cases
import stepscope
from stepscope.tasks.problem import Problem, Score


@dataclass(frozen=True)
class LetterTask:
    """Reward is the share of digits in the response, so that a random policy has reward variance."""

    size: int = 32
    spec: str = "letters"

    def formatted(self, response: str) -> bool:
        return bool(response)

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"letters/{split}/{i}", f"{i}+{i % 7}=", str(i + i % 7)) for i in range(self.size)]

    def prompt(self, problem: Problem, tokenizer: Any) -> str:
        return problem.question

    def score(self, problem: Problem, response: str) -> Score:
        digits = sum(c.isdigit() for c in response)
        return Score(round(digits / max(len(response), 1), 3), problem.answer in response, bool(response))

    def demonstration(self, problem: Problem) -> str:
        return problem.answer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return cases.tokenizer()


@pytest.fixture(params=cases.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def letters() -> LetterTask:
    return LetterTask()


@pytest.fixture(scope="session", params=[3, pytest.param(2, marks=pytest.mark.slow)])
def written(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every layout of ``sharded_writers.py``, of one state; not to be changed, copy it."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    out, count = shared / f"sharded-{request.param}", str(request.param)
    with FileLock(f"{out}.lock"):  # written once for all workers
        if not (out / "done").exists():
            _write_sharded(out, count)
    return out / count


def _write_sharded(out: Path, count: str) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(here.parent), str(Path(stepscope.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, str(here / "sharded_writers.py"), str(out), count],
        env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (out / "done").touch()
