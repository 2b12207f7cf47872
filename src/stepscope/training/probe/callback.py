"""Probes inside a training: what a step is about to do to the entropy, and what it then did.

:class:`StepProbe` is a callback for any GRPO run of TRL:

    GRPOTrainer(..., callbacks=[stepscope.StepProbe(every=20)])
"""

from __future__ import annotations

import math
import re
import time
import warnings
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import gather_object
from transformers import TrainerCallback

from stepscope.errors import ConfigError, RewardError
from stepscope.measure.change.online import realised_change
from stepscope.measure.noise.window import window_noise_scale
from stepscope.policy.group import Group, formed
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import response_text
from stepscope.policy.state import Policy
from stepscope.policy.twin import is_cut, on_device
from stepscope.runs import EXAMPLE
from stepscope.stats import Estimate
from stepscope.tasks import Task, load_task
from stepscope.tasks.example import Example
from stepscope.trackers import Entry, Trackers
from stepscope.training.probe.predict import Pending, predict
from stepscope.training.probe.shown import probe_entry
from stepscope.training.probe.source import Source, TaskSource, TrainerSource, example_of
from stepscope.training.probe.table import append, columns_of, doubt, forget, tokens_path
from stepscope.training.watching.capture import BatchRecorder, Captured
from stepscope.training.watching.guest import (
    Guest,
    reason_of,
    require_readable,
    settings_of,
    trainer_of,
    warn_off,
)
from stepscope.training.watching.state import (
    gradient_of,
    looking_at,
    optimizer_state,
    optimizer_within,
    successive_products,
)
from stepscope.training.watching.trackers import trackers_of

NAME = "probe"
"""Name of the only probe of a trainer, or of its first."""

PATIENCE = timedelta(minutes=5)
"""How long processes that probe together wait for one that has given up: less than any training waits."""


