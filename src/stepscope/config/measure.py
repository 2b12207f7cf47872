"""Configuration of ``stepscope measure``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, field_validator, model_validator

from stepscope.config.base import Section
from stepscope.config.sampler import SamplerConfig

Stage = Literal[
    "rollouts",
    "step",
    "change",
    "influence",
    "validation",
    "kernel",
    "models",
    "curvature",
    "kinship",
    "noise",
    "criteria",
    "frontier",
    "report",
]
STAGES: tuple[Stage, ...] = (
    "rollouts",
    "step",
    "change",
    "influence",
    "kernel",
    "noise",
    "criteria",
    "report",
)
"""Stages that ``measure`` runs by default, in order; the others are made on request."""

Precision = Literal["float32", "float64", "bfloat16"]


def known_quantity(name: str) -> str:
    """The name of a quantity: each has a file, which is not imported here, since it needs torch."""
    kinds = Path(__file__).parents[1] / "measure" / "quantity" / "kinds"
    names = sorted(file.stem for file in kinds.glob("[a-z]*.py"))
    if name not in names:
        raise ValueError(f"no such quantity; choose from {', '.join(names)}")
    return name


QuantityName = Annotated[str, AfterValidator(known_quantity)]
"""A quantity of the policy whose change can be measured."""


def _entropy() -> list[QuantityName]:
    return ["entropy"]


def _zeroed_only() -> list[Literal["zeroed", "recomputed"]]:
    return ["zeroed"]


def _two_shares() -> list[float]:
    return [0.02, 0.1]


class BatchConfig(Section):
    """A batch of sampled responses.

    Attributes:
        num_prompts: prompts.
        group_size: responses per prompt.
        seed: of the choice of prompts and of the sampling.
        split: split of the task that the prompts come from.
        file: an existing ``update.parquet`` or ``probe.parquet`` (its ``*_tokens.parquet`` beside it) to use
            instead of sampling, or null.
    """

    num_prompts: int = Field(ge=1)
    group_size: int = Field(ge=1)
    seed: int = Field(ge=0)
    split: Literal["train", "test"]
    file: str | None = None


class UpdateConfig(BatchConfig):
    """The batch that makes the step.

    Attributes:
        file: also what a training dumped, see docs/FORMATS.md, Batches: TRL's completions, verl's, slime's or
            prime-rl's rollouts, or a table with token ids or text.
        step: the optimizer step whose rows of ``file`` are taken; null for the next step of the checkpoint.
    """

    num_prompts: int = Field(default=16, ge=1)
    group_size: int = Field(default=8, ge=2)
    seed: int = Field(default=0, ge=0)
    split: Literal["train", "test"] = "train"
    step: int | None = Field(default=None, ge=0)


class ProbeConfig(BatchConfig):
    """The batch on which the change is measured."""

    num_prompts: int = Field(default=256, ge=2)
    group_size: int = Field(default=1, ge=1)
    seed: int = Field(default=1, ge=0)
    split: Literal["train", "test"] = "test"


class LossConfig(Section):
    """Loss settings of the run a checkpoint came from, added to those it has; null keeps what it says.

    Names and meanings are those of :class:`stepscope.policy.loss.settings.StepSettings`; a ``loss_type`` of
    the form ``module:function`` is a function of the user's own, which is imported; ``without`` names
    what a run did that no measurement follows, to measure its next step without that.
    """

    loss_type: str | None = None
    loss_parameters: dict[str, Any] | None = None
    kl_in_reward: float | None = Field(default=None, ge=0)
    advantage_estimator: str | None = None
    advantage_parameters: dict[str, Any] | None = None
    aggregation: str | None = None
    kl_penalty: str | None = None
    scale_rewards: Literal["none", "group", "batch"] | None = None
    group_size: int | None = Field(default=None, ge=2)
    prompts_per_step: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, gt=0)
    max_response_tokens: int | None = Field(default=None, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    max_grad_norm: float | None = Field(default=None, ge=0)
    epsilon_low: float | None = Field(default=None, gt=0)
    epsilon_high: float | None = Field(default=None, gt=0)
    beta: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    prompt_template: str | None = None
    system_prompt: str | None = None
    prefill: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    format_weight: float | None = Field(default=None, ge=0, le=1)
    answer_format: str | None = None
    bias_correction_kl: bool | None = None
    mask_truncated: bool | None = None
    router_loss: float | None = Field(default=None, ge=0)
    micro_batch_size: int | None = Field(default=None, ge=1)
    disable_dropout: bool | None = None
    without: list[str] | None = None

    def given(self) -> dict[str, Any]:
        """The settings that are not null."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


