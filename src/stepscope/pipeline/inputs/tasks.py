"""Tasks: the one a policy is asked, and the data of a run's tasks, which stay those it began with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from stepscope.console import say
from stepscope.errors import ConfigError, TaskError
from stepscope.policy.state import Policy
from stepscope.runs import PROVENANCE, RunFolder, write_json
from stepscope.tasks import TemplatedTask, load_task
from stepscope.tasks.judge.guards import evaluates
from stepscope.tasks.load import changed_data

KEY = "task_data"
"""Key of the provenance: specification of a task to the digest of its data."""


def open_task(spec: str | None, policy: Policy) -> TemplatedTask:
    """The task asked for, or that of the training, with the prompt template and the reward of the run.

    Raises:
        ConfigError: neither is known.
        TaskError: the task is unknown or its data cannot be read, or only the checkpoint names it and its
            scorer evaluates answers.
    """
    chosen = spec or policy.settings.task
    if not chosen:
        raise ConfigError(
            f"{policy.path}: the checkpoint does not say what task it was trained on; give --task TASK"
        )
    if not spec and evaluates(chosen):
        raise TaskError(
            f"{policy.path}: the checkpoint names the task {chosen!r}, whose scorer evaluates answers as "
            f"code; if you trust the checkpoint, name the task yourself: --task {chosen}"
        )
    settings = policy.settings
    task = load_task(
        chosen,
        template=settings.prompt_template or None,
        format_weight=settings.format_weight,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
        chat_template_kwargs=settings.chat_template_kwargs,
        answer_format=settings.answer_format,
    )
    return task.through(policy.tokenizer)


def task_to_measure(spec: str | None, policy: Policy) -> TemplatedTask:
    """The task of :func:`open_task`, with a warning of what it shares with the policy's training.

    Raises:
        ConfigError: as :func:`open_task`.
        TaskError: likewise.
    """
    task = open_task(spec, policy)
    say_what_is_shared(task, {policy.settings.task: policy.settings.task_digest})
    return task


def hold_data(run: RunFolder, tasks: Iterable[TemplatedTask]) -> None:
    """Record the state of the tasks' data, or compare it with what is recorded.

    Tasks whose specification says all about them (``arithmetic``) have no data. A run folder without a record
    gets one.

    Raises:
        TaskError: the data are not those that the run began with.
    """
    now = {task.spec: task.digest for task in tasks if task.digest}
    provenance = run.provenance()
    before = provenance.get(KEY, {})
    for spec, digest in now.items():
        if before.get(spec, digest) != digest:
            raise changed_data(str(run.path), spec, before[spec], digest)
    if not now.keys() <= before.keys():
        write_json(run.path / PROVENANCE, provenance | {KEY: before | now})


def say_what_is_shared(task: TemplatedTask, trained: Mapping[str, str]) -> None:
    """Warn of test questions that are training questions, and of data that are not those of the training.

    Args:
        task: to be asked.
        trained: tasks of trainings to the digests of their data then.
    """
    if task.overlap:
        say(f"warning: {task.overlap}")
    then = trained.get(task.spec, "")
    if then not in ("", task.digest):
        say(
            f"warning: the data of task {task.spec} have changed since the training (digest "
            f"{then[:40]} then, {task.digest[:40]} now)"
        )


def tasks_of(specs: Iterable[str]) -> list[TemplatedTask]:
    """The tasks of some specifications, each once; empty ones are passed over."""
    return [load_task(spec) for spec in dict.fromkeys(specs) if spec]
