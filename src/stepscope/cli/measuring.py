"""What ``measure`` and ``explain`` share: the settings of a measurement, and where it goes by default."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stepscope.processes import said_once

if TYPE_CHECKING:
    from stepscope.config import MeasureConfig

PAGE = "report.html"
"""Of a measurement and of a run."""

Checkpoint = Annotated[
    str | None, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder with its optimizer state.")
]

_NUMBERED = re.compile(r"(step|checkpoint|global_step)[-_]\d+")


def measure_settings(
    config: Path | None,
    overrides: Sequence[str],
    values: Mapping[str, Any],
    folder: Callable[[Path], Path],
) -> MeasureConfig:
    """Settings of a measurement, refused where they are wrong; ``folder`` is where it goes by default."""
    from stepscope.pipeline.paths import need_checkpoint, need_file

    need_file(config)
    need_checkpoint(values["checkpoint"])
    from stepscope.config import MeasureConfig, load_config

    def fill(given: Mapping[str, Any]) -> Mapping[str, Any]:
        checkpoint = given.get("checkpoint")
        return {"out": str(folder(Path(checkpoint))) if isinstance(checkpoint, str) else "unknown"}

    with said_once():
        return load_config(MeasureConfig, config, overrides, values, fill)


def sizes_asked(overrides: Sequence[str]) -> frozenset[str]:
    """Batches of which something was asked for, and whose number of prompts stays therefore."""
    return frozenset(name for name in ("update", "probe") if any(o.startswith(f"{name}.") for o in overrides))


def in_run(checkpoint: Path) -> Path:
    """``RUN/measure/step-N``, where the run's page looks for it; of a lone checkpoint ``runs/measure/``."""
    run = _run_of(checkpoint)
    if _NUMBERED.fullmatch(_absolute(checkpoint).name):
        here = Path.cwd()
        return (run.relative_to(here) if run.is_relative_to(here) else run) / "measure" / checkpoint.name
    return apart("measure", checkpoint)


def apart(verb: str, checkpoint: Path) -> Path:
    """``runs/VERB/RUN-step-N``, here: what is quickly made stays out of the run."""
    return Path("runs", verb, f"{_run_of(checkpoint).name}-{_absolute(checkpoint).name}")


def _run_of(checkpoint: Path) -> Path:
    """The folder of the run that a checkpoint stands in."""
    parent = _absolute(checkpoint).parent
    return parent.parent if parent.name == "checkpoints" else parent


def _absolute(path: Path) -> Path:
    return Path(os.path.abspath(path.expanduser()))  # noqa: PTH100 (resolve would follow links out of the run)