class Asking(Section):
    """What is asked and what it earns: a task, or the prompts and the reward function of the run itself.

    Attributes:
        task: specification of the task, or null for the one the checkpoint was trained on.
        prompts: file with the prompts of the run (JSON lines, parquet, CSV) in place of a task: a column
            ``prompt``, a text that is asked as it stands or a chat's messages, and what the reward function
            takes; or null.
        reward: ``module:function`` of the user's own that grades responses as TRL calls it,
            ``reward(prompts, completions, **columns) -> list[float]``, imported from the working directory;
            or null for the task's grader, and of ``prompts`` for their column ``answer``.
        template: what prompts are asked in: a text with ``{prompt}``, or the file of one or of a chat
            template, which takes the place of the tokenizer's; or null.
        loss: loss and sampling settings for a checkpoint that does not carry its own.
    """

    task: str | None = None
    prompts: str | None = None
    reward: str | None = None
    template: str | None = None
    loss: LossConfig = LossConfig()

    @field_validator("reward")
    @classmethod
    def _a_function(cls, value: str | None) -> str | None:
        if value is not None and not all(value.partition(":")):
            raise ValueError(f"expected module:function, got {value!r}")
        return value

    @model_validator(mode="after")
    def _asked_once(self) -> Self:
        if self.prompts is not None and self.task is not None:
            raise ValueError(
                "task and prompts are both given, and prompts take the place of a task; leave one out"
            )
        whole = "template" if self.template is not None else "prompts" if self.prompts else ""
        if whole and self.loss.prompt_template is not None:
            raise ValueError(
                f"loss.prompt_template and {whole} both say how prompts are asked; leave the first "
                "out, and give template"
            )
        return self


class ValidationConfig(Section):
    """How influence is held against re-made steps (``measure --validate``).

    Attributes:
        num_subsets: random subsets of the update batch, for the linear datamodelling score.
        subset_share: share of the sequences that stay in a subset.
        num_single: sequences left out one at a time.
        removals: ways of taking sequences out: ``zeroed`` gradients, ``recomputed`` advantages, or both.
        seed: of subsets and sequences.
    """

    num_subsets: int = Field(default=64, ge=0)
    subset_share: float = Field(default=0.5, gt=0, lt=1)
    num_single: int = Field(default=32, ge=0)
    removals: list[Literal["zeroed", "recomputed"]] = Field(default_factory=_zeroed_only, min_length=1)
    seed: int = Field(default=0, ge=0)


class ModelsConfig(Section):
    """How models of the kernel are judged, and its null is drawn (``--stages models``).

    Attributes:
        folds: of prompts; the entries of each are predicted by what was fitted to the others.
        inducing: inducing points of the Gaussian process and of the deep kernel machine.
        pairs: most pairs of sequences that these two are fitted to.
        width: nu of the machine: how strongly it is held to a Gaussian process.
        steps: of Adam, for both.
        signs: versions of the gradients with random signs that the null is drawn from; each takes two passes
            over the batch. 0 for no test.
        draws: of the null.
        seed: of folds, pairs, signs and draws.
    """

    folds: int = Field(default=4, ge=3)
    inducing: int = Field(default=50, ge=1)
    pairs: int = Field(default=800, ge=10)
    width: float = Field(default=1000.0, gt=0)
    steps: int = Field(default=200, ge=1)
    signs: int = Field(default=2, ge=0)
    draws: int = Field(default=499, ge=19)
    seed: int = Field(default=0, ge=0)


