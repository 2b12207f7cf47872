"""The recorder of a training: one line in any GRPO run of TRL.

GRPOTrainer(..., callbacks=[stepscope.StepRecorder("runs/mine")])
"""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback

from stepscope.console import say
from stepscope.errors import ConfigError, MeasurementError, RunFolderError
from stepscope.policy.optim.adamw import AdamWState
from stepscope.policy.optim.registry import kind_of
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results.recording import FOLDER, RecordedGroup, RunRecord, StepFigures
from stepscope.training.record.batch import StepBatch, gradient_error, step_batch
from stepscope.training.record.size import record_size, said
from stepscope.training.record.tap import TrainedSequence, TrainerTap
from stepscope.training.record.writer import RecordWriter, live_state
from stepscope.training.watching.capture import gathered
from stepscope.training.watching.guest import (
    Guest,
    clipping_of,
    reason_of,
    require_readable,
    settings_of,
    trainer_of,
    warn_off,
)

SAME_GRADIENT = 1e-3
"""Largest relative difference between the gradient and that of the recorded token weights ..."""

SAME_GRADIENT_IN_HALF = 0.1
"""... and where the training computes in bfloat16, whose numbers have three digits."""

SAME_NORM = 1e-3
"""Largest relative difference between the gradient's norm after clipping and what clipping says it is."""


