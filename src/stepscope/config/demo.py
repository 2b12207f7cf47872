"""Configuration of ``stepscope demo``: a training, its evaluation and the measurement of two checkpoints."""

from __future__ import annotations

from stepscope.config.base import Section
from stepscope.config.measure import EvalSettings, MeasureSettings
from stepscope.config.train import TrainConfig


class DemoConfig(Section):
    """Configuration of ``stepscope demo``.

    Attributes:
        train: the training.
        eval: how its checkpoints are evaluated.
        measure: how an early and a late checkpoint are measured.
    """

    train: TrainConfig
    eval: EvalSettings = EvalSettings()
    measure: MeasureSettings = MeasureSettings()