class CurvatureConfig(Section):
    """How the second-order kernel is made (``--stages curvature``).

    Attributes:
        sketches: with more sequences than that in the update batch, so many random signs of them stand for
            the single sequences; null for a row of each. Sums over prompts and over all are exact all the
            same.
        folds: pools of probe prompts, for errors and noise.
        seed: of the signs.
    """

    sketches: int | None = Field(default=32, ge=2)
    folds: int = Field(default=16, ge=2)
    seed: int = Field(default=0, ge=0)


class StepKinshipConfig(Section):
    """How what the step's tokens act on is told apart (``--stages kinship``).

    Attributes:
        tokens: most distinct tokens that are looked at for their own position, drawn at random; each costs
            two gradients.
        prompts: prompts of the batch that the shares are of; null for those of the update batch.
        fresh: also look at fresh responses to the update batch's prompts.
        seed: of the draw of tokens.
    """

    tokens: int = Field(default=512, ge=32, le=4096)
    prompts: int | None = Field(default=None, ge=1)
    fresh: bool = True
    seed: int = Field(default=0, ge=0)


class CriteriaConfig(Section):
    """How criteria are ranked against the measured influence.

    Attributes:
        diagonal_tokens: most tokens whose effect on their own position is computed; each costs two gradients.
        micro_batch_size: sequences over which criteria of the public code that centre per micro-batch do so.
        drop_shares: shares of the tokens that rules of the kind "drop these tokens" may drop; each rule and
            share is a step taken again. An empty list leaves them out.
        learned: also rank criteria that are learned from the influence of other prompts' tokens.
        seed: of the folds of the probe, of the choice of diagonal tokens and of the random rule.
    """

    diagonal_tokens: int = Field(default=512, ge=3, le=4096)
    micro_batch_size: int = Field(default=8, ge=1)
    drop_shares: list[float] = Field(default_factory=_two_shares)
    learned: bool = False
    seed: int = Field(default=0, ge=0)

    @field_validator("drop_shares")
    @classmethod
    def _proper(cls, value: list[float]) -> list[float]:
        if any(not 0 < share < 1 for share in value):
            raise ValueError(f"shares of tokens to drop must lie between 0 and 1, got {value}")
        return value


class FrontierConfig(Section):
    """How the frontier of entropy and reward is made (``--stages frontier``).

    Attributes:
        levels: points of the curve, from the most reward to the most entropy.
        most: largest weight of a sequence; the smallest is 0.
        caution: standard errors that a predicted gain over the step is counted less by the choice of weights.
        folds: most pools of probe prompts, for errors; ``curvature.folds`` where ``second_order`` is set.
        second_order: predict with second-order kernels, as ``curvature`` describes them; of every sequence
            where they have a row for each, else prompts get weights, not sequences.
        realise: also take the steps: two for each point.
        seed: of the halves of the probe that choose and judge.
    """

    levels: int = Field(default=5, ge=2)
    most: float = Field(default=2.0, ge=1)
    caution: float = Field(default=1.0, ge=0)
    folds: int = Field(default=64, ge=4)
    second_order: bool = False
    realise: bool = True
    seed: int = Field(default=0, ge=0)


