"""``stepscope check``: is a checkpoint, or a configuration, fit for use?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

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
from stepscope.pipeline.check.asked import asked_of, refuse_unreadable
from stepscope.tasks import load_prompts, load_task
from stepscope.tasks.formats.response import TAGS
from stepscope.tasks.judge.worker import shared_worker

if TYPE_CHECKING:
    from stepscope.pipeline.check.expected import Expected
    from stepscope.pipeline.check.trial import Trial
    from stepscope.policy.check.findings import Finding

_SPLITS = {"train": "training", "test": "test"}
COLOURS = {"ok": "green", "warn": "yellow", "fail": "red"}


def run_check(
    target: Path, overrides: Sequence[str] = (), *, own: Mapping[str, str | None] | None = None
) -> bool:
    """Show what was found as a table, what a prompt and its response look like, and what to do next.

    Args:
        target: checkpoint folder, folder of a run with several, or configuration file.
        overrides: settings of ``measure``, as it takes them; the checkpoint is examined for that measurement.
        own: ``task``, ``prompts``, ``reward`` and ``template``, as ``measure`` takes them; None, or what is
            missing there, is that of the training.

    Returns:
        Whether no finding fails.

    Raises:
        ConfigError: a setting or ``target``, a configuration, is wrong.
        TaskError: the task, or the prompts, cannot be loaded.
        CheckpointError: there is no such path.
    """
    if not target.exists():
        raise CheckpointError(f"{target}: no such checkpoint folder or configuration file")
    own = {} if own is None else dict(own)
    if target.is_file():
        return _check_config(target, overrides, own)
    config = asked_of(target, overrides, own)
    refuse_unreadable(config)
    from stepscope.pipeline.check.shown import command, show_trial
    from stepscope.policy.check.health.run import examine_run, is_run

    console = Console()
    if is_run(target):
        found = examine_run(target, overrides=config.loss.given(), progress=True)
        _show(console, found)
        return all(finding.level != "fail" for finding in found)
    looked = check_checkpoint(config)
    found = [*looked.findings, _isolation()]
    _show(console, found)
    show_trial(console, looked.trial)
    fit = all(finding.level != "fail" for finding in found)
    if not fit:
        next_step = f"mend what stands against it, then again: {command('check', target, own, overrides)}"
    elif not (config.task or config.prompts or looked.task):
        next_step = (
            f"{command('check', target, own, overrides)} --task TASK, or with the run's own: --prompts FILE "
            "--reward MODULE:FUNCTION"
        )
    else:
        if looked.expected is not None:
            console.print(Text(f"measure would take {looked.expected}"), soft_wrap=True)
        settings = [*looked.trial.cures, *overrides]
        name = target.resolve().name
        next_step = (
            f"{command('explain', target, own, settings)}\n"
            f"all of it: {command('measure', target, {**own, 'out': f'runs/{name}'}, settings)}"
        )
    console.print(Text(f"Next: {next_step}"), soft_wrap=True)
    return fit


def _show(console: Console, found: Sequence[Finding]) -> None:
    table = Table("", "finding", "what to do")
    for finding in found:
        colour = COLOURS[finding.level]
        table.add_row(Text(finding.level, style=colour), Text(finding.what), Text(finding.cure))
    console.print(table)


@dataclass(frozen=True)
class Looked:
    """What was seen of a checkpoint.

    Attributes:
        findings: for and against measuring it.
        trial: a few of its responses.
        expected: what its measurement takes; None where that is not known.
        task: that it says it was trained on; empty for none.
    """

    findings: list[Finding]
    trial: Trial
    expected: Expected | None = None
    task: str = ""


def check_checkpoint(config: MeasureConfig) -> Looked:
    """Whether ``measure`` would go through with this configuration, by what it looks at itself."""
    from stepscope.pipeline.check.expected import expected
    from stepscope.pipeline.check.trial import Trial, try_out
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
        return Looked(found, Trial([]))
    found += findings(policy, config, config.stages)
    known = bool(config.task or config.prompts or policy.settings.task)
    if not known:
        what = "the checkpoint does not say what task it was trained on"
        cure = "give --task TASK, or --prompts FILE --reward MODULE:FUNCTION, to check, measure and eval"
        found.append(Finding("warn", what, cure))
    try:
        open_reference(config.reference, policy)
        if known and (conflict := prompt_conflict(policy, open_task(config.task, policy, own=config))):
            found.append(Finding.from_error(ConfigError(conflict)))
    except StepscopeError as error:
        found.append(Finding.from_error(error))
    if any(f.level == "fail" for f in found):
        return Looked(found, Trial([]), task=policy.settings.task)
    trial = try_out(policy, config)
    return Looked([*found, *trial.findings], trial, expected(policy, config, trial), policy.settings.task)


KINDS: tuple[type[Section], ...] = (TrainConfig, MeasureConfig, EvalConfig, StudyConfig)
"""Configurations a file may hold; of several with as many of its keys, the first."""

ON_COMMAND_LINE = ("checkpoint", "source", "out")
"""Keys that a file may leave to the command line."""


def kind_of_config(path: Path) -> type[Section]:
    """Which verb a configuration file is for: the one that knows most of its keys."""
    keys = set(read_yaml(path))
    return max(KINDS, key=lambda kind: len(keys.intersection(kind.model_fields)))


def _check_config(path: Path, overrides: Sequence[str], own: Mapping[str, str | None]) -> bool:
    kind = kind_of_config(path)
    given = {*read_yaml(path), *(text.partition("=")[0] for text in overrides)}
    required = {name for name, field in kind.model_fields.items() if field.is_required()}
    left = [name for name in ON_COMMAND_LINE if name in required - given] if kind is not StudyConfig else []
    asked = {key: value for key, value in own.items() if key in kind.model_fields}
    config = load_config(kind, path, overrides, asked | dict.fromkeys(left, "unused"))
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
    elif isinstance(config, EvalConfig | MeasureConfig) and config.prompts:
        rows = load_prompts(config.prompts, reward=config.reward, template=config.template)
        counts = [f"{len(rows.problems(split))} {name} prompts" for split, name in _SPLITS.items()]
        console.print(Text(f"prompts {config.prompts}: {' and '.join(counts)}, graded by {rows.grader}"))
    isolation = _isolation()
    console.print(Text(f"{isolation.level}: {isolation.what}"))
    return True


def _isolation() -> Finding:
    """Whether this system keeps answers from doing harm."""
    from stepscope.policy.check.findings import Finding

    missing = shared_worker().isolation()
    if not missing:
        return Finding("ok", "answers are scored in a process that the kernel isolates (Landlock, seccomp)")
    what = f"answers cannot be isolated: {missing}; tasks whose scorer evaluates answers are refused"
    return Finding(
        "warn", what, "use Linux 5.13 or newer, with Landlock and seccomp allowed in the container"
    )
