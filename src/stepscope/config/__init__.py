"""Strict, frozen configurations, one per verb, and how they are read."""

from __future__ import annotations

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
    "LoraConfig",
    "ModelConfig",
    "OptimizerConfig",
    "RlConfig",
    "SftConfig",
    "TinyModelConfig",
    "TrainConfig",
]
