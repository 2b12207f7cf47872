"""What the stages of one measurement share: policy, task, batches and step, each made when first needed."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from stepscope.config import LossConfig, MeasureConfig
from stepscope.errors import BatchError, ConfigError, MeasurementError, TaskError
from stepscope.measure.influence.attribution import NUM_FOLDS, Influence, InfluenceOptions, influences
from stepscope.measure.influence.token_influence import token_influences
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.step.derivative import THROUGHS, Through
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.measure.step.rounding import RoundedStep, rounded_step
from stepscope.pipeline.data import say_what_is_shared
from stepscope.pipeline.fitness import findings
from stepscope.pipeline.logged_prompts import prompt_conflict
from stepscope.policy.checkpoint.load import load_checkpoint, load_model, read_settings
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, read_optimizer
from stepscope.policy.derivative_check import derivative_errors
from stepscope.policy.forward import vocabulary_size
from stepscope.policy.loss.surrogate import advantages
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.optim.rounding import rounding_doubt
from stepscope.policy.passes import Budget, longest
from stepscope.policy.rollouts import (
    response_text,
    sample_influence_probe,
    sample_responses,
    sample_rollouts,
    score_rollouts,
)
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, load
from stepscope.results import Rollouts
from stepscope.runs import RunFolder, read_json, verified
from stepscope.tasks import TemplatedTask, load_task
from stepscope.tasks.judge.guards import evaluates

OWN_PROMPTS_SEED = 2**31
"""Added to the update batch's seed for fresh responses to its prompts, which must not be its own again."""

SAME_POLICY = {"float64": 1e-2, "float32": 1e-2, "bfloat16": 0.5}
"""Largest difference of a stored and a recomputed log-prob, in nats, that precision alone may make."""


def open_policy(
    checkpoint: Path,
    *,
    precision: str,
    device: str | None,
    loss: LossConfig,
    require_optimizer: bool = True,
) -> Policy:
    """Load a checkpoint with its own loss settings, changed where the configuration says so.

    Without a need for the optimizer's state there is none for what only a step depends on.
    """
    settings = read_settings(checkpoint, overrides=loss.given(), for_step=require_optimizer)
    return load_checkpoint(
        checkpoint, precision=precision, device=device, settings=settings, require_optimizer=require_optimizer
    )


def open_reference(model: str | None, policy: Policy) -> Policy | None:
    """The policy that KL divergences are taken to, where one is named.

    Raises:
        CheckpointError: it cannot be loaded.
    """
    if model is None:
        return None
    loaded, tokenizer = load_model(model, dtype=policy.dtype, device=policy.device)
    return Policy(loaded, tokenizer, policy.settings)


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


