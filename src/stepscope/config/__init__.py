"""Strict, frozen configurations, one per verb, and how they are read."""

from __future__ import annotations

from stepscope.config.loading import (
    build_config,
    dump_config,
    load_config,
    parse_yaml,
    set_path,
)
from stepscope.config.measure import (
    STAGES,
    BatchConfig,
    EvalConfig,
    LossConfig,
    MeasureConfig,
    MeasureSettings,
    ProbeConfig,
    Stage,
    StudyConfig,
    UpdateConfig,
)
from stepscope.config.train import (
    LoraConfig,
    ModelConfig,
    OptimizerConfig,
    RlConfig,
    SftConfig,
    TinyModelConfig,
    TrainConfig,
)

__all__ = [
    "STAGES",
    "BatchConfig",
    "EvalConfig",
    "LoraConfig",
    "LossConfig",
    "MeasureConfig",
    "MeasureSettings",
    "ModelConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "RlConfig",
    "SftConfig",
    "Stage",
    "StudyConfig",
    "TinyModelConfig",
    "TrainConfig",
    "UpdateConfig",
    "build_config",
    "dump_config",
    "load_config",
    "parse_yaml",
    "set_path",
]
