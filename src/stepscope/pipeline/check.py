"""``stepscope check``: is a checkpoint, or a configuration, fit for use?"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from stepscope.config import (
    EvalConfig,
    MeasureConfig,
    Section,
    StudyConfig,
    TrainConfig,
    load_config,
    read_yaml,
)
from stepscope.errors import CheckpointError
from stepscope.tasks import load_task
from stepscope.tasks.response import TAGS
from stepscope.tasks.worker import shared_worker

_SPLITS = {"train": "training", "test": "test"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run_check(target: Path, *, task: str | None = None) -> bool:
    """Show what was found as a table; True unless a finding fails.

    Args:
        target: checkpoint folder or configuration file.
        task: on which a checkpoint's answers are looked for; None for the one that it names, if it does.

    Raises:
        TaskError: ``task`` cannot be loaded.
        ConfigError: ``target`` is a configuration with wrong settings.
        CheckpointError: there is no such path.
    """
    if not target.exists():
        raise CheckpointError(f"{target}: no such checkpoint folder or configuration file")
    if target.is_file():
        return _check_config(target)
    from stepscope.pipeline.answers import answer_findings
    from stepscope.policy.checkpoint import inspect_checkpoint
    from stepscope.policy.examination import Finding

    checked = inspect_checkpoint(target, further=lambda policy: answer_findings(policy, task))
    findings = [*checked, Finding(*_isolation())]
    table = Table("", "finding", "what to do")
    for finding in findings:
        colour = COLOURS[finding.level]
        table.add_row(Text(finding.level, style=colour), Text(finding.what), Text(finding.cure))
    Console().print(table)
    return all(finding.level != "fail" for finding in findings)


def kind_of_config(path: Path) -> type[Section]:
    """Which verb a configuration file is for, by the keys only that verb has."""
    keys = set(read_yaml(path))
    kinds: dict[str, type[Section]] = {
        "checkpoints": StudyConfig,
        "checkpoint": MeasureConfig,
        "source": EvalConfig,
    }
    return next((kind for key, kind in kinds.items() if key in keys), TrainConfig)


def _check_config(path: Path) -> bool:
    kind = kind_of_config(path)
    config = load_config(kind, path)
    console = Console()
    console.print(Text(f"{path}: a valid {kind.__name__}"))
    if isinstance(config, TrainConfig | EvalConfig | MeasureConfig) and config.task:
        if isinstance(config, TrainConfig):
            task = load_task(config.task, template=config.template, answer_format=config.answer_format)
        else:
            task = load_task(config.task, answer_format=config.loss.answer_format or TAGS.name)
        counts = [f"{len(task.problems(split))} {name} problems" for split, name in _SPLITS.items()]
        console.print(Text(f"task {config.task}: {' and '.join(counts)}"))
        if task.overlap:
            console.print(Text(f"warn: {task.overlap}", style=COLOURS["warn"]))
    level, what, _ = _isolation()
    console.print(Text(f"{level}: {what}"))
    return True


def _isolation() -> tuple[Literal["ok", "warn"], str, str]:
    """Whether this system keeps answers from doing harm: level, what was found, what to do."""
    missing = shared_worker().isolation()
    if not missing:
        return "ok", "answers are scored in a process that the kernel isolates (Landlock, seccomp)", ""
    what = f"answers cannot be isolated: {missing}; tasks whose scorer evaluates answers are refused"
    return "warn", what, "use Linux 5.13 or newer, with Landlock and seccomp allowed in the container"
