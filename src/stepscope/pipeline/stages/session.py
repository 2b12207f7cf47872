"""What the stages of one measurement share: policy, task, batches and step, each made when first needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from stepscope.config import MeasureConfig
from stepscope.errors import BatchError, MeasurementError
from stepscope.measure.curvature.pairs import PairKernel, PairOptions, second_order_kernel
from stepscope.measure.frontier.effects import before_step
from stepscope.measure.influence.attribution import NUM_FOLDS, InfluenceOptions, influences
from stepscope.measure.influence.shares import Influence
from stepscope.measure.influence.token_influence import token_influences
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.measure.quantity.base import Quantity, make_quantity
from stepscope.measure.quantity.probe import Bindings
from stepscope.measure.step.reconstruct import Step, reconstruct_step
from stepscope.measure.step.rounding import RoundedStep, rounded_step
from stepscope.pipeline.inputs.policies import open_policy, open_reference
from stepscope.pipeline.inputs.samplers import make_sampler
from stepscope.pipeline.inputs.tasks import task_to_measure
from stepscope.policy.check.derivatives import derivative_errors
from stepscope.policy.forward import vocabulary_size
from stepscope.policy.group import current
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.optim.base import Through
from stepscope.policy.passes import Budget, longest
from stepscope.policy.rollouts import sample_influence_probe
from stepscope.policy.sampling.base import Sampler
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector, load
from stepscope.results import Rollouts
from stepscope.rules import FrontierWeights
from stepscope.runs import RunFolder, read_json, verified
from stepscope.stats import Estimate
from stepscope.tasks import TemplatedTask

Doubt = Literal["step", "derivatives", "own_lr", "sampler"]
"""What a figure may rest on that can be doubted: the step as rebuilt, which a training in a half type rounds;
derivatives, which a model's code may get wrong; the step's own learning rate, 0 at the end of a schedule; a
probe batch that the policy itself drew."""

AT_INITIAL_LR = (
    "the checkpoint's own learning rate is 0 (the end of its schedule); this is at the initial one"
)


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
        return task_to_measure(self.config.task, self.policy, own=self.config)

    @cached_property
    def update(self) -> Rollouts:
        """The batch that makes the step, from the run folder."""
        return self.batch(self.run.file("update.parquet"))

    @cached_property
    def probe(self) -> Rollouts:
        """The batch on which the change is measured, from the run folder."""
        return self.batch(self.run.file("probe.parquet"))

    @property
    def has_policy(self) -> bool:
        """Whether the checkpoint is loaded."""
        return "policy" in self.__dict__

    @cached_property
    def reference(self) -> Policy | None:
        """The policy that KL divergences are taken to, where the configuration names one."""
        return open_reference(self.config.reference, self.policy)

    @property
    def budget(self) -> Budget:
        """What the computations may use, as the configuration says."""
        scratch = self.config.scratch
        return Budget(
            max_sequences=self.config.batch_size,
            max_tokens=self.config.max_tokens,
            memory_bytes=self.config.memory_bytes,
            scratch=None if scratch is None else Path(scratch),
            progress=True,
        )

    @cached_property
    def quantities(self) -> list[Quantity]:
        """The quantities asked for, bound to the probe batch."""
        return [self.quantity(name, self.probe) for name in self.config.quantities]

    def pair_kernel(self, quantity: Quantity, *, signs: bool = True) -> PairKernel:
        """The second-order kernel of a quantity of the probe batch, as the configuration asks; made once.

        Args:
            quantity: which.
            signs: whether its random signs of the sequences are asked for, where it has any.
        """
        key = (quantity.name, quantity.normalisation, quantity.version)
        own = self.config.curvature
        sketched = own.sketches is not None and len(self.update) > own.sketches
        found = self._pair_kernels.get(key)
        if found is None or (signs and sketched and not found.num_signs):
            found = self._pair_kernels[key] = second_order_kernel(
                self.policy,
                self.step,
                self.probe,
                quantity=self.bindings.bind(quantity, self.config.baseline),
                options=PairOptions(
                    sketches=own.sketches if signs or not sketched else 0, num_folds=own.folds, seed=own.seed
                ),
                budget=self.budget,
            )
        return found

    @cached_property
    def _pair_kernels(self) -> dict[tuple[str, ...], PairKernel]:
        return {}

    @cached_property
    def bindings(self) -> Bindings:
        """The quantities of the probe batch with their baselines, shared by the stages."""
        return Bindings(self.policy, self.probe, self.step.direction, self.budget)

    def quantity(self, name: str, probe: Rollouts) -> Quantity:
        """A quantity on a probe batch, with the reference model of the run."""
        reference = None if self.reference is None else self.reference.model
        return make_quantity(name, probe, policy=self.policy, reference=reference)

    @cached_property
    def step(self) -> Step:
        """The whole step with its components, rebuilt from checkpoint and update batch."""
        probe = sample_influence_probe(self.policy, self.task)
        influences, program = None, None
        if probe is not None and isinstance(self.policy.settings.objective, FrontierWeights):
            program = before_step(self.policy, self.update, probe, budget=self.budget)
        elif probe is not None:
            influences = token_influences(self.policy, self.update, probe, budget=self.budget)
        return reconstruct_step(
            self.policy,
            self.update,
            reference=self.reference,
            influences=influences,
            program=program,
            budget=self.budget,
        )

    def doubt(self, kind: Doubt) -> str:
        """Why a figure that rests on this is not to be trusted; empty where it is."""
        match kind:
            case "step":
                return self.policy.rounding_doubt
            case "derivatives":
                return self._derivative_doubt
            case "sampler":
                return self._sampler_doubt
            case "own_lr":
                return "" if self.stored_step.own_lr > 0 else f"{AT_INITIAL_LR}, {self.stored_step.lr:g}"

    def doubted(self, figures: Mapping[str, Estimate], *kinds: Doubt) -> dict[str, Estimate]:
        """Figures with the reasons not to trust what they rest on."""
        reasons = [self.doubt(kind) for kind in kinds]
        return {name: figure.doubted(*reasons) for name, figure in figures.items()}

    @cached_property
    def taken(self) -> RoundedStep | None:
        """The step as a training in a half type takes it; None where the weights are not rounded."""
        state = self.policy.optimizer
        if state is None or not state.half_types:
            return None
        return rounded_step(self.policy, self.step, self.step.lr or self.initial_lr() or 0.0)

    @cached_property
    def _derivative_doubt(self) -> str:
        """Why derivatives of this model are not those of its function; empty where they are."""
        few = longest(self.policy, self.probe)
        temperature = self.policy.settings.temperature
        return derivative_errors(self.policy, few, self.stored_step.direction, temperature=temperature).doubt

    @cached_property
    def _sampler_doubt(self) -> str:
        """Why the probe batch cannot pass for one of the policy's own; empty where it can."""
        found = sampler_mismatch(self.probe)
        return "" if found is None else found.doubt

    @cached_property
    def sampler(self) -> Sampler:
        """Who draws the responses."""
        return make_sampler(self.config.sampler)

    @cached_property
    def influences(self) -> list[tuple[Influence, ...]]:
        """Influence of the update batch on every quantity, in the ways the optimizer has, fixed first."""
        return [
            self.influences_on(self.probe, quantity, throughs=None, num_folds=NUM_FOLDS)
            for quantity in self.quantities
        ]

    def influences_on(
        self, probe: Rollouts, quantity: Quantity, *, throughs: Sequence[Through] | None, num_folds: int
    ) -> tuple[Influence, ...]:
        """Influence of the update batch on a quantity of a probe batch, as the configuration asks."""
        return influences(
            self.policy,
            self.step,
            self.update,
            probe,
            throughs=throughs,
            quantity=quantity,
            options=InfluenceOptions(
                baseline=self.config.baseline,
                num_folds=num_folds,
                bindings=self.bindings if probe is self.probe else None,
            ),
            budget=self.budget,
        )

    @cached_property
    def stored_step(self) -> StoredStep:
        """Where the step points and its learning rate, as stored."""
        path = self.run.file("direction.safetensors")
        if current().lockstep:
            figures = current().from_main(lambda: dict(read_json(verified(path).with_name("step.json"))))
            stored = load(path, self.policy.parameters)
        else:
            stored, figures = current().from_main(self._read_step)
        if problem := first_not_finite(stored.items()):
            raise MeasurementError(f"{path}: {problem}; rebuild the step")
        direction = {n: t.to(self.policy.device) for n, t in stored.items()}
        return StoredStep(direction, float(figures["lr"]), figures["initial_lr"])

    def _read_step(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        stored = load(verified(self.run.file("direction.safetensors")))
        return stored, dict(read_json(self.run.file("step.json")))

    def initial_lr(self) -> float | None:
        """The learning rate that the run's schedule started from, where the optimizer says so."""
        groups = self.policy.optimizer.groups if self.policy.optimizer else ()
        return next((group.initial_lr for group in groups if group.initial_lr), None)

    def batch(self, path: Path) -> Rollouts:
        """A stored batch.

        Raises:
            BatchError: it has tokens that the model does not know, or numbers that are not finite.
        """
        tokens = path.with_name(f"{path.stem}_tokens.parquet")
        rollouts = current().from_main(lambda: Rollouts.from_parquet(verified(path), verified(tokens)))
        size = vocabulary_size(self.policy.model)
        for i, rows in enumerate(zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True)):
            if odd := [t for row in rows for t in row if not 0 <= t < size]:
                raise BatchError(
                    f"{path}: sequence {i} has token {odd[0]}, and the model knows 0 to {size - 1}; the "
                    "batch was tokenized for another model, sample it again from this checkpoint"
                )
        return rollouts


@dataclass(frozen=True)
class StoredStep:
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
        """The learning rate that the grid is centred on: the step's own, or the initial one if that is 0."""
        return self.own_lr or self.initial_lr or 0.0