@dataclass(eq=False)
class StepProbe(TrainerCallback):  # type: ignore[misc]
    """Predicts what a step does to the entropy, lets the optimizer act, and measures what it did.

    Every ``every`` steps, beginning with the first: once the gradient is complete (and clipped) and before
    the optimizer acts, a probe batch is sampled from the policy as it is, and the linear change of its
    entropy per token (on policy) is computed along each part of the very step to come: ``momentum``,
    ``decay`` and ``batch``. After the step the realised change is measured on the same samples. The gradient
    noise scale comes from this step's own batch (``noise``), and at every step from the gradients of
    successive steps (``measure.noise.window``).

    Without a ``task`` the probe asks what the training asks: rows of the trainer's ``eval_dataset``, or else
    of its ``train_dataset`` outside the batch under way, through the trainer's own chat template and
    tokenization, graded by its own reward functions. An entropy far from the one that the trainer logs is
    warned of, in the log and in the row (``warning``): then the probe asks something else. The warning shows
    one prompt with its response, as does one of reward functions that fail, and ``probes_example.json`` has
    all of it.

    The training is not disturbed: random states, modes and gradients are left as they were, so that weights,
    optimizer and samples of a run are bitwise those without the probe. A probe that cannot work, from the
    start or from some step on, warns once and is off; the training goes on. Figures appear as ``probe/...``
    in the log of the step: the probe puts itself before the other callbacks, so that trackers show them. On
    TensorBoard, W&B and Trackio it also shows histograms and coloured responses, ``stepscope/probe/...``. All
    rows are in ``file``.

    Cost of one probe: sampling ``num_prompts`` responses, two to three forward-mode passes and five forward
    passes over them; with ``noise`` a forward and backward pass over the update batch. With several processes
    the main one probes and the others wait; under FSDP2, where none has the whole model, all of them probe
    together, with a second model on the same parts (:mod:`stepscope.policy.twin`). ``seconds`` in the table
    over the time of a step without probe, divided by ``every``, is the share of the training time: on the
    demo's training a probe takes 1.15 steps of CPU time, hence the default cadence.

    Attributes:
        task: where probe prompts come from: None for the trainer itself, or a task, or its specification
            (``gsm8k``, ``jsonl:FILE``, ...), whose prompt template must be that of the training.
        every: optimizer steps from one probe to the next; the steps probed are 1, 1 + every, ...: those
            taken from a checkpoint that is saved every ``every`` steps.
        num_prompts: probe prompts, fresh ones for every probe, with one response each.
        split: of the task; probe prompts must not be those that are trained on.
        seed: of prompts and responses.
        template: prompt template, where ``task`` is a specification.
        answer_format: where in a response its answer stands, where ``task`` is a specification.
        noise: also compute the noise scale of the step's own batch.
        top_tokens: tokens of the update batch with the largest influence to record; 0 for none. Costs
            about as much as the rest of the probe and the update's forward and backward pass.
        window: steps in the window of the noise scale across steps.
        budget: what may be used at a time.
        rewards: without a task, grade the probe's responses with the trainer's reward functions. Switch it
            off for functions that cost money, or that remember what they have graded.
        file: parquet table with a row per probe; None for ``probes.parquet`` in the trainer's ``output_dir``,
            ``probes-NAME.parquet`` for a probe of another name. Tokens go to a file of the same name with
            ``_tokens`` added.
        name: tells the probes of one trainer apart, in file names, tags (``probe/NAME/...``) and
            checkpoints; None for ``probe``, or after the first for the kind of the task.

    Raises:
        ConfigError: settings that mean nothing.
    """

    task: str | Task | None = None
    every: int = 30
    num_prompts: int = 32
    split: str = "test"
    seed: int = 0
    template: str | None = None
    answer_format: str = "tags"
    noise: bool = True
    top_tokens: int = 0
    window: int = 64
    max_sequences: int = 32
    rewards: bool = True
    file: Path | str | None = None
    name: str | None = None
    _name: str = field(default=NAME, init=False)
    _off: bool = field(default=True, init=False)
    _due: bool = field(default=False, init=False)
    _warned: bool = field(default=False, init=False)
    _source: Source | None = field(default=None, init=False)
    _group: Group | None = field(default=None, init=False)
    _products: list[tuple[float, float]] = field(default_factory=list, init=False)
    _recorder: BatchRecorder | None = field(default=None, init=False)
    _pending: Pending | None = field(default=None, init=False)
    _row: tuple[dict[str, Any], dict[str, Estimate]] | None = field(default=None, init=False)
    _callbacks: list[Any] = field(default_factory=list, init=False)
    _trackers: Trackers | None = field(default=None, init=False)
    _entry: Entry | None = field(default=None, init=False)
    _example: Example | None = field(default=None, init=False)
    _table: Path | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        for name in ("every", "num_prompts", "window", "max_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"StepProbe: {name} is {getattr(self, name)}, expected at least 1")
        if self.num_prompts < 2:
            raise ConfigError("StepProbe: num_prompts is 1, expected at least 2, or there are no errors")
        if self.name is not None and not re.fullmatch(r"[\w-]+", self.name):
            raise ConfigError(f"StepProbe: name is {self.name!r}, expected letters, digits, _ and - alone")
        if self.task is None and self.template is not None:
            raise ConfigError("StepProbe: template is for a task, and there is none; leave it out")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Find out whether this run can be probed; take up what the checkpoint it goes on from has."""
        self._off, self._warned, self._due, self._row = False, False, False, None
        self._group, self._trackers, self._entry, self._example, self._table = (None,) * 5
        with Guest(self, state):
            trainer = trainer_of(self)
            self._callbacks = trainer.callback_handler.callbacks
            probes = self._step_to_the_front(self._callbacks)
            self._name = names_of(probes)[probes.index(self)]
            require_readable(args, model, optimizer, parts=True)
            self._source = self._source_of(trainer)
            earlier = probes[: probes.index(self)]
            path = self._path(args)
            if any(path.resolve() == other._path(args).resolve() for other in earlier):
                raise ConfigError(
                    f"{path} is the table of another probe; give each a file or a name of its own"
                )
            stored = state.stateful_callbacks.get(self._key, {}) if state.global_step else {}
            self._products = [(float(a), float(b)) for a, b in stored.get("products", [])]
            if state.is_world_process_zero:
                self._table = path
                for table in (path, tokens_path(path)):
                    forget(table, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Watch the loss of a step that is probed."""
        self._write(args, state, float("nan"))
        self._due = False
        if state.global_step % self.every:
            return
        self._off = any(gather_object([self._off]))  # what failed on one process is off on all
        self._due = not self._off
        if self._due and self._group is None and is_cut(model):
            self._group = formed(device=on_device(model), lockstep=True, patience=PATIENCE)
        if self._due and (self.noise or self.top_tokens):
            self._recorder = BatchRecorder(model)

    def on_pre_optimizer_step(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: Any,
        optimizer: Any,
        processing_class: Any,
        **kwargs: Any,
    ) -> None:
        """Predict what the step will do."""
        if self._off:
            return
        with Guest(self, state):
            inner = optimizer_within(optimizer, parts=True)
            pair = successive_products(inner)
            if pair is not None:
                self._products = [*self._products, pair][-self.window :]
            state.stateful_callbacks[self._key] = {"products": [list(pair) for pair in self._products]}
            if not self._due:
                return
            assert self._source is not None
            begin = time.perf_counter()
            captured: list[Captured] = []
            if self._recorder is not None:
                self._recorder.stop()
                captured, self._recorder = self._recorder.gather(), None
            used = self._source.used()
            alone = self._group is None and not state.is_world_process_zero
            if alone or not any(group["lr"] > 0 for group in inner.param_groups):
                return
            with looking_at(model, self._group) as (seen, own):
                policy = Policy(
                    model=seen,
                    tokenizer=processing_class,
                    settings=settings_of(args),
                    optimizer=optimizer_state(inner, seen, own=own),
                    step=state.global_step,
                )
                seed = int(np.random.SeedSequence([self.seed, policy.step]).generate_state(1)[0])
                self._pending = predict(
                    policy,
                    self._source.sample(policy, self.num_prompts, seed=seed, used=used),
                    captured,
                    args,
                    gradient=gradient_of(seen, own),
                    noise=self.noise,
                    top_tokens=self.top_tokens,
                    budget=Budget(max_sequences=self.max_sequences),
                )
            self._pending.seconds = time.perf_counter() - begin
            self._example = example_of(self._pending.prediction.rollouts, self._source.name)

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any, processing_class: Any, **kwargs: Any
    ) -> Any:
        """Measure what the step did, and have it logged."""
        if self._due:
            control.should_log = True  # on every process: logging gathers the loss from all
        pending, self._pending = self._pending, None
        if pending is None:
            return control
        with Guest(self, state):
            begin = time.perf_counter()
            with looking_at(model, self._group) as (seen, _):
                policy = Policy(model=seen, tokenizer=processing_class, settings=settings_of(args))
                change = realised_change(
                    policy, pending.prediction, budget=Budget(max_sequences=self.max_sequences)
                )
            if not state.is_world_process_zero:
                return control
            point = change.points[0]
            figures = {
                "entropy": change.value,
                "predicted": point.linear,
                **pending.prediction.parts,
                "realised": point.true,
                "difference": point.excess,
                **pending.figures,
                "noise_across_steps": window_noise_scale(
                    np.array(self._products, dtype=np.float64).reshape(-1, 2),
                    prompts_per_step=_prompts_per_step(args),
                    block=round(1 / (1 - args.adam_beta1)),
                ),
            }
            if pending.tokens:
                count = len(pending.tokens["position"])
                columns = {"step": [state.global_step] * count, **pending.tokens}
                append(tokens_path(self._path(args)), columns)
            row = {"step": state.global_step, "lr": pending.prediction.lr, **columns_of(figures)}
            row |= {
                "effective_sample_size": point.effective_sample_size,
                "pareto_k": point.pareto_k,
                "round_off": change.round_off,
                "grad_norm": pending.grad_norm,
                "seconds": pending.seconds + time.perf_counter() - begin,
            }
            self._row = row, figures
            if self._shown_on(args).active:
                self._entry = probe_entry(
                    self._tag, state.global_step, pending.prediction, figures, response_text(policy)
                )
        return control

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the figures of the step to its log entry and to what later callbacks show."""
        if logs is None or "loss" not in logs or self._row is None:  # somebody else's entry
            return
        row, figures = self._row
        entropy = logs.get("entropy")
        self._write(args, state, float("nan") if entropy is None else float(entropy))
        values = {name: estimate.value for name, estimate in figures.items()} | {"seconds": row["seconds"]}
        shown = {f"{self._tag}/{name}": value for name, value in values.items() if math.isfinite(value)}
        logs.update(shown)
        state.log_history[-1].update(shown)
        entry, self._entry = self._entry, None
        if entry is not None:
            self._shown_on(args).log(entry)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write what was not logged; let go of the trainer."""
        self._write(args, state, float("nan"))
        self._source, self._trackers, self._entry, self._callbacks = None, None, None, []

    @property
    def _tag(self) -> str:
        """The first part of its names in trackers."""
        return NAME if self._name == NAME else f"{NAME}/{self._name}"

    def _shown_on(self, args: Any) -> Trackers:
        """The trackers of this training; known once its callbacks have begun."""
        if self._trackers is None:
            path = self._path(args)
            sent = path.with_name(f"{path.stem}_trackers.yaml")
            self._trackers = trackers_of(self._callbacks, f"StepProbe {self._name}", sent)
        return self._trackers

    @property
    def _key(self) -> str:
        """Where the state stands in a checkpoint's ``trainer_state.json``."""
        return f"{type(self).__name__}:{self._name}"

    def _path(self, args: Any) -> Path:
        if self.file is not None:
            return Path(self.file)
        return Path(args.output_dir) / (
            "probes.parquet" if self._name == NAME else f"probes-{self._name}.parquet"
        )

    def _step_to_the_front(self, callbacks: list[Any]) -> list[StepProbe]:
        """Stand before all callbacks but earlier probes; all probes in their order.

        The list may be changed while it is walked: whoever is at this place afterwards has been called.
        """
        probes = [c for c in callbacks if isinstance(c, StepProbe)]
        callbacks.remove(self)
        callbacks.insert(probes.index(self), self)
        return probes

    def _source_of(self, trainer: Any) -> Source:
        """Where this run's probe prompts come from."""
        if self.task is None:
            own = TrainerSource(trainer, self.rewards)
            own.check(self.num_prompts)
            return own
        task = self.task
        if isinstance(task, str):
            task = load_task(task, template=self.template, answer_format=self.answer_format)
        available = len(task.problems(self.split))
        if available < self.num_prompts:
            raise ConfigError(
                f"num_prompts is {self.num_prompts}, the {self.split} split of {task.spec} has {available}; "
                "lower it"
            )
        return TaskSource(task, self.split)

    def _write(self, args: Any, state: Any, logged: float) -> None:
        """Add the row of the last probe to the table; warn where it does not fit what the trainer logs."""
        if self._row is None:
            return
        (row, figures), self._row = self._row, None
        with Guest(self, state):
            assert self._source is not None
            prompts = self._source.name
            warning = doubt(figures["entropy"], logged, prompts_per_step=_prompts_per_step(args))
            if warning:
                warning = f"{warning}: its prompts ({prompts}) {self._source.doubtful}"
            row |= {"entropy_logged": logged, "prompts": prompts, "warning": warning}
            append(self._path(args), {name: [value] for name, value in row.items()})
            if warning and not self._warned:
                self._warned = True
                if self._example is not None:
                    warning = f"{warning}. For example: {self._example}{self._kept(self._example)}"
                warnings.warn(f"StepProbe {self._name}, step {row['step']}: {warning}", stacklevel=2)

    def _kept(self, example: Example) -> str:
        """Where a response is kept beside the table, in words."""
        if self._table is None:
            return ""
        file = self._table.with_name(f"{self._table.stem}_{EXAMPLE}")
        file.parent.mkdir(parents=True, exist_ok=True)
        example.write(file)
        return f". All of it is in {file}"

    def give_up(self, error: Exception, step: int) -> None:
        """Be off from here on, and say so."""
        self._off, self._pending, self._row, self._entry = True, None, None, None
        if self._recorder is not None:
            self._recorder.stop()
            self._recorder = None
        reason = reason_of(error, "StepProbe")
        if isinstance(error, RewardError) and isinstance(error.example, Example):
            reason += self._kept(error.example)
        warn_off(f"StepProbe {self._name}", step, reason)


def names_of(probes: list[StepProbe]) -> list[str]:
    """Names of a trainer's probes: their own, ``probe``, or the kind of task; numbered where equal."""
    names: list[str] = []
    for probe in probes:
        spec = (
            probe.task
            if isinstance(probe.task, str)
            else "trainer"
            if probe.task is None
            else probe.task.spec
        )
        kind = re.sub(r"[^\w-]", "-", spec.split(":")[0])
        wanted = probe.name or (kind if names else NAME)
        numbered = (wanted if number == 1 else f"{wanted}-{number}" for number in range(1, len(probes) + 2))
        names.append(next(name for name in numbered if name not in names))
    return names


def _prompts_per_step(args: Any) -> float:
    sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return float(sequences / args.num_generations)
