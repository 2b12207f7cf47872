"""What ``check`` is asked, looked at before the checkpoint is: cheap mistakes are told at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from stepscope.config import MeasureConfig, load_config
from stepscope.pipeline.early import refuse_asked
from stepscope.tasks import load_prompts, load_task


def asked_of(target: Path, overrides: Sequence[str], own: Mapping[str, str | None]) -> MeasureConfig:
    """The measurement that a checkpoint is examined for.

    Args:
        target: folder of the checkpoint, or of a run.
        overrides: settings of ``measure``.
        own: ``task``, ``prompts``, ``reward`` and ``template``, as ``measure`` takes them.

    Raises:
        ConfigError: a setting is wrong.
    """
    return load_config(MeasureConfig, None, overrides, {"checkpoint": str(target), "out": "unused", **own})


def refuse_wrong(target: Path, overrides: Sequence[str], own: Mapping[str, str | None]) -> None:
    """Refuse wrong settings, and prompts and tasks that are not there; opens no file.

    Raises:
        ConfigError: a setting is wrong.
        TaskError: no such task, or no such file.
    """
    if target.is_dir():
        refuse_asked(asked_of(target, overrides, own))


def refuse_unreadable(config: MeasureConfig) -> None:
    """Refuse a task, prompts and a reward function that cannot be read, which takes no model.

    What the checkpoint says of how it asks is not known yet, and matters to none of these.

    Raises:
        TaskError: the task, or the prompts, cannot be loaded.
        ConfigError: there is no such reward function.
    """
    if config.prompts is not None:
        load_prompts(config.prompts, reward=config.reward, template=config.template)
    elif config.task is not None:
        load_task(config.task)
