"""Warm-up, then reinforcement learning or preferences, in one run folder that can be continued."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from errno import EDQUOT, EFBIG, ENOSPC, EROFS
from pathlib import Path

import torch
from accelerate import PartialState

from stepscope.config import TrainConfig
from stepscope.errors import RunFolderError
from stepscope.policy.loss.settings import StepSettings
from stepscope.tasks.load import TemplatedTask, changed_data, load_task
from stepscope.tasks.problem import Task
from stepscope.training.preferences.run import prefer, preference_settings
from stepscope.training.rl import reinforce, step_settings
from stepscope.training.setup.arguments import quiet_libraries
from stepscope.training.setup.integrity import set_damaged_aside, step_of, trained_checkpoints
from stepscope.training.setup.preflight import require_fit, require_trackers
from stepscope.training.setup.start import reload_model, resolve_source, save_base, starting_model
from stepscope.training.sft import warm_up


def train(config: TrainConfig, out: Path, *, resume: bool = False) -> Path:
    """Train a policy and leave checkpoints that keep all a measurement needs.

    ``OUT/base`` is the policy after the warm-up (a Hugging Face folder), ``OUT/warmup`` the log of the
    warm-up, ``OUT/checkpoints/step-N`` the checkpoints of the reinforcement learning, or of the learning from
    preferences, and ``OUT/tensorboard`` its curves. An adapter's checkpoint names its base ``../../base``,
    relative to itself, so that the run folder can move. Without warm-up an adapter's base is the configured
    model itself and ``OUT/base`` is not written, unless that model is built in code or comes from a GGUF
    file, which have no folder to refer to.

    Args:
        config: what to train and how.
        out: run folder.
        resume: continue from the last sound checkpoint (or from ``OUT/base``) of an interrupted run; damaged
            ones behind it are renamed.

    Returns:
        The last checkpoint, or ``OUT/base`` where nothing follows the warm-up.

    Raises:
        ConfigError: the settings contradict each other or the data.
        RunFolderError: the folder already holds a training and ``resume`` is off, or cannot be written.
        TaskError: the task is unknown or has no demonstrations.
        TrainingError: the training diverged.
        CheckpointError: the model cannot be loaded, or no checkpoint of the interrupted run is sound.
    """
    base = out / "base"
    if not resume and (base.exists() or last_checkpoint(out) is not None):
        raise RunFolderError(
            f"{out}: already holds a training; choose another folder, or continue this one with --resume"
        )
    task = load_task(
        config.task,
        template=config.template,
        format_weight=config.format_weight,
        system_prompt=config.system_prompt or "",
        prefill=config.prefill or "",
        chat_template_kwargs=config.chat_template_kwargs,
        answer_format=config.answer_format,
    )
    section = config.after_warm_up
    if section is not None:
        require_trackers(section.report_to, "rl" if config.hypo is None else "hypo")
    processes = PartialState(cpu=not torch.cuda.is_available())
    processes.wait_for_everyone()
    out.mkdir(parents=True, exist_ok=True)
    if processes.is_main_process:
        _remove_unfinished(out / "checkpoints")
        set_damaged_aside(out, processes=processes.num_processes)
    processes.wait_for_everyone()
    last = last_checkpoint(out)
    if last is not None:
        _refuse_other_data(last, task)
    fresh = last is None and not base.exists()
    with quiet_libraries(), _faults_of_the_disk(out):
        if fresh:
            _make_base(config, task, out)
        if section is None:
            return base
        if last is None or step_of(last) < section.steps:
            source = str(base) if base.exists() else resolve_source(config.model.source)
            model, tokenizer = reload_model(source, dtype=config.model.dtype)
            require_fit(config, model, tokenizer, task)
            resumable = last if last is not None and step_of(last) > 0 else None
            go_on = reinforce if config.hypo is None else prefer
            go_on(config, model, tokenizer, task, out, resume=resumable)
            processes.wait_for_everyone()
            last = last_checkpoint(out)
    if last is None:
        raise RunFolderError(f"{out}: the training left no checkpoint; set save_every to at most steps")
    return last


def last_checkpoint(out: Path) -> Path | None:
    """The checkpoint ``OUT/checkpoints/step-N`` with the largest N, or None."""
    return next(reversed(trained_checkpoints(out)), None)


@contextmanager
def _faults_of_the_disk(out: Path) -> Iterator[None]:
    """Inside the block a full disk, or a run folder that is gone or barred, is the user's to mend."""
    try:
        yield
    except OSError as error:
        name = error.filename
        inside = isinstance(name, str) and out.resolve() in Path(name).resolve().parents
        if not inside and error.errno not in (ENOSPC, EDQUOT, EFBIG, EROFS):
            raise
        raise RunFolderError(
            f"{out}: cannot be written ({error}); free space on the disk or mend the folder, then go on with "
            "--resume"
        ) from error


def _refuse_other_data(last: Path, task: TemplatedTask) -> None:
    """A training goes on with the data that it began with.

    Raises:
        TaskError: the checkpoint was made with another state of the data.
    """
    before = StepSettings.load(last).task_digest
    if before and before != task.digest:
        raise changed_data(str(last), task.spec, before, task.digest)


def _remove_unfinished(checkpoints: Path) -> None:
    """Remove checkpoints that a killed process was writing; finished ones are called ``step-N``."""
    for unfinished in checkpoints.glob("checkpoint-*"):
        shutil.rmtree(unfinished)


def _make_base(config: TrainConfig, task: Task, out: Path) -> None:
    """Write ``OUT/base``, the start of reinforcement learning, where that needs a folder of its own."""
    has_folder = config.model.source != "tiny" and not config.model.source.endswith(".gguf")
    if config.sft is None and has_folder:
        return
    model, tokenizer = starting_model(config.model, seed=config.seed)
    require_fit(config, model, tokenizer, task)
    if config.sft is not None:
        hypo = config.hypo
        settings = step_settings(config) if hypo is None else preference_settings(config, hypo)
        model = warm_up(config, model, tokenizer, task, settings, out / "warmup")
    save_base(model, tokenizer, out / "base")