class Session:
    """One measurement at work.

    Attributes:
        config: what was asked for.
        run: where artifacts are.
    """

    def __init__(self, config: MeasureConfig, run: RunFolder, policy: Policy | None = None) -> None:
        self.config = config
        self.run = run
        if policy is not None:
            self.policy = policy

    @cached_property
    def policy(self) -> Policy:
        """The checkpoint, at the precision of the measurement."""
        return open_policy(
            Path(self.config.checkpoint),
            precision=self.config.precision,
            device=self.config.device,
            loss=self.config.loss,
        )

    @cached_property
    def task(self) -> TemplatedTask:
        """The task prompts come from."""
        task = open_task(self.config.task, self.policy)
        say_what_is_shared(task, {self.policy.settings.task: self.policy.settings.task_digest})
        return task

    @cached_property
    def update(self) -> Rollouts:
        """The batch that makes the step, from the run folder."""
        return self._batch(self.run.file("update.parquet"))

    @cached_property
    def probe(self) -> Rollouts:
        """The batch on which the change is measured, from the run folder."""
        return self._batch(self.run.file("probe.parquet"))

    @property
    def has_policy(self) -> bool:
        """Whether the checkpoint is loaded."""
        return "policy" in self.__dict__

    @cached_property
    def reference(self) -> Policy | None:
        """The policy that KL divergences are taken to, where the configuration names one."""
        return open_reference(self.config.reference, self.policy)

    def refuse_impossible(self) -> list[str]:
        """Say what is wrong with checkpoint, task or quantities before anything is written.

        Returns:
            What limits the measurement, warned of too.

        Raises:
            ConfigError: ``scratch`` is no folder, or the run has logged prompts that ask otherwise.
            MeasurementError: what ``check`` fails.
        """
        scratch = self.config.scratch
        if scratch is not None and not Path(scratch).is_dir():
            raise ConfigError(f"scratch: {scratch} is no folder; make it, or leave scratch out")
        _ = self.policy, self.task, self.reference
        if conflict := prompt_conflict(self.policy, self.task):
            raise ConfigError(conflict)
        found = findings(self.policy, self.config, self.config.stages)
        if against := [f"{f.what}; {f.cure}" for f in found if f.level == "fail"]:
            raise MeasurementError(f"{self.config.checkpoint}: {'; '.join(against)}")
        limits = [finding for finding in found if finding.level == "warn"]
        for finding in limits:
            warnings.warn(f"{finding.what}; {finding.cure}", stacklevel=2)
        return [finding.what for finding in limits]

    @property
    def budget(self) -> Budget:
        """What the computations may use, as the configuration says."""
        scratch = self.config.scratch
        return Budget(
            max_sequences=self.config.batch_size,
            memory_bytes=self.config.memory_bytes,
            scratch=None if scratch is None else Path(scratch),
            progress=True,
        )

    @cached_property
    def quantities(self) -> list[Quantity]:
        """The quantities asked for, bound to the probe batch."""
        return [self._quantity(name, self.probe) for name in self.config.quantities]

    def _quantity(self, name: str, probe: Rollouts) -> Quantity:
        """A quantity on a probe batch, with the reference model of the run."""
        reference = None if self.reference is None else self.reference.model
        return make_quantity(name, probe, policy=self.policy, reference=reference)

    @cached_property
    def step(self) -> Step:
        """The whole step with its components, rebuilt from checkpoint and update batch."""
        probe = sample_influence_probe(self.policy, self.task)
        return reconstruct_step(
            self.policy,
            self.update,
            reference=self.reference,
            influences=None
            if probe is None
            else token_influences(self.policy, self.update, probe, budget=self.budget),
            budget=self.budget,
        )

    @property
    def step_doubt(self) -> str:
        """Why the rebuilt step may not be the one the training takes; empty where it is."""
        state = self.policy.optimizer
        return rounding_doubt(self.policy.stored_dtypes, state.moment_types if state else None)

    @cached_property
    def taken(self) -> RoundedStep | None:
        """The step as a training in a half type takes it; None where the weights are not rounded."""
        state = self.policy.optimizer
        if state is None or not state.half_types:
            return None
        return rounded_step(self.policy, self.step, self.step.lr or self.initial_lr() or 0.0)

    @cached_property
    def derivative_doubt(self) -> str:
        """Why derivatives of this model are not those of its function; empty where they are."""
        few = longest(self.policy, self.probe)
        temperature = self.policy.settings.temperature
        return derivative_errors(self.policy, few, self.line.direction, temperature=temperature).doubt

    @cached_property
    def influences(self) -> list[tuple[Influence, ...]]:
        """Influence of the update batch on every quantity, fixed and through the optimizer."""
        return [
            self._influences_on(self.probe, quantity, throughs=THROUGHS, num_folds=NUM_FOLDS)
            for quantity in self.quantities
        ]

    def _influences_on(
        self, probe: Rollouts, quantity: Quantity, *, throughs: Sequence[Through], num_folds: int
    ) -> tuple[Influence, ...]:
        """Influence of the update batch on a quantity of a probe batch, as the configuration asks."""
        return influences(
            self.policy,
            self.step,
            self.update,
            probe,
            throughs=throughs,
            quantity=quantity,
            options=InfluenceOptions(baseline=self.config.baseline, num_folds=num_folds),
            budget=self.budget,
        )

    @cached_property
    def own_influence(self) -> Influence | None:
        """Fixed influence on the primary quantity, on fresh responses to the update batch's own prompts.

        None where the configuration does without, or the quantity needs rewards, which nobody gives them.
        """
        primary = self.quantities[0]
        if not self.config.own_prompts or primary.needs_rewards:
            return None
        fresh = sample_responses(
            self.policy,
            self.update.prompt_token_ids,
            seed=OWN_PROMPTS_SEED + self.config.update.seed,
            budget=self.budget,
        )
        quantity = self._quantity(primary.name, fresh)
        (found,) = self._influences_on(fresh, quantity, throughs=("fixed",), num_folds=1)
        return found

    @cached_property
    def line(self) -> Line:
        """Where the step points and its learning rate, as stored."""
        stored = load(verified(self.run.file("direction.safetensors")))
        if problem := first_not_finite(stored.items()):
            raise MeasurementError(f"{self.run.file('direction.safetensors')}: {problem}; rebuild the step")
        direction = {n: t.to(self.policy.device) for n, t in stored.items()}
        figures = read_json(self.run.file("step.json"))
        return Line(direction, float(figures["lr"]), figures["initial_lr"])

    def initial_lr(self) -> float | None:
        """The learning rate that the run's schedule started from, where the optimizer says so."""
        groups = read_optimizer(Path(self.config.checkpoint) / OPTIMIZER_FILE)["param_groups"]
        return next((float(g["initial_lr"]) for g in groups if g.get("initial_lr")), None)

    def sample_update(self) -> Rollouts:
        """Sample the batch that makes the step, or take it from a file.

        Raises:
            BatchError: no reward variance in any prompt group, so that there is no step.
        """
        wanted = self.config.update
        if wanted.file is not None:
            update = self._from_file(Path(wanted.file), "update.file")
            if update.advantages is None:
                scaled = advantages(update.rewards, update.group_index, self.policy.settings.scale_rewards)
                update = replace(update, advantages=scaled)
        else:
            update = sample_rollouts(
                self.policy,
                self.task,
                num_prompts=wanted.num_prompts,
                group_size=wanted.group_size,
                seed=wanted.seed,
                split=wanted.split,
                require_reward_variance=self.config.resample > 0,
                max_resample=self.config.resample,
                budget=self.budget,
            )
        if update.advantages is None or not np.any(update.advantages):
            raise BatchError(
                f"update batch: the rewards of all {update.num_prompts} prompt groups have zero variance "
                f"(mean reward {update.rewards.mean():.3g}), so all advantages are zero and there is no "
                "gradient; use more prompts, larger groups, resample=10, or a task that is solved sometimes"
            )
        return update

    def sample_probe(self, update: Rollouts) -> Rollouts:
        """Sample the batch on which the change is measured, from other prompts than the update's.

        Raises:
            BatchError: the two batches share prompts.
        """
        wanted = self.config.probe
        if wanted.file is not None:
            probe = self._from_file(Path(wanted.file), "probe.file")
        else:
            probe = sample_rollouts(
                self.policy,
                self.task,
                num_prompts=wanted.num_prompts,
                group_size=wanted.group_size,
                seed=wanted.seed,
                split=wanted.split,
                exclude=update.asked,
                budget=self.budget,
            )
        refuse_overlap(update, probe)
        return probe

    def _from_file(self, path: Path, key: str) -> Rollouts:
        """A stored batch, with log-probs and entropies of this policy; refused if another one sampled it."""
        rollouts = self._batch(path)
        if rollouts.temperature != self.policy.settings.temperature:
            raise BatchError(
                f"{key}: {path} was sampled at temperature {rollouts.temperature}, the checkpoint's is "
                f"{self.policy.settings.temperature}; sample it again from this checkpoint"
            )
        logprobs, entropies = score_rollouts(self.policy, rollouts, budget=self.budget)
        worst = float(np.abs(np.concatenate(logprobs) - np.concatenate(rollouts.logprobs)).max())
        if not worst < SAME_POLICY[self.config.precision]:
            raise BatchError(
                f"{key}: {path} was sampled from another policy (log-probs differ by up to {worst:.2g} "
                "nats); sample it again from this checkpoint"
            )
        return replace(rollouts, logprobs=logprobs, entropies=entropies)

    def _batch(self, path: Path) -> Rollouts:
        """A stored batch.

        Raises:
            BatchError: it has tokens that the model does not know, or numbers that are not finite.
        """
        tokens = path.with_name(f"{path.stem}_tokens.parquet")
        rollouts = Rollouts.from_parquet(verified(path), verified(tokens))
        size = vocabulary_size(self.policy.model)
        for i, rows in enumerate(zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True)):
            if odd := [t for row in rows for t in row if not 0 <= t < size]:
                raise BatchError(
                    f"{path}: sequence {i} has token {odd[0]}, and the model knows 0 to {size - 1}; the "
                    "batch was tokenized for another model, sample it again from this checkpoint"
                )
        return rollouts

    def token_texts(self, rollouts: Rollouts) -> list[list[str]]:
        """Text of every response token; those of a response join up to it."""
        read = response_text(self.policy)
        return [read.by_token(row) for row in rollouts.response_token_ids]


@dataclass(frozen=True)
class Line:
    """A direction in parameter space and the learning rates of the run.

    Attributes:
        direction: (params' - params) / lr.
        own_lr: learning rate of the step to come; 0 at the end of a schedule that decays to 0.
        initial_lr: what the schedule started from; looked up where ``own_lr`` is 0.
    """

    direction: ParameterVector
    own_lr: float
    initial_lr: float | None

    @property
    def lr(self) -> float:
        """The learning rate that a sweep is centred on: the step's own, or the initial one if that is 0."""
        return self.own_lr or self.initial_lr or 0.0


def refuse_overlap(update: Rollouts, probe: Rollouts) -> None:
    """Raise if a prompt is in both batches: noise that they share would bias the product of two estimates.

    Raises:
        BatchError: naming shared prompts.
    """
    shared = update.asked & probe.asked
    if shared:
        raise BatchError(
            f"update and probe batch share prompts ({min(shared)[:60]!r} among them); the change "
            "must be measured on other samples than those that make the step: use another split, seed or file"
        )
