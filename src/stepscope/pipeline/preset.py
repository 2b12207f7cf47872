"""Configuration of ``stepscope demo``: a training, its evaluation and the measurement of two checkpoints."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path

from stepscope.config import (
    EvalSettings,
    MeasureSettings,
    Section,
    TrainConfig,
    apply_overrides,
    build_config,
)
from stepscope.yaml_text import parse_yaml


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


def demo_config(out: Path, overrides: Sequence[str] = ()) -> DemoConfig:
    """The packaged configuration of the demo, with ``section.field=value`` changes.

    Raises:
        ConfigError: an override is wrong.
    """
    folder = files("stepscope.presets")
    training, measuring = (
        parse_yaml((folder / name).read_text(encoding="utf-8"), name)
        for name in ("demo.yaml", "demo_measure.yaml")
    )
    data = {"train": {**training, "out": str(out)}, **measuring}
    return build_config(DemoConfig, apply_overrides(DemoConfig, data, overrides), "demo")
