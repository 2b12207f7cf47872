"""Configuration of ``stepscope train``: model, warm-up, then reinforcement learning or preferences."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from stepscope.config.base import Section
from stepscope.config.objectives import CurriculumConfig, EntropyBonusConfig, ObjectiveConfig
from stepscope.config.optimizer import OptimizerConfig
from stepscope.config.preferences import HypoConfig
from stepscope.rules import ScopedIntervention, Without


class TinyModelConfig(Section):
    """The embedded policy: a Qwen2-style model built in code.

    Attributes:
        hidden_size: width of the residual stream.
        layers: number of transformer blocks.
        heads: attention heads.
        kv_heads: key/value heads.
        intermediate_size: width of the feed-forward part.
    """

    hidden_size: int = Field(default=96, ge=8)
    layers: int = Field(default=3, ge=1)
    heads: int = Field(default=4, ge=1)
    kv_heads: int = Field(default=2, ge=1)
    intermediate_size: int = Field(default=256, ge=8)


class LoraConfig(Section):
    """Low-rank adapter.

    Attributes:
        r: rank.
        alpha: scale numerator; the adapter's output is multiplied by alpha / r.
        targets: names of the modules that get an adapter, or ``all-linear``.
    """

    r: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0)
    targets: list[str] | Literal["all-linear"] = "all-linear"


class ModelConfig(Section):
    """Which model is trained.

    Attributes:
        source: hub id, local folder, path to a ``.gguf`` file, ``package:NAME/FILE`` for a file or folder
            that an installed package ships, or ``tiny`` for the embedded policy.
        dtype: floating-point type of the weights.
        tiny: shape of the embedded policy; used where ``source`` is ``tiny``.
        lora: adapter, or null for full fine-tuning.
    """

    source: str = "tiny"
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    tiny: TinyModelConfig = TinyModelConfig()
    lora: LoraConfig | None = None


class SftConfig(Section):
    """Supervised warm-up on worked demonstrations.

    Attributes:
        examples: demonstrations used.
        epochs: most passes over them.
        batch_size: demonstrations per optimizer step.
        optimizer: AdamW and its schedule.
        format_threshold: stop once this share of held-out responses keeps the format.
        accuracy_threshold: also wait for this pass@1 on held-out prompts; null for the format alone.
        check_every: optimizer steps between two checks of the thresholds.
        check_prompts: held-out prompts per check, taken from the training split.
    """

    examples: int = Field(default=2048, ge=1)
    epochs: int = Field(default=1, ge=1)
    batch_size: int = Field(default=64, ge=1)
    optimizer: OptimizerConfig = OptimizerConfig(lr=1e-3)
    format_threshold: float = Field(default=0.95, ge=0, le=1)
    accuracy_threshold: float | None = Field(default=None, ge=0, le=1)
    check_every: int = Field(default=50, ge=1)
    check_prompts: int = Field(default=64, ge=1)


class StepProbeConfig(Section):
    """Probes inside the training: entropy change of a step, predicted before and measured after it.

    Attributes:
        every: optimizer steps from one probe to the next; steps 1, 1 + every, ... are probed.
        num_prompts: probe prompts, of the test split, fresh ones every time.
        noise: also compute the gradient noise scale of the probed step's own batch.
        top_tokens: tokens with the largest influence on the entropy to record; 0 for none.
        window: steps in the window of the noise scale across steps.
        max_sequences: sequences in a forward pass of the probe.
    """

    every: int = Field(default=30, ge=1)
    num_prompts: int = Field(default=32, ge=2)
    noise: bool = True
    top_tokens: int = Field(default=0, ge=0)
    window: int = Field(default=64, ge=1)
    max_sequences: int = Field(default=32, ge=1)


class RecordConfig(Section):
    """The record of every optimizer step, in ``OUT/record``: batch, token weights, gradient, states.

    Attributes:
        state_every: steps from one whole state (parameters and moments) that is kept to the next.
        max_bytes: most that the record may take; states are thinned out to fit.
        check: hold the token weights against the gradient at the first step.
    """

    state_every: int = Field(default=16, ge=1)
    max_bytes: int = Field(default=50_000_000_000, ge=1)
    check: bool = True


class RlConfig(Section):
    """Reinforcement learning: every batch is sampled from the policy itself, used and dropped.

    Attributes:
        loss_type: TRL's name of the loss.
        objective: what is changed in the loss, token by token, or null for the loss as it is.
        curriculum: how prompts are drawn, or null for each once per epoch in random order.
        scale_rewards: how advantages are scaled.
        group_size: responses per prompt.
        prompts_per_step: prompt groups per optimizer step.
        temperature: sampling temperature.
        max_response_tokens: longest response.
        max_prompt_tokens: longest prompt, or null for no limit.
        num_iterations: optimizer steps on each batch; from the second on they are off-policy and the ratio is
            clipped. Checkpoints fall between batches, so that the next step of each is on-policy.
        steps: optimizer steps.
        save_every: steps between two checkpoints.
        max_resample: rounds in which groups without reward variance are replaced by groups of other prompts;
            0 keeps every group.
        beta: weight of the KL penalty to the reference policy.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio; above ``epsilon_low`` it is DAPO's clip-higher. Neither
            acts on the first update of a batch.
        micro_batch_size: sequences per forward and backward pass on one device.
        gradient_checkpointing: trade time for memory in the backward pass.
        optimizer: AdamW and its schedule.
        probe: probes inside the training, or null for none; rows go to ``OUT/probes.parquet``.
        record: record every step for an account of the whole training, or null for none.
        report_to: where curves go: any name TRL knows.
    """

    loss_type: Literal["grpo", "dr_grpo", "bnpo", "dapo"] = "dr_grpo"
    scale_rewards: Literal["none", "group", "batch"] = "none"
    objective: ObjectiveConfig | None = None
    curriculum: CurriculumConfig | None = None
    group_size: int = Field(default=8, ge=2)
    prompts_per_step: int = Field(default=16, ge=1)
    temperature: float = Field(default=1.0, gt=0)
    max_response_tokens: int = Field(default=64, ge=1)
    max_prompt_tokens: int | None = Field(default=None, ge=1)
    num_iterations: int = Field(default=1, ge=1)
    steps: int = Field(default=40, ge=1)
    save_every: int = Field(default=10, ge=1)
    max_resample: int = Field(default=3, ge=0)
    beta: float = Field(default=0.0, ge=0)
    epsilon_low: float = Field(default=0.2, gt=0)
    epsilon_high: float = Field(default=0.2, gt=0)
    micro_batch_size: int = Field(default=128, ge=1)
    gradient_checkpointing: bool = False
    optimizer: OptimizerConfig = OptimizerConfig()
    probe: StepProbeConfig | None = None
    record: RecordConfig | None = None
    report_to: list[str] = Field(default_factory=lambda: ["tensorboard"])

    @model_validator(mode="after")
    def _batches_fit(self) -> RlConfig:
        total = self.prompts_per_step * self.group_size
        if total % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide the {total} sequences of a step "
                f"(prompts_per_step x group_size); give a divisor of {total}"
            )
        if self.loss_type == "bnpo" and self.micro_batch_size != total:
            raise ValueError(
                f"loss_type bnpo averages over a micro-batch, so its step depends on how the batch is cut; "
                f"set micro_batch_size to {total}, or use dapo"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_fall_between_batches(self) -> RlConfig:
        for name, value in (("save_every", self.save_every), ("steps", self.steps)):
            if value % self.num_iterations:
                raise ValueError(
                    f"{name} {value} is no multiple of num_iterations {self.num_iterations}, so a checkpoint "
                    "would fall amid the updates on a batch; give a multiple"
                )
        return self

    @model_validator(mode="after")
    def _objective_acts(self) -> RlConfig:
        chosen = self.objective
        if chosen is None or isinstance(chosen, EntropyBonusConfig):
            return self
        if chosen.off_policy_only and self.num_iterations == 1:
            raise ValueError(
                f"objective {chosen.name} does nothing on the first update of a batch, where the policy is "
                "still the one that sampled; set num_iterations to at least 2"
            )
        if chosen.measures and self.beta > 0:
            raise ValueError(
                f"objective {chosen.name} measures the step of the policy loss alone, and beta adds a KL "
                "penalty; set beta to 0"
            )
        if isinstance(chosen, Without) and self.beta > 0:
            raise ValueError(
                "objective without takes tokens out of the policy loss, and beta would leave them in the KL "
                "penalty; set beta to 0"
            )
        if isinstance(chosen, ScopedIntervention) and chosen.over(self.micro_batch_size).scope == 1:
            raise ValueError(
                f"objective {chosen.name} compares tokens within a micro-batch, and one sequence has one "
                "advantage; set micro_batch_size to at least 2, or scope to batch"
            )
        return self


class TrainConfig(Section):
    """Configuration of ``stepscope train``.

    Attributes:
        model: which model, and its adapter.
        task: specification of the task, for example ``arithmetic`` or ``gsm8k:DIR``.
        template: prompt template: a name, a text with ``{question}``, or null for the default.
        system_prompt: system message of the chat template, or null for none.
        prefill: text that the response's turn begins with, at the end of the prompt, or null for none.
        chat_template_kwargs: variables of the chat template, for example ``{enable_thinking: false}``.
        format_weight: reward of a response that keeps the format, beside 1 for a correct answer. Above 0 it
            gives groups a spread of rewards where hardly any answer is correct.
        answer_format: where in a response its answer stands: ``tags`` (the blocks of R1), ``boxed``, ``hash``
            (``#### 18``), ``last_number``, or ``regex:EXPRESSION`` with one group.
        seed: seed of initialisation, data order and sampling.
        out: run folder; checkpoints go to ``OUT/checkpoints/step-N``.
        sft: supervised warm-up, or null to skip it.
        rl: reinforcement learning, or null to skip it.
        hypo: learning from preferences in place of ``rl``, which is then null.
    """

    model: ModelConfig = ModelConfig()
    task: str = "arithmetic"
    template: str | None = None
    system_prompt: str | None = None
    prefill: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    format_weight: float = Field(default=0.0, ge=0, le=1)
    answer_format: str = "tags"
    seed: int = 0
    out: str = "runs/train"
    sft: SftConfig | None = SftConfig()
    rl: RlConfig | None = RlConfig()
    hypo: HypoConfig | None = None

    @model_validator(mode="after")
    def _something_to_do(self) -> TrainConfig:
        if self.sft is None and self.after_warm_up is None:
            raise ValueError(
                "sft and rl are both null, so there is nothing to train; give at least one section"
            )
        if self.rl is not None and self.hypo is not None:
            raise ValueError(
                "rl and hypo are both there, and one training follows the warm-up; set rl to null"
            )
        return self

    @property
    def after_warm_up(self) -> RlConfig | HypoConfig | None:
        """The section of what follows the warm-up, if anything."""
        return self.hypo or self.rl