class MeasureSettings(Asking):
    """How a checkpoint is measured.

    Attributes:
        update: the batch that makes the step.
        probe: the batch on which the change is measured.
        sampler: who draws the responses of both.
        lrs: learning rates of the sweep, or null for decades around the checkpoint's own.
        precision: floating-point type of the measurement.
        quantities: quantities of the policy; the first is the primary one.
        second_order: also the second-order change.
        antithetic: also evaluate at -lr, for the odd part of the true change.
        baseline: of the gradient estimator: a rung of the ladder, or ``best`` for the one of least variance
            (with fewer than 64 probe prompts ``position``, since choosing would bias the change).
        estimator: of the true change.
        errors: standard errors of changes and ratios: ``delta`` method, ``jackknife`` (delete one prompt) or
            ``bootstrap`` (400 resamples of prompts); the influence always uses the delta method.
        reference: model that ``kl`` is taken to (hub id, folder, GGUF file), or null for what an adapter
            started from: its frozen copy ``ref``, or its base.
        batch_size: most sequences per forward pass; fewer where the memory at hand does not hold them.
        max_tokens: most padded tokens per forward pass, or null for what the memory at hand holds (in a study
            for no limit but ``batch_size``, since memories differ, and last bits with them).
        device: torch device, or null for a GPU where there is one.
        resample: times the update batch is topped up to replace prompt groups without reward variance.
        validation: how influence is held against re-made steps, where the stage ``validation`` is run.
        memory: budget for gradients that are kept, in GiB; activations of a micro-batch come on top.
        scratch: existing folder to hold the kernel's gradients in, on disk, or null for memory alone.
        projection: dimension of a random projection for the kernel, or null for the exact kernel.
        own_prompts: the stage ``influence`` also samples fresh responses to the update batch's prompts and
            gives the batch's part of the change there, beside that on the probe batch.
        models: how models of the kernel are judged, where the stage ``models`` is run.
        curvature: how the second-order kernel is made, where the stage ``curvature`` is run.
        kinship: how it is told what tokens act on, where the stage ``kinship`` is run.
        criteria: how criteria are ranked.
        frontier: how the frontier of entropy and reward is made, where the stage ``frontier`` is run.
    """

    update: UpdateConfig = UpdateConfig()
    probe: ProbeConfig = ProbeConfig()
    sampler: SamplerConfig = SamplerConfig()
    lrs: list[float] | None = Field(default=None, min_length=1)
    precision: Precision = "float32"
    quantities: list[QuantityName] = Field(default_factory=_entropy, min_length=1)
    second_order: bool = True
    antithetic: bool = False
    baseline: Literal["best", "none", "current", "position", "ridge"] = "best"
    estimator: Literal["per_decision", "self_normalised", "whole_sequence", "regression"] = "per_decision"
    errors: Literal["delta", "jackknife", "bootstrap"] = "delta"
    reference: str | None = None
    batch_size: int = Field(default=16, ge=1)
    max_tokens: int | None = Field(default=None, ge=1)
    device: str | None = None
    resample: int = Field(default=0, ge=0)
    validation: ValidationConfig = ValidationConfig()
    memory: float = Field(default=4.0, gt=0)
    scratch: str | None = None
    projection: int | None = Field(default=None, ge=1)
    own_prompts: bool = True
    models: ModelsConfig = ModelsConfig()
    curvature: CurvatureConfig = CurvatureConfig()
    kinship: StepKinshipConfig = StepKinshipConfig()
    criteria: CriteriaConfig = CriteriaConfig()
    frontier: FrontierConfig = FrontierConfig()

    @field_validator("lrs")
    @classmethod
    def _positive(cls, value: list[float] | None) -> list[float] | None:
        if value is not None and any(lr <= 0 for lr in value):
            raise ValueError("learning rates must be greater than 0")
        return value

    @field_validator("quantities")
    @classmethod
    def _distinct(cls, value: list[str]) -> list[str]:
        if len(set(value)) < len(value):
            raise ValueError("each quantity may be named once")
        return value

    @model_validator(mode="after")
    def _batches_apart(self) -> MeasureSettings:
        if self.update.file is not None and self.update.file == self.probe.file:
            raise ValueError(
                "update.file and probe.file are the same file; the change must be measured on other samples "
                "than those that make the step"
            )
        return self

    @property
    def memory_bytes(self) -> int:
        """``memory`` in bytes."""
        return int(self.memory * 2**30)

    @property
    def num_responses(self) -> int:
        """Responses in both batches."""
        return sum(batch.num_prompts * batch.group_size for batch in (self.update, self.probe))


class MeasureConfig(MeasureSettings):
    """Configuration of ``stepscope measure``.

    Attributes:
        checkpoint: folder of the checkpoint.
        out: run folder.
        stages: stages to run, in any order; they run in the order of the pipeline.
        profile: also write where the time goes: ``profile.json`` and ``profile_trace.json``.
        shard: each of several processes holds a part of parameters, moments and directions, for what no
            single device holds.
    """

    checkpoint: str
    out: str
    stages: list[Stage] = Field(default_factory=lambda: list(STAGES), min_length=1)
    profile: bool = False
    shard: bool = False
