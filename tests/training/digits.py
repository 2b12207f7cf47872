"""A task that an untrained policy solves a little: write digits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.config import ModelConfig, TinyModelConfig, TrainConfig, build_config
from stepscope.tasks.problem import Problem, Score
from stepscope.training.rl import reinforce
from stepscope.training.setup.start import starting_model

SHAPE = TinyModelConfig(hidden_size=16, layers=1, heads=2, kv_heads=1, intermediate_size=32)


@dataclass(frozen=True)
class DigitTask:
    """Rewards digits; problems numbered below ``num_dead`` reward nothing. Two digits are an answer."""

    num_dead: int
    size: int = 32
    spec: str = "digits"

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"digits/{split}/{i}", str(i), "") for i in range(self.size)]

    def prompt(self, problem: Problem, tokenizer: Any) -> str:
        return problem.question + "="

    def score(self, problem: Problem, response: str) -> Score:
        alive = int(problem.question) >= self.num_dead
        digits = sum(c.isdigit() for c in response)
        return Score(alive * digits / 40, bool(alive and digits >= 2), self.formatted(response))

    def formatted(self, response: str) -> bool:
        return bool(response)

    def demonstration(self, problem: Problem) -> str:
        raise AssertionError("no warm-up here")


def log_of(checkpoint: Path) -> list[dict[str, Any]]:
    """The log entries of the optimizer steps that led to a checkpoint."""
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "grad_norm" in entry]


def digit_config(*, dtype: str = "float32", **rl: Any) -> TrainConfig:
    """Two steps on batches of four prompts; ``rl`` changes the section."""
    settings = {
        "group_size": 4,
        "prompts_per_step": 4,
        "micro_batch_size": 8,
        "max_response_tokens": 16,
        "steps": 2,
        "save_every": 2,
        "max_resample": 1,
        "report_to": [],
        "optimizer": {"lr": 1e-3},
    }
    model = ModelConfig(tiny=SHAPE).model_dump() | {"dtype": dtype}
    return build_config(TrainConfig, {"model": model, "sft": None, "rl": settings | rl})


def reinforced(config: TrainConfig, out: Path, task: DigitTask, *, resume: Path | None = None) -> Path:
    """Train from an untrained policy and return the last checkpoint."""
    model, tokenizer = starting_model(config.model, seed=0)
    reinforce(config, model, tokenizer, task, out, resume=resume)
    assert config.rl is not None
    return out / "checkpoints" / f"step-{config.rl.steps}"
