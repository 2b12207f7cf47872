"""Probes inside a training: what a step is about to do to the entropy, and what it then did.

:class:`StepProbe` is a callback for any GRPO run of TRL:

    GRPOTrainer(..., callbacks=[stepscope.StepProbe(task="gsm8k", every=20)])
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from stepscope.errors import ConfigError, MeasurementError
from stepscope.measure.influence import influence
from stepscope.measure.live import BASELINE, Prediction, predict_change, realised_change
from stepscope.measure.noise_window import window_noise_scale
from stepscope.measure.step import Step, adamw_components
from stepscope.policy import vectors
from stepscope.policy.rollouts import response_text, sample_rollouts
from stepscope.policy.settings import StepSettings
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.stats import Estimate
from stepscope.tasks import Task, TemplatedTask, load_task
from stepscope.training.probes_batch import (
    BatchRecorder,
    Captured,
    as_rollouts,
    noise_of_batch,
    products_of_batch,
)
from stepscope.training.probes_state import adamw_of, optimizer_state, successive_products, undisturbed
from stepscope.training.probes_table import append, forget, tokens_path


@dataclass
class _Pending:
    """A probe between the two sides of a step."""

    prediction: Prediction
    figures: dict[str, Estimate]
    tokens: dict[str, list[Any]]
    grad_norm: float
    seconds: float


@dataclass(eq=False)
class StepProbe(TrainerCallback, ExportableState):  # type: ignore[misc]
    """Predicts what a step does to the entropy, lets the optimizer act, and measures what it did.

    Every ``every`` steps, beginning with the first: once the gradient is complete (and clipped) and before
    the optimizer acts, a probe batch is sampled from the policy as it is, and the linear change of its
    entropy per token (on policy) is computed along each part of the very step to come: ``momentum``,
    ``decay`` and ``batch``. After the step the realised change is measured on the same samples. The gradient
    noise scale comes from this step's own batch (``noise``), and at every step from the gradients of
    successive steps (``measure.noise_window``).

    The training is not disturbed: random states, modes and gradients are left as they were, so that weights,
    optimizer and samples of a run are bitwise those without the probe. Figures appear as ``probe/...`` in the
    log of the step. Trackers that stand before the probe among the trainer's callbacks do not see them; to
    put it first use ``trainer.callback_handler.callbacks.insert(0, probe)``. All rows are in ``file``.

    Cost of one probe: sampling ``num_prompts`` responses, two to three forward-mode passes and five forward
    passes over them; with ``noise`` a forward and backward pass over the update batch. With several processes
    the main one probes and the others wait. ``seconds`` in the table over the time of a step without probe,
    divided by ``every``, is the share of the training time: on the demo's training a probe takes 1.15
    steps of CPU time, hence the default cadence.

    Attributes:
        task: where probe prompts come from: a task, or its specification (``gsm8k``, ``jsonl:FILE``, ...).
        every: optimizer steps from one probe to the next; the steps probed are 1, 1 + every, ...: those
            taken from a checkpoint that is saved every ``every`` steps.
        num_prompts: probe prompts, fresh ones for every probe, with one response each.
        split: of the task; probe prompts must not be those that are trained on.
        seed: of prompts and responses.
        template: prompt template, where ``task`` is a specification.
        noise: also compute the noise scale of the step's own batch.
        top_tokens: tokens of the update batch with the largest influence to record; 0 for none. Costs
            about as much as the rest of the probe and the update's forward and backward pass.
        window: steps in the window of the noise scale across steps.
        max_sequences: sequences in a forward pass of the probe.
        file: parquet table with a row per probe; None for ``probes.parquet`` in the trainer's ``output_dir``.
            Tokens go to a file of the same name with ``_tokens`` added.

    Raises:
        ConfigError: the trainer is not a GRPO trainer or trains in float16, or the task has too few prompts.
        MeasurementError: the optimizer is not AdamW, or its state is sharded.
    """

    task: str | Task
    every: int = 30
    num_prompts: int = 32
    split: str = "test"
    seed: int = 0
    template: str | None = None
    noise: bool = True
    top_tokens: int = 0
    window: int = 64
    max_sequences: int = 32
    file: Path | str | None = None
    _products: list[tuple[float, float]] = field(default_factory=list, init=False)
    _recorder: BatchRecorder | None = field(default=None, init=False)
    _pending: _Pending | None = field(default=None, init=False)
    _figures: dict[str, float] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        """Refuse settings that mean nothing."""
        for name in ("every", "num_prompts", "window", "max_sequences"):
            if getattr(self, name) < 1:
                raise ConfigError(f"StepProbe: {name} is {getattr(self, name)}, expected at least 1")
        if self.num_prompts < 2:
            raise ConfigError("StepProbe: num_prompts is 1, expected at least 2, or there are no errors")

    def state(self) -> dict[str, Any]:
        """What goes into the checkpoint: the window of the noise scale across steps."""
        names = ("every", "num_prompts", "split", "seed", "template", "noise", "top_tokens", "window")
        spec = self.task if isinstance(self.task, str) else self.task.spec
        file = None if self.file is None else str(self.file)
        arguments = {name: getattr(self, name) for name in names}
        return {
            "args": {"task": spec, "file": file, "max_sequences": self.max_sequences, **arguments},
            "attributes": {"_products": [list(pair) for pair in self._products]},
        }

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: Any, optimizer: Any, **kwargs: Any
    ) -> None:
        """Check that this run can be probed; take up what the checkpoint it goes on from has."""
        if not hasattr(args, "max_completion_length"):
            raise ConfigError(
                f"StepProbe: the trainer has {type(args).__name__}, expected TRL's GRPOConfig; a probe needs "
                "a policy that samples responses"
            )
        if args.fp16:
            raise ConfigError("StepProbe: fp16 scales the gradients; train in bf16 or float32")
        if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
            raise MeasurementError("StepProbe: the model is sharded by FSDP; use plain data parallelism")
        adamw_of(optimizer)
        self.task = load_task(self.task, template=self.template) if isinstance(self.task, str) else self.task
        available = len(self.task.problems(self.split))
        if available < self.num_prompts:
            raise ConfigError(
                f"StepProbe: num_prompts is {self.num_prompts}, the {self.split} split of {self.task.spec} "
                f"has {available}; lower it"
            )
        stored = state.stateful_callbacks.setdefault(type(self).__name__, self.state())
        products = stored["attributes"]["_products"] if state.global_step else []
        self._products = [(float(a), float(b)) for a, b in products]
        if state.is_world_process_zero:
            for path in (self._path(args), tokens_path(self._path(args))):
                forget(path, state.global_step)

    def on_step_begin(self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any) -> None:
        """Watch the loss of a step that is probed."""
        if self._is_due(state) and (self.noise or self.top_tokens):
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
        inner = adamw_of(optimizer)
        pair = successive_products(inner)
        if pair is not None:
            self._products = [*self._products, pair][-self.window :]
        if not self._is_due(state):
            return
        begin = time.perf_counter()
        captured: list[Captured] = []
        if self._recorder is not None:
            self._recorder.stop()
            captured = self._recorder.gather()
            self._recorder = None
        if not state.is_world_process_zero or not any(group["lr"] > 0 for group in inner.param_groups):
            return
        with undisturbed(model):
            policy = Policy(
                model=model,
                tokenizer=processing_class,
                settings=_settings(args),
                optimizer=optimizer_state(inner, model),
                step=state.global_step,
            )
            self._pending = self._predict(policy, captured, args)
        self._pending.seconds = time.perf_counter() - begin

    def on_step_end(
        self, args: Any, state: Any, control: Any, *, model: Any, processing_class: Any, **kwargs: Any
    ) -> Any:
        """Measure what the step did; write it down and have it logged."""
        pending, self._pending = self._pending, None
        if pending is None:
            return control
        begin = time.perf_counter()
        with undisturbed(model):
            policy = Policy(model=model, tokenizer=processing_class, settings=_settings(args))
            change = realised_change(policy, pending.prediction, max_sequences=self.max_sequences)
        point = change.points[0]
        figures = {
            "entropy": change.value,
            "predicted": point.linear,
            **pending.prediction.parts,
            "realised": point.true,
            "difference": point.excess,
            **pending.figures,
            "noise_across_steps": self._noise_across_steps(args),
        }
        seconds = pending.seconds + time.perf_counter() - begin
        row: dict[str, Any] = {"step": state.global_step, "lr": pending.prediction.lr}
        for name, estimate in figures.items():
            row |= {
                name: estimate.value,
                f"{name}_stderr": estimate.stderr,
                f"{name}_reliable": estimate.reliable,
                f"{name}_reason": estimate.reason,
            }
        row |= {
            "effective_sample_size": point.effective_sample_size,
            "pareto_k": point.pareto_k,
            "round_off": change.round_off,
            "grad_norm": pending.grad_norm,
            "seconds": seconds,
        }
        append(self._path(args), {name: [value] for name, value in row.items()})
        if pending.tokens:
            count = len(pending.tokens["position"])
            columns = {"step": [state.global_step] * count, **pending.tokens}
            append(tokens_path(self._path(args)), columns)
        values = {name: estimate.value for name, estimate in figures.items()} | {"seconds": seconds}
        self._figures = {f"probe/{name}": value for name, value in values.items() if math.isfinite(value)}
        control.should_log = True
        return control

    def on_log(
        self, args: Any, state: Any, control: Any, *, logs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """Add the figures of the step to its log entry and to what later callbacks show."""
        if logs is not None and self._figures:
            logs.update(self._figures)
            state.log_history[-1].update(self._figures)
            self._figures = {}

    def _is_due(self, state: Any) -> bool:
        """Whether the step to come is probed."""
        return int(state.global_step) % self.every == 0

    def _path(self, args: Any) -> Path:
        return Path(args.output_dir) / "probes.parquet" if self.file is None else Path(self.file)

    def _predict(self, policy: Policy, captured: list[Captured], args: Any) -> _Pending:
        assert policy.optimizer is not None
        assert not isinstance(self.task, str)
        state = policy.optimizer
        lr = next(g.lr for g in state.groups if g.names and g.lr > 0)
        used = {name for group in state.groups for name in group.names}
        ascent = {n: -p.grad for n, p in policy.parameters.items() if n in used and p.grad is not None}
        momentum, decay, preconditioner = adamw_components(policy, state, ascent, clip=1.0, lr=lr)
        batch = vectors.multiply(preconditioner, ascent)
        probe = sample_rollouts(
            policy,
            self.task,
            num_prompts=self.num_prompts,
            group_size=1,
            seed=int(np.random.SeedSequence([self.seed, policy.step]).generate_state(1)[0]),
            split=self.split,
            exclude=self.task.shared if isinstance(self.task, TemplatedTask) else frozenset(),
        )
        prediction = predict_change(
            policy,
            {"momentum": momentum, "decay": decay, "batch": batch},
            probe,
            lr=lr,
            max_sequences=self.max_sequences,
        )
        norm = vectors.norm(ascent)
        pending = _Pending(prediction, {}, {}, norm, 0.0)
        if self.noise or self.top_tokens:
            update, weights = as_rollouts(
                captured,
                policy.tokenizer,
                response_text(policy),
                temperature=policy.settings.temperature,
                max_response_tokens=policy.settings.max_response_tokens,
            )
            products = products_of_batch(policy, update, weights, args.per_device_train_batch_size)
            if self.noise:
                pending.figures["noise_scale"] = noise_of_batch(products, update, norm, args.max_grad_norm)
            if self.top_tokens and norm > 0:
                scale = norm / math.sqrt(products.sum())
                step = Step(
                    momentum=momentum,
                    decay=decay,
                    sequences=batch,
                    direction=vectors.add(momentum, decay, batch),
                    preconditioner=preconditioner,
                    ascent=vectors.scale(ascent, 1 / scale),
                    token_weights=tuple(scale * w for w in weights),
                    lr=lr,
                    grad_norm=norm / scale,
                    clip_coefficient=scale,
                    update=update,
                )
                pending.tokens = self._strongest_tokens(policy, step, probe)
        return pending

    def _strongest_tokens(self, policy: Policy, step: Step, probe: Rollouts) -> dict[str, list[Any]]:
        """The tokens of the update batch with the largest influence on the probe's entropy."""
        shares = influence(
            policy, step, step.update, probe, baseline=BASELINE, max_sequences=self.max_sequences
        )
        rows = np.repeat(np.arange(len(step.update)), step.update.num_tokens)
        columns = np.concatenate([np.arange(n) for n in step.update.num_tokens])
        values = step.lr * np.concatenate(shares.tokens)
        chosen = np.argsort(-np.abs(values), kind="stable")[: self.top_tokens]
        places = [(int(rows[i]), int(columns[i])) for i in chosen]
        ids = [step.update.response_token_ids[i][k] for i, k in places]
        read = response_text(policy)
        texts = {i: read.by_token(step.update.response_token_ids[i]) for i in {i for i, _ in places}}
        return {
            "prompt": [step.update.prompts[i] for i, _ in places],
            "response": [step.update.responses[i] for i, _ in places],
            "position": [k for _, k in places],
            "token_id": ids,
            "token": [texts[i][k] for i, k in places],
            "influence": values[chosen].tolist(),
            "token_weight": [float(step.token_weights[i][k]) for i, k in places],
            "logprob": [float(step.update.logprobs[i][k]) for i, k in places],
            "entropy": [float(step.update.entropies[i][k]) for i, k in places],
        }

    def _noise_across_steps(self, args: Any) -> Estimate:
        sequences = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
        return window_noise_scale(
            np.array(self._products, dtype=np.float64).reshape(-1, 2),
            prompts_per_step=sequences / args.num_generations,
            block=round(1 / (1 - args.adam_beta1)),
        )


def _settings(args: Any) -> StepSettings:
    """What a probe needs of the run's settings; the gradient is clipped already."""
    return StepSettings(
        group_size=args.num_generations,
        temperature=args.temperature,
        max_response_tokens=args.max_completion_length,
        max_grad_norm=0.0,
    )
