"""Strict, frozen configurations, one per verb, and how they are read."""

from __future__ import annotations

from stepscope.config.base import Section
from stepscope.config.evaluate import EvalConfig, EvalSettings
from stepscope.config.ledger import LedgerConfig
from stepscope.config.loading import (
    apply_overrides,
    build_config,
    dump_config,
    load_config,
    read_yaml,
    set_path,
)
from stepscope.config.measure import (
    STAGES,
    Asking,
    BatchConfig,
    CriteriaConfig,
    CurvatureConfig,
    LossConfig,
    MeasureConfig,
    MeasureSettings,
    ProbeConfig,
    Stage,
    StepKinshipConfig,
    UpdateConfig,
)
from stepscope.config.objectives import CurriculumConfig, EntropyBonusConfig, ObjectiveConfig
from stepscope.config.optimizer import OptimizerConfig
from stepscope.config.preferences import HypoConfig
from stepscope.config.sampler import SamplerConfig
from stepscope.config.study import RayConfig, SlurmConfig, StudyConfig
from stepscope.config.train import (
    LoraConfig,
    ModelConfig,
    RlConfig,
    SftConfig,
    StepProbeConfig,
    TinyModelConfig,
    TrainConfig,
)
from stepscope.config.what_if import WhatIfConfig

__all__ = [
    "STAGES",
    "Asking",
    "BatchConfig",
    "CriteriaConfig",
    "CurriculumConfig",
    "CurvatureConfig",
    "EntropyBonusConfig",
    "EvalConfig",
    "EvalSettings",
    "HypoConfig",
    "LedgerConfig",
    "LoraConfig",
    "LossConfig",
    "MeasureConfig",
    "MeasureSettings",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "ProbeConfig",
    "RayConfig",
    "RlConfig",
    "SamplerConfig",
    "Section",
    "SftConfig",
    "SlurmConfig",
    "Stage",
    "StepKinshipConfig",
    "StepProbeConfig",
    "StudyConfig",
    "TinyModelConfig",
    "TrainConfig",
    "UpdateConfig",
    "WhatIfConfig",
    "apply_overrides",
    "build_config",
    "dump_config",
    "load_config",
    "read_yaml",
    "set_path",
]
