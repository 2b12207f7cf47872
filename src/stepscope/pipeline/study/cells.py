"""The cells of a study: checkpoints x settings x repeats, each a measurement of its own."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.config import MeasureConfig, StudyConfig, build_config, set_path
from stepscope.errors import ConfigError
from stepscope.pipeline.inputs.policies import checkpoints_in

NO_LIMIT = 2**40
"""Tokens of a micro-batch in a study that sets none: memories at hand differ between machines."""

_OF_THE_STUDY = frozenset({"checkpoint", "out", "stages"})


@dataclass(frozen=True)
class Cell:
    """One measurement of a study.

    Attributes:
        key: name of its folder.
        checkpoint: what is measured.
        setting: name of the setting.
        repeat: number of the repeat.
        config: the measurement.
    """

    key: str
    checkpoint: Path
    setting: str
    repeat: int
    config: MeasureConfig


def study_cells(config: StudyConfig) -> list[Cell]:
    """All cells of a study, in a fixed order.

    Raises:
        ConfigError: a setting names keys that a measurement does not have.
        CheckpointError: a checkpoint is missing.
    """
    cells = []
    for source in map(Path, config.checkpoints):
        for checkpoint in checkpoints_in(source):
            if checkpoint != source and not (checkpoint / "optimizer.pt").is_file():
                continue  # a run's first checkpoint has taken no step yet
            tag = hashlib.sha256(str(checkpoint.resolve()).encode()).hexdigest()[:8]
            for setting, changes in config.settings.items():
                for repeat in range(config.repeats):
                    key = f"{checkpoint.name}-{tag}--{setting}--{repeat:03d}"
                    cells.append(
                        Cell(
                            key,
                            checkpoint,
                            setting,
                            repeat,
                            _cell_config(config, key, checkpoint, changes, repeat),
                        )
                    )
    return cells


def _cell_config(
    config: StudyConfig, key: str, checkpoint: Path, changes: dict[str, Any], repeat: int
) -> MeasureConfig:
    data = config.measure.model_dump(mode="json")
    if given := sorted({path.split(".")[0] for path in changes} & _OF_THE_STUDY):
        raise ConfigError(
            f"setting of {key}: {', '.join(given)} cannot differ between settings; "
            "the study itself gives it: name checkpoints, out and stages beside settings, and leave "
            f"{', '.join(given)} out here"
        )
    for path, value in changes.items():
        set_path(data, path, value)
    data |= {
        "checkpoint": str(checkpoint),
        "out": str(Path(config.out) / "cells" / f".{key}"),
        "stages": list(config.stages),
    }
    measurement = build_config(MeasureConfig, data, f"setting of {key}")
    own: dict[str, Any] = {"probe": _reseeded(measurement.probe, repeat)}
    if config.resample == "both":
        own["update"] = _reseeded(measurement.update, repeat)
    if measurement.max_tokens is None:
        own["max_tokens"] = NO_LIMIT
    return measurement.model_copy(update=own)


def _reseeded(batch: Any, repeat: int) -> Any:
    """The batch with a seed of its own for each repeat; repeat 0 keeps the seed that was given."""
    return batch.model_copy(update={"seed": batch.seed + 1000 * repeat})


def cell_names(cell: Cell) -> dict[str, Any]:
    """The columns that say which cell a row is of."""
    return {"checkpoint": str(cell.checkpoint), "setting": cell.setting, "repeat": cell.repeat}
