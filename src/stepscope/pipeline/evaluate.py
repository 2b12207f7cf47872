"""``stepscope eval``: pass@k and the rest, one row per checkpoint."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from stepscope.config import EvalConfig
from stepscope.console import in_words, say, say_result, timed
from stepscope.errors import RewardError, RunFolderError
from stepscope.evaluation import (
    EvaluationRow,
    compared,
    evaluate,
    fit_run,
    prompts_path,
    read_eval,
    write_eval,
)
from stepscope.pipeline.early import refuse_present, table_of
from stepscope.pipeline.inputs.examples import say_if_nothing_earns, shown_and_kept
from stepscope.pipeline.inputs.logged_entropy import entropy_against_log
from stepscope.pipeline.inputs.logged_prompts import prompt_conflict
from stepscope.pipeline.inputs.policies import checkpoints_in, open_policy
from stepscope.pipeline.inputs.samplers import make_sampler
from stepscope.pipeline.inputs.tasks import hold_data, open_task, say_what_is_shared, tasks_of
from stepscope.pipeline.speed import LONG, PILOT, least_speed
from stepscope.pipeline.together import main_only, together
from stepscope.pipeline.tracked import track_evaluation
from stepscope.policy.checkpoint.load import checkpoint_digest, read_settings
from stepscope.policy.checkpoint.models import usable_device
from stepscope.policy.group import current
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import sample_rollouts
from stepscope.policy.sampling.base import Sampler
from stepscope.policy.state import Policy
from stepscope.report import evaluated, write_evaluation
from stepscope.results import FloatArray
from stepscope.results.evaluation import EvaluationChanges, companion, law_path
from stepscope.runs import EXAMPLE, RunFolder, locked, verified, write_record
from stepscope.stats import Estimate
from stepscope.tasks import TemplatedTask
from stepscope.trackers import require_installed

LAW_CHECKPOINTS = 4
"""Fewest checkpoints to which the entropy law is fitted."""

MAY_DIFFER = ("source", "out", "device", "batch_size", "temperatures", "top_ps", "bootstrap", "report_to")
"""Keys of the configuration that may change between two calls on one evaluation."""


def run_eval(config: EvalConfig, *, resume: bool = False) -> Path:
    """Evaluate one checkpoint or all of a run; leaves the table, what belongs to it, and a page.

    Beside ``eval.parquet``: ``eval_prompts.parquet`` (per prompt), ``eval_profiles.parquet`` (other ways of
    sampling), ``eval_changes.json`` (paired differences between checkpoints), ``entropy_law.json``,
    ``eval.html``, and ``eval_parts/`` with the finished parts and all responses. Several processes that were
    started together (torchrun) evaluate together, and the first one keeps the files.

    Args:
        config: what to evaluate, how, and where to.
        resume: go on where an earlier call stopped; what it finished is not sampled again, and new
            checkpoints and profiles are added.

    Where rewards are at fault, one response with its prompt and grade is shown and kept in
    ``eval_example.json``.

    Returns:
        The table.

    Raises:
        RunFolderError: the file exists already and ``resume`` is off, the parts are of another evaluation, or
            another process is at work on them.
        CheckpointError: there is no checkpoint.
    """
    out = table_of(config)
    with together(config.device, out.parent) as group:
        if group.is_main:
            refuse_present(out, resume)
        evaluate_all(config, out, resume=resume)
        if group.is_main:
            page = write_evaluation(out)
            say_result("eval", evaluated(out), out, page)
    return out


def evaluate_all(config: EvalConfig, out: Path, *, resume: bool) -> None:
    """Evaluate what ``config.source`` stands for and write the table to ``out`` and what belongs to it.

    In the group that is entered; else by this process alone, however many there are.

    Raises:
        RunFolderError: see :func:`run_eval`.
        CheckpointError: there is no checkpoint.
        TaskError: a task's data are not those the evaluation began with.
        ConfigError: a tracker is not installed.
    """
    usable_device(config.device)
    require_installed(config.report_to)
    checkpoints = checkpoints_in(Path(config.source))
    folder = companion(out, "parts")
    parts, example = RunFolder(folder), companion(out, EXAMPLE)
    with main_only(lambda: locked(folder)):
        if current().is_main:
            source = {"source": str(Path(config.source).resolve())}
            plain = config.model_dump(mode="json")
            RunFolder.open(folder, plain, verb="eval", resume=resume, ignore=MAY_DIFFER, extra=source)
            hold_data(parts, _tasks(config, checkpoints), config)
            example.unlink(missing_ok=True)
        try:
            _say_if_long(config, checkpoints, parts)
            found = [_evaluate_checkpoint(config, c, parts, example) for c in checkpoints]
        except RewardError as error:
            raise shown_and_kept(error, example) from error
        finally:
            if current().is_main:
                parts.clean_up()
        if not current().is_main:
            return
        rows, profiles = [row for row, _ in found], [row for _, others in found for row in others]
        parts.seal_beside([])
        parts.seal_beside(_write_tables(config, out, rows, profiles))
        track_evaluation(config.report_to, out, parts, rows)


def _say_if_long(config: EvalConfig, checkpoints: Sequence[Path], parts: RunFolder) -> None:
    """Try how fast this machine samples, where it may take hours, and say so if it will. Collective."""
    settings = read_settings(checkpoints[0], overrides=config.loss.given(), for_step=False)
    keys = [(c, key) for c in checkpoints for key in part_keys(config, c, settings.temperature)]
    left = current().from_main(lambda: [c for c, key in keys if not parts.is_done(key)])
    if not left or config.sampler.engine != "transformers":
        return
    responses, longest = (
        len(left) * config.num_prompts * config.samples_per_prompt,
        settings.max_response_tokens,
    )
    bytes_there = sum(file.stat().st_size for file in left[0].glob("*model*.safetensors"))
    if bytes_there * 1.5 * longest * responses < LONG * least_speed(usable_device(config.device)):
        return
    loaded = _Loaded(config, left[0], parts.file(EXAMPLE))
    begin = time.monotonic()
    few = PILOT[0]
    sample_rollouts(
        loaded.policy, loaded.task, num_prompts=few, group_size=1, seed=config.seed, split=config.split
    )
    each = current().from_main(lambda: (time.monotonic() - begin) / few)
    if (total := each * responses) >= LONG:
        say(
            f"warning: this will take about {in_words(total)}: {responses:,} responses of up to "
            f"{longest} tokens at {each:.2g} s. Fewer of them (num_prompts, samples_per_prompt), one "
            "checkpoint in place of a run, a GPU (--device) or an inference server (docs/SAMPLERS.md) make "
            "it shorter"
        )


def _write_tables(
    config: EvalConfig, out: Path, rows: list[EvaluationRow], profiles: list[EvaluationRow]
) -> list[Path]:
    """Everything but the parts and the page; the table itself comes last."""
    changes_path, profiles_path = companion(out, "changes.json"), companion(out, "profiles.parquet")
    written = [changes_path, out, prompts_path(out)]
    if profiles:
        write_eval(profiles, profiles_path)
        written += [profiles_path, prompts_path(profiles_path)]
    pairs = [*pairwise(rows), *([(rows[0], rows[-1])] if len(rows) > 2 else [])]
    changes = tuple(compared(before, after) for before, after in pairs)
    write_record(changes_path, EvaluationChanges(changes))
    if len(rows) >= LAW_CHECKPOINTS:
        law = fit_run(
            [row.step for row in rows],
            *_per_prompt(rows),
            bootstrap_resamples=config.bootstrap,
            seed=config.seed,
        )
        write_record(law_path(out), law)
        written.append(law_path(out))
    write_eval(rows, out)
    return written


def _tasks(config: EvalConfig, checkpoints: Sequence[Path]) -> list[TemplatedTask]:
    """The tasks to be asked, of the configuration or of the trainings; none where prompts are given."""
    if config.prompts is not None:
        return []
    known = [] if config.task else [read_settings(c, overrides=config.loss.given()) for c in checkpoints]
    tasks = tasks_of([config.task or "", *(settings.task for settings in known)])
    for task in tasks:
        say_what_is_shared(task, {settings.task: settings.task_digest for settings in known})
    return tasks


def _max_sequences(config: EvalConfig) -> int:
    """All sequences at once on a GPU, within its memory; a CPU gains nothing beyond 64."""
    if config.batch_size != "auto":
        return config.batch_size
    on_gpu = torch.cuda.is_available() if config.device is None else config.device.startswith("cuda")
    return min(config.num_prompts * config.samples_per_prompt, 1024 if on_gpu else 64)


def _evaluate_checkpoint(
    config: EvalConfig, checkpoint: Path, parts: RunFolder, example: Path
) -> tuple[EvaluationRow, list[EvaluationRow]]:
    """The row of a checkpoint as it is, and those of its profiles; each from its part if that is finished."""
    loaded = _Loaded(config, checkpoint, example)
    try:
        return _rows(loaded, parts)
    finally:
        loaded.sampler.close()


def _rows(loaded: _Loaded, parts: RunFolder) -> tuple[EvaluationRow, list[EvaluationRow]]:
    config, checkpoint = loaded.config, loaded.checkpoint
    digest = current().from_main(lambda: checkpoint_digest(checkpoint))

    def part(key: str, temperature: float | None, top_p: float) -> EvaluationRow:
        file = parts.file(f"{key}.parquet")
        if not current().from_main(lambda: parts.is_done(key)):
            responses = parts.file(f"{key}_responses.parquet")
            names = [path.name for path in (file, prompts_path(file), responses)]
            with timed(f"eval {key}"), main_only(lambda: parts.stage(key, names)):
                row = loaded.evaluate(temperature, top_p, responses)
                write_eval([replace(row, checkpoint_digest=digest)], file)
        row = current().from_main(lambda: _read_part(file))
        if row.checkpoint_digest != digest:
            raise RunFolderError(
                f"{parts.path}: {checkpoint} has changed since it was evaluated (digest "
                f"{row.checkpoint_digest} then, {digest} now); remove {parts.path} to evaluate it again"
            )
        return row

    own = part(checkpoint.name, None, 1.0)
    if not config.temperatures and not config.top_ps:
        return own, []
    profiles = []
    for temperature, top_p in _profiles(config, own.temperature):
        if (temperature, top_p) == (own.temperature, 1.0):
            profiles.append(own)
        else:
            profiles.append(part(_profile_key(checkpoint, temperature, top_p), temperature, top_p))
    return own, profiles


def _profiles(config: EvalConfig, own: float) -> list[tuple[float, float]]:
    """Temperatures and nuclei, ``own`` being the run's temperature."""
    return [(t, p) for t in config.temperatures or [own] for p in config.top_ps or [1.0]]


