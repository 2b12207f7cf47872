"""``stepscope check``: is a checkpoint, or a configuration, fit for use?"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

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
from stepscope.errors import CheckpointError, ConfigError, StepscopeError
from stepscope.tasks import load_task
from stepscope.tasks.formats.response import TAGS
from stepscope.tasks.judge.worker import shared_worker

if TYPE_CHECKING:
    from stepscope.policy.check.findings import Finding

_SPLITS = {"train": "training", "test": "test"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run_check(target: Path, overrides: Sequence[str] = (), *, task: str | None = None) -> bool:
    """Show what was found as a table; True unless a finding fails.

    Args:
        target: checkpoint folder, folder of a run with several, or configuration file.
        overrides: settings of ``measure``, as it takes them; the checkpoint is examined for that measurement.
        task: specification of the task on which answers are looked for, or None for the one the checkpoint
            was trained on.

    Raises:
        ConfigError: a setting or ``target``, a configuration, is wrong.
        TaskError: ``task`` cannot be loaded.
        CheckpointError: there is no such path.
    """
    if not target.exists():
        raise CheckpointError(f"{target}: no such checkpoint folder or configuration file")
    if target.is_file():
        return _check_config(target, overrides, task)
    values = {"checkpoint": str(target), "out": "unused", "task": task}
    config = load_config(MeasureConfig, None, overrides, values)
    from stepscope.policy.check.findings import Finding
    from stepscope.policy.check.health.run import examine_run, is_run

    if is_run(target):
        found = examine_run(target, overrides=config.loss.given(), progress=True)
    else:
        found = [*check_checkpoint(config), Finding(*_isolation())]
    table = Table("", "finding", "what to do")
    for finding in found:
        colour = COLOURS[finding.level]
        table.add_row(Text(finding.level, style=colour), Text(finding.what), Text(finding.cure))
    Console().print(table)
    return all(finding.level != "fail" for finding in found)


def check_checkpoint(config: MeasureConfig) -> list[Finding]:
    """Whether ``measure`` would go through with this configuration, by what it looks at itself."""
    from stepscope.pipeline.check.answers import answer_findings
    from stepscope.pipeline.inputs.fitness import findings
    from stepscope.pipeline.inputs.logged_prompts import prompt_conflict
    from stepscope.pipeline.inputs.policies import open_reference
    from stepscope.pipeline.inputs.tasks import open_task
    from stepscope.policy.check.findings import Finding
    from stepscope.policy.check.inspection import inspect_loaded

    found, policy = inspect_loaded(
        config.checkpoint, precision=config.precision, device=config.device, overrides=config.loss.given()
    )
    if policy is None:
        return found
    found += findings(policy, config, config.stages)
    known = config.task is not None or bool(policy.settings.task)
    if not known:
        what = "the checkpoint does not say what task it was trained on"
        found.append(Finding("warn", what, "give --task TASK to measure and eval"))
    try:
        open_reference(config.reference, policy)
        if known and (conflict := prompt_conflict(policy, open_task(config.task, policy))):
            found.append(Finding.from_error(ConfigError(conflict)))
    except StepscopeError as error:
        found.append(Finding.from_error(error))
    if not any(f.level == "fail" for f in found):
        found += answer_findings(policy, config.task)
    return found


KINDS: tuple[type[Section], ...] = (TrainConfig, MeasureConfig, EvalConfig, StudyConfig)
"""Configurations a file may hold; of several with as many of its keys, the first."""

ON_COMMAND_LINE = ("checkpoint", "source", "out")
"""Keys that a file may leave to the command line."""


def kind_of_config(path: Path) -> type[Section]:
    """Which verb a configuration file is for: the one that knows most of its keys."""
    keys = set(read_yaml(path))
    return max(KINDS, key=lambda kind: len(keys.intersection(kind.model_fields)))


def _check_config(path: Path, overrides: Sequence[str], task: str | None) -> bool:
    kind = kind_of_config(path)
    given = {*read_yaml(path), *(text.partition("=")[0] for text in overrides)}
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    left = [name for name in ON_COMMAND_LINE if name in required - given] if kind is not StudyConfig else []
    config = load_config(kind, path, overrides, {"task": task} | dict.fromkeys(left, "unused"))
    console = Console()
    still = f", with {' and '.join(left)} to be given on the command line" if left else ""
    console.print(Text(f"{path}: a valid {kind.__name__}{still}"))
    if isinstance(config, TrainConfig | EvalConfig | MeasureConfig) and config.task:
        if isinstance(config, TrainConfig):
            loaded = load_task(config.task, template=config.template, answer_format=config.answer_format)
        else:
            loaded = load_task(config.task, answer_format=config.loss.answer_format or TAGS.name)
        counts = [f"{len(loaded.problems(split))} {name} problems" for split, name in _SPLITS.items()]
        console.print(Text(f"task {config.task}: {' and '.join(counts)}"))
        if loaded.overlap:
            console.print(Text(f"warn: {loaded.overlap}", style=COLOURS["warn"]))
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