@dataclass(eq=False)
class StepRecorder(TrainerCallback):  # type: ignore[misc]
    """Records every optimizer step: its batch, its token weights, its gradient, and states to replay from.

    A folder ``OUT/record`` (``stepscope.results.recording`` has its layout) from which
    ``stepscope.policy.recorded.RecordedTraining`` gives back every step bit for bit: the batch as the loss
    saw it, over all micro-batches; token weights w = -dLoss/dl as the loss sent them back; clip coefficient,
    gradient norm and learning rates; parameters and moments before and after. For each step one vector is
    stored, the gradient that the optimizer took, since AdamW's own step on it gives the rest exactly;
    parameters and both moments at the start, at every ``state_every``-th step and at the end, where a replay
    begins and what it is held against. Only parameters that are trained are recorded.

    The training is not disturbed: its weights, moments and random states are bitwise those without the
    recorder. Sizes are said before the first step. A recorder that cannot work, from the start or from some
    step on, warns once and is off; the training goes on, and the record says why it ends. A training that is
    resumed goes on with its record: steps behind the checkpoint are taken again and replace the old.

    With several processes the main one records and the others hand it their sequences.

    Attributes:
        out: run folder; the record goes to ``OUT/record``. None for the trainer's ``output_dir``.
        state_every: steps from one whole state that is kept to the next. More of them take more space, fewer
            take longer to replay.
        max_bytes: most that the record may take. States are thinned out to fit, and a record that does not
            fit even so is refused before the start.
        check: hold the recorded token weights against the gradient, once, at the first step that has one: a
            forward and a backward pass.

    Raises:
        ConfigError: settings that mean nothing.
    """

    out: Path | str | None = None
    state_every: int = 16
    max_bytes: int = 50_000_000_000
    check: bool = True
    _begun: bool = field(default=False, init=False)
    _off: bool = field(default=True, init=False)
    _due: bool = field(default=False, init=False)
    _tap: TrainerTap | None = field(default=None, init=False)
    _writer: RecordWriter | None = field(default=None, init=False)
    _names: dict[int, str] = field(default_factory=dict, init=False)
    _pending: tuple[StepFigures, StepBatch] | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        for name in ("state_every", "max_bytes"):
            if getattr(self, name) < 1:
                raise ConfigError(f"StepRecorder: {name} is {getattr(self, name)}, expected at least 1")

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Find out whether this run can be recorded, say what it will take, and begin or go on."""
        self._let_go()
        self._begun, self._off, self._pending, self._writer = True, False, None, None
        with Guest(self, state):
            trainer = trainer_of(self)
            if any(isinstance(c, StepRecorder) and c is not self for c in trainer.callback_handler.callbacks):
                raise ConfigError("the trainer has two recorders; give it one")
            inner = require_adamw(require_readable(args, model, optimizer))
            named = {id(p): n for n, p in model.named_parameters()}
            self._names = {id(p): named[id(p)] for g in inner.param_groups for p in g["params"]}
            self._tap = TrainerTap(trainer, lambda: Guest(self, state))
            if state.is_world_process_zero:
                self._begin(args, state, inner)
            self._tap.open()

    def _begin(self, args: Any, state: Any, optimizer: torch.optim.Optimizer) -> None:
        folder = Path(args.output_dir if self.out is None else self.out) / FOLDER
        live = live_state(optimizer, self._names)
        size = record_size(
            live.parameters,
            sequences=args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size,
            max_response_tokens=args.max_completion_length,
            steps=state.max_steps,
            state_every=self.state_every,
        )
        fits = size.within(self.max_bytes, "max_bytes")
        folder.parent.mkdir(parents=True, exist_ok=True)
        rest = replace(fits, steps=state.max_steps - state.global_step)
        rest.within(shutil.disk_usage(folder.parent).free, "free space on the disk")
        thinned = "" if fits.state_every == size.state_every else f"; thinned to fit {said(self.max_bytes)}"
        say(f"{folder}: {fits}{thinned}")
        record = RunRecord(
            groups=tuple(_group(g, self._names) for g in optimizer.param_groups),
            first_step=1,
            planned_steps=state.max_steps,
            state_every=fits.state_every,
            max_grad_norm=float(args.max_grad_norm or 0.0),
            temperature=float(args.temperature),
            max_response_tokens=int(args.max_completion_length),
            num_iterations=int(getattr(args, "num_iterations", 1)),
            loss_type=str(getattr(args, "loss_type", "")),
            beta=float(getattr(args, "beta", 0.0)),
            device=next(iter(live.parameters.values())).device.type,
            torch=str(torch.__version__),
        )
        writer = RecordWriter(folder, record)
        writer.begin(state.global_step, live)
        self._writer = writer

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Watch the loss; a recorder that came to a training under way begins here."""
        if not self._begun:
            self.on_train_begin(args, state, control, model=model, **kwargs)
        self._off = any(gather_object([self._off]))  # what failed on one process is off on all
        self._due = not self._off
        if self._off:
            self._let_go()
            return
        assert self._tap is not None
        self._tap.watch(model)

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, processing_class: Any, **kwargs: Any
    ) -> None:
        """Take the batch, and the gradient's norm before and after clipping."""
        if not self._due:
            return
        own: list[TrainedSequence] = []
        with Guest(self, state):
            if self._tap is not None:
                own = self._tap.sequences()
                self._tap.stop()
        sequences = gathered(own)  # every process, whatever happened to one
        if self._off or not state.is_world_process_zero:
            return
        with Guest(self, state):
            assert self._tap is not None
            assert self._writer is not None
            norm, clip = clipping_of(self._tap.trainer)
            used = float(get_total_norm([p.grad for p in model.parameters() if p.grad is not None]))
            if not abs(used - clip * norm) <= SAME_NORM * max(used, clip * norm):
                raise MeasurementError(
                    f"the gradient has norm {used:.4g}, expected {clip * norm:.4g} after clipping: something "
                    "else changes it before the optimizer takes it; record without it"
                )
            policy = Policy(model=model, tokenizer=processing_class, settings=settings_of(args))
            batch = step_batch(sequences, policy)
            error = math.nan
            if self.check and norm > 0 and not self._writer.checked:
                error = gradient_error(
                    policy,
                    batch,
                    clip,
                    limit=SAME_GRADIENT_IN_HALF if _half(args, model) else SAME_GRADIENT,
                    budget=Budget(max_sequences=args.per_device_train_batch_size),
                )
            self._pending = StepFigures(state.global_step + 1, (), norm, clip, error), batch

    def on_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Write the step, with the gradient that the optimizer has just taken."""
        pending, self._pending = self._pending, None
        if self._off or pending is None:
            return
        with Guest(self, state):
            assert self._writer is not None
            inner = getattr(optimizer, "optimizer", optimizer)
            if tuple(_group(g, self._names) for g in inner.param_groups) != self._writer.record.groups:
                raise MeasurementError("the optimizer's settings change during the training; record without")
            figures, batch = pending
            figures = replace(figures, lrs=tuple(float(g["lr"]) for g in inner.param_groups))
            kept = live_state(inner, self._names) if self._writer.keeps_state(figures.step) else None
            self._writer.step(figures, batch, _gradient(inner, self._names), kept)
            if self._writer.written > self.max_bytes:
                raise RunFolderError(
                    f"{self._writer.folder}: takes {said(self._writer.written)}, and max_bytes is "
                    f"{said(self.max_bytes)}"
                )

    def on_train_end(self, args: Any, state: Any, control: Any, *, optimizer: Any, **kwargs: Any) -> None:
        """Keep the last state; let go of the trainer."""
        with Guest(self, state):
            writer = self._writer
            if not self._off and writer is not None and state.global_step >= writer.record.first_step:
                inner = getattr(optimizer, "optimizer", optimizer)
                writer.finish(state.global_step, live_state(inner, self._names))
        self._let_go()
        self._begun, self._writer = False, None

    def give_up(self, error: Exception, step: int) -> None:
        """Be off from here on, say so, and mark the record."""
        if self._off:
            return
        self._off, self._pending = True, None
        self._let_go()
        reason = reason_of(error, "StepRecorder")
        if self._writer is not None:
            with contextlib.suppress(OSError):  # a full disk is what may have ended it
                self._writer.mark(f"from step {step + 1} on nothing is recorded: {reason}")
        warn_off("StepRecorder", step, reason)

    def _let_go(self) -> None:
        if self._tap is not None:
            self._tap.close()
            self._tap = None


def require_adamw(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """The optimizer, which is torch's AdamW.

    Raises:
        ConfigError: it is another, or AMSGrad, or maximizes.
    """
    plain = kind_of(optimizer) is AdamWState and type(optimizer).__module__.startswith("torch.")
    odd = [key for g in optimizer.param_groups for key in ("amsgrad", "maximize") if g.get(key)]
    if not plain or odd:
        what = f"{type(optimizer).__name__}{f' with {odd[0]}' if odd else ''}"
        raise ConfigError(
            f"the optimizer is {what}, and steps are recorded of torch's AdamW alone; train with "
            "optim='adamw_torch' or 'adamw_torch_fused'"
        )
    return optimizer


def _group(group: Mapping[str, Any], names: Mapping[int, str]) -> RecordedGroup:
    """What stays the same of a parameter group."""
    first, second = group["betas"]
    return RecordedGroup(
        names=tuple(names[id(p)] for p in group["params"]),
        betas=(float(first), float(second)),
        eps=float(group["eps"]),
        weight_decay=float(group["weight_decay"]),
        foreach=group.get("foreach"),
        fused=group.get("fused"),
    )


def _gradient(optimizer: torch.optim.Optimizer, names: Mapping[int, str]) -> ParameterVector:
    every = (p for group in optimizer.param_groups for p in group["params"])
    return {names[id(p)]: p.grad for p in every if p.grad is not None}


def _half(args: Any, model: Any) -> bool:
    """Whether the training computes in bfloat16."""
    return bool(args.bf16) or any(p.element_size() < 4 for p in model.parameters())
