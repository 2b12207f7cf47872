from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from stepscope.config import LoraConfig, ModelConfig, SftConfig, TinyModelConfig, TrainConfig
from stepscope.errors import ConfigError
from stepscope.policy.loss.settings import StepSettings
from stepscope.tasks import load_task
from stepscope.training.setup.start import starting_model
from stepscope.training.sft import demonstration_rows, warm_up

TASK = load_task("arithmetic:terms=2,digits=1,ops=+")
SETTINGS = StepSettings(max_response_tokens=20)


@pytest.fixture
def shape() -> TinyModelConfig:
    return TinyModelConfig(hidden_size=32, layers=2, heads=2, kv_heads=1, intermediate_size=64)


def train(model_config: ModelConfig, sft: dict[str, Any], out: Path) -> tuple[Any, list[dict[str, float]]]:
    config = TrainConfig(model=model_config, sft=SftConfig.model_validate(sft), rl=None)
    model, tokenizer = starting_model(config.model, seed=0)
    model = warm_up(config, model, tokenizer, TASK, SETTINGS, out)
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return model, [entry for entry in log if "format_rate" in entry]


def test_only_the_completion_is_learnt() -> None:
    _, tokenizer = starting_model(ModelConfig(), seed=0)
    problem = TASK.problems("train")[0]
    row = demonstration_rows(TASK, [problem], tokenizer)[0]
    start = sum(label == -100 for label in row["labels"])
    assert tokenizer.decode(row["input_ids"][:start]) == TASK.prompt(problem, tokenizer)
    assert row["labels"][start:] == row["input_ids"][start:]
    response = tokenizer.decode(row["labels"][start:-1])
    assert TASK.score(problem, response).correct
    assert row["labels"][-1] == tokenizer.eos_token_id


def test_the_warm_up_teaches_the_format_and_then_stops(shape: TinyModelConfig, tmp_path: Path) -> None:
    sft = {
        "examples": 40,
        "epochs": 60,
        "batch_size": 20,
        "check_every": 10,
        "check_prompts": 16,
        "format_threshold": 0.5,
        "optimizer": {"lr": 0.01},
    }
    _, checks = train(ModelConfig(tiny=shape), sft, tmp_path)
    assert checks[0]["format_rate"] < 0.5
    assert all(check["format_rate"] < 0.5 for check in checks[:-1])
    assert checks[-1]["format_rate"] >= 0.5
    assert checks[-1]["step"] < 120


def test_an_adapter_is_merged(shape: TinyModelConfig, tmp_path: Path) -> None:
    sft = {"examples": 20, "batch_size": 10, "check_prompts": 4, "optimizer": {"lr": 0.01}}
    start, _ = starting_model(ModelConfig(tiny=shape), seed=0)
    model, _ = train(ModelConfig(tiny=shape, lora=LoraConfig(r=4)), sft, tmp_path)
    before, after = start.state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed == {name for name in before if name.endswith("_proj.weight")}


def test_held_out_prompts_must_be_left_over(shape: TinyModelConfig, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"exceed the \d+ training problems .* lower sft.examples"):
        train(ModelConfig(tiny=shape), {"examples": 10_000, "check_prompts": 64}, tmp_path)
