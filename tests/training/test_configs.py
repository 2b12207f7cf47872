from __future__ import annotations

from importlib.resources import files
from pathlib import Path

import pytest

from stepscope.config import ModelConfig, RlConfig, TrainConfig, load_config
from stepscope.errors import ConfigError
from stepscope.training.rl import grpo_arguments, step_settings
from stepscope.training.setup.start import resolve_source, starting_model

CONFIGS = Path(__file__).parents[2] / "configs"


def test_the_original_study_loads(tmp_path: Path) -> None:
    config = load_config(TrainConfig, CONFIGS / "gsm8k_qwen2.5_1.5b.yaml")
    assert config.model.source == "Qwen/Qwen2.5-1.5B"
    assert config.model.lora is not None
    assert config.rl is not None
    assert (config.rl.prompts_per_step, config.rl.group_size) == (256, 8)
    assert (config.rl.steps, config.rl.save_every) == (64, 10)
    assert (config.rl.max_response_tokens, config.rl.temperature) == (200, 0.7)
    assert config.rl.optimizer.lr == 2e-6
    arguments = grpo_arguments(config, config.rl, step_settings(config), tmp_path)
    assert arguments.generation_batch_size == 2048
    assert arguments.gradient_accumulation_steps == arguments.steps_per_generation
    assert arguments.num_iterations == 1
    assert (arguments.top_p, arguments.top_k) == (1.0, 0)


@pytest.mark.parametrize(("name", "weighted"), [("gsm8k_smollm2.yaml", True), ("long_responses.yaml", False)])
def test_the_other_configurations_load(name: str, weighted: bool) -> None:
    config = load_config(TrainConfig, CONFIGS / name)
    assert config.sft is not None
    assert config.rl is not None
    assert (config.format_weight > 0) == weighted


def test_the_demo_loads_from_the_package() -> None:
    config = load_config(TrainConfig, Path(str(files("stepscope") / "presets" / "demo.yaml")))
    assert config.model.source == "tiny"
    assert config.task == "arithmetic"
    assert config.rl is not None
    assert config.rl.steps >= 40


def test_micro_batches_must_divide_the_step() -> None:
    with pytest.raises(ValueError, match="micro_batch_size 48 does not divide the 128 sequences"):
        RlConfig(micro_batch_size=48)
    with pytest.raises(ValueError, match="bnpo averages over a micro-batch"):
        RlConfig(loss_type="bnpo", micro_batch_size=64)


def test_a_package_is_a_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "some_model").mkdir()
    (tmp_path / "some_model" / "__init__.py").touch()
    (tmp_path / "some_model" / "weights.gguf").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert resolve_source("package:some_model/weights.gguf") == str(tmp_path / "some_model" / "weights.gguf")
    assert resolve_source("Qwen/Qwen2.5-1.5B") == "Qwen/Qwen2.5-1.5B"
    with pytest.raises(ConfigError, match=r"no package 'no_such_model' is installed"):
        starting_model(ModelConfig(source="package:no_such_model/weights.gguf"), seed=0)
    with pytest.raises(ConfigError, match=r"missing.gguf does not exist"):
        resolve_source("package:some_model/missing.gguf")
