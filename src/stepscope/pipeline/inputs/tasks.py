"""Tasks: the one a policy is asked, and the data of a run's tasks, which stay those it began with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from transformers import TrainerState

from stepscope.config import Asking
from stepscope.console import say
from stepscope.errors import ConfigError, TaskError
from stepscope.own_code import own_source
from stepscope.policy.checkpoint.trainer_log import TRAINER_STATE
from stepscope.policy.state import Policy
from stepscope.runs import PROVENANCE, RunFolder, sha256, write_json
from stepscope.tasks import TemplatedTask, load_task
from stepscope.tasks.formats.wording import Wording, load_wording
from stepscope.tasks.judge.guards import evaluates
from stepscope.tasks.load import changed_data, load_prompts
from stepscope.tasks.own_reward import OwnReward

KEY = "task_data"
"""Key of the provenance: specification of a task, or what the user gave, to the digest of its data."""

OWN_REWARD = "own_reward"
"""Key of the provenance: name, file and SHA-256 of the user's reward function."""

OWN = ("prompts", "reward", "template")
"""Keys of the configuration that name what is the user's own."""


def open_task(spec: str | None, policy: Policy, *, own: Asking | None = None) -> TemplatedTask:
    """The task asked for, or that of the training, with the prompt template and the reward of the run.

    Args:
        spec: specification of the task, or None for the one of the training.
        policy: whose tokenizer and settings are used.
        own: may name prompts, a template and a reward function of the user's own, which win.

    Raises:
        ConfigError: neither a task nor prompts are known, or there is no such function.
        TaskError: the task is unknown or its data cannot be read, or only the checkpoint names it and its
            scorer evaluates answers; or the template does not go with the prompts.
    """
    own = own or Asking()
    settings = policy.settings
    if own.prompts is not None:
        task = load_prompts(
            own.prompts,
            reward=own.reward,
            template=own.template,
            system_prompt=own.loss.system_prompt or "",
            prefill=own.loss.prefill or "",
            chat_template_kwargs=settings.chat_template_kwargs,
            answer_format=settings.answer_format,
            format_weight=settings.format_weight,
        )
        return _in_this_training(task, policy).through(policy.tokenizer)
    chosen = spec or settings.task
    if not chosen:
        raise ConfigError(
            f"{policy.path}: the checkpoint does not say what task it was trained on; give --task TASK, or "
            "the run's own prompts and reward function: --prompts FILE --reward module:function"
        )
    if not spec and evaluates(chosen):
        raise TaskError(
            f"{policy.path}: the checkpoint names the task {chosen!r}, whose scorer evaluates answers as "
            f"code; if you trust the checkpoint, name the task yourself: --task {chosen}"
        )
    wording = Wording() if own.template is None else load_wording(own.template)
    task = load_task(
        chosen,
        template=wording.text or settings.prompt_template or None,
        format_weight=settings.format_weight,
        system_prompt=settings.system_prompt,
        prefill=settings.prefill,
        chat_template_kwargs=settings.chat_template_kwargs,
        answer_format=settings.answer_format,
        chat_template=wording.chat,
    )
    if own.reward is not None:
        task = replace(task, reward=OwnReward.named(own.reward))
    return _in_this_training(task, policy).through(policy.tokenizer)


def _in_this_training(task: TemplatedTask, policy: Policy) -> TemplatedTask:
    """The task; a reward function of the user's gets the trainer's state as the checkpoint has it."""
    if task.reward is None:
        return task
    state = TrainerState(global_step=policy.step)
    file = None if policy.path is None else policy.path / TRAINER_STATE
    if file is not None and file.is_file():
        try:
            state = TrainerState.load_from_json(str(file))
        except (OSError, ValueError, TypeError, KeyError):  # of another version of the Trainer
            state = TrainerState(global_step=policy.step)
    return replace(task, reward=replace(task.reward, state=state))


def task_to_measure(spec: str | None, policy: Policy, *, own: Asking | None = None) -> TemplatedTask:
    """The task of :func:`open_task`, with a warning of what it shares with the policy's training.

    Raises:
        ConfigError: as :func:`open_task`.
        TaskError: likewise.
    """
    task = open_task(spec, policy, own=own)
    say_what_is_shared(task, {policy.settings.task: policy.settings.task_digest})
    return task


def given_by_the_user(own: Asking) -> dict[str, str]:
    """Digests of prompts, template and reward function of the user's own; nothing is imported for it.

    Of a function that of its module's file counts; what is not there has an empty one, or none.

    Returns:
        By the key of the configuration.
    """
    found = {}
    if own.prompts is not None:
        file = Path(own.prompts)
        found["prompts"] = sha256(file) if file.is_file() else ""
    if own.template is not None:
        with suppress(TaskError):
            found["template"] = load_wording(own.template).digest
    if own.reward is not None:
        found["reward"] = own_source(own.reward)["sha256"]
    return found


def hold_data(run: RunFolder, tasks: Iterable[TemplatedTask], own: Asking | None = None) -> None:
    """Record the state of the tasks' data, or compare it with what is recorded.

    Tasks whose specification says all about them (``arithmetic``) have no data. A run folder without a record
    gets one. What the user gives of their own is recorded and compared, too.

    Raises:
        TaskError: the data are not those that the run began with.
    """
    own = own or Asking()
    now = {task.spec: task.digest for task in tasks if task.digest}
    mine = {f"{key} {getattr(own, key)}": digest for key, digest in given_by_the_user(own).items()}
    now |= mine
    provenance = run.provenance()
    before = provenance.get(KEY, {})
    for spec, digest in now.items():
        if before.get(spec, digest) != digest:
            if spec not in mine:
                raise changed_data(str(run.path), spec, before[spec], digest)
            raise TaskError(
                f"{run.path}: {spec} has changed since this run was started (digest "
                f"{before[spec][:40] or 'none'} then, {digest[:40] or 'none'} now); put back what it was, or "
                "start afresh in another folder (--out)"
            )
    source = {} if own.reward is None else {OWN_REWARD: own_source(own.reward)}
    if not now.keys() <= before.keys() or not source.keys() <= provenance.keys():
        write_json(run.path / PROVENANCE, provenance | source | {KEY: before | now})


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