def _profile_key(checkpoint: Path, temperature: float, top_p: float) -> str:
    return f"{checkpoint.name}--temperature-{temperature:g}--top_p-{top_p:g}"


def part_keys(config: EvalConfig, checkpoint: Path, own: float) -> list[str]:
    """Names of the parts that an evaluation of a checkpoint leaves, ``own`` being the run's temperature."""
    further = _profiles(config, own) if config.temperatures or config.top_ps else []
    keys = [_profile_key(checkpoint, t, p) for t, p in further if (t, p) != (own, 1.0)]
    return [checkpoint.name, *keys]


def _read_part(file: Path) -> EvaluationRow:
    for written in (file, prompts_path(file)):
        verified(written)
    (row,) = read_eval(file)
    return row


class _Loaded:
    """A checkpoint, loaded once something of it is to be sampled."""

    def __init__(self, config: EvalConfig, checkpoint: Path, example: Path) -> None:
        self.config = config
        self.checkpoint = checkpoint
        self.example = example

    @cached_property
    def policy(self) -> Policy:
        config = self.config
        return open_policy(
            self.checkpoint,
            precision=config.precision,
            device=config.device,
            loss=config.loss,
            require_optimizer=False,
        )

    @cached_property
    def task(self) -> TemplatedTask:
        task = open_task(self.config.task, self.policy, own=self.config)
        if conflict := prompt_conflict(self.policy, task):
            say(f"warning: {conflict}")
        return task

    @cached_property
    def sampler(self) -> Sampler:
        """Who draws the responses."""
        return make_sampler(self.config.sampler)

    def evaluate(self, temperature: float | None, top_p: float, responses: Path) -> EvaluationRow:
        config = self.config
        row = evaluate(
            self.policy,
            self.task,
            num_prompts=config.num_prompts,
            samples_per_prompt=config.samples_per_prompt,
            seed=config.seed,
            ks=config.ks,
            split=config.split,
            temperature=temperature,
            top_p=top_p,
            sampler=self.sampler,
            responses=responses,
            budget=Budget(max_sequences=_max_sequences(config), progress=True),
        )
        if current().is_main and not self.example.exists():
            say_if_nothing_earns(row, self.task, responses, self.example)
        if current().is_main and temperature is None and top_p == 1:
            self._say_if_far_from_the_log(row)
        return row

    def _say_if_far_from_the_log(self, row: EvaluationRow) -> None:
        entropy = Estimate(
            row.entropy_per_token,
            row.entropy_per_token_stderr,
            len(row.prompts),
            "nats/token",
            "ratio of sums over responses",
        )
        found = entropy_against_log(self.policy, entropy)
        if found is not None and found["doubt"]:
            look = "`stepscope check` shows a prompt as it is asked"
            say(f"warning: {self.checkpoint}: {found['doubt']}; {look}")


def _per_prompt(rows: Sequence[EvaluationRow]) -> tuple[FloatArray, FloatArray, FloatArray]:
    """(checkpoint, prompt) entropy, tokens and fraction solved, for the entropy law."""
    entropy = np.array([[p.entropy for p in row.prompts] for row in rows])
    tokens = np.array([[float(p.num_tokens) for p in row.prompts] for row in rows])
    solved = np.array([[p.num_correct / p.num_samples for p in row.prompts] for row in rows])
    return entropy, tokens, solved
