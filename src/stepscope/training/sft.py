"""Supervised warm-up on worked demonstrations, until held-out responses keep the format."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig as TrlSftConfig
from trl import SFTTrainer

from stepscope.config import TrainConfig
from stepscope.errors import ConfigError
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.state import Policy
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.load import asked_through
from stepscope.tasks.problem import Problem, Task
from stepscope.training.setup.arguments import install_callbacks, shared_arguments
from stepscope.training.setup.preflight import require_room
from stepscope.training.setup.start import adapter


def demonstration_rows(task: Task, problems: Sequence[Problem], tokenizer: Any) -> Dataset:
    """Token ids and labels of ``prompt + demonstration + end-of-sequence``; only the completion is learnt.

    The prompt is tokenized by itself, as it is when responses are sampled, so that the completion starts on
    the same token boundary.

    Raises:
        TaskError: the task has no demonstrations.
    """
    task = asked_through(task, tokenizer)
    rows: dict[str, list[list[int]]] = {"input_ids": [], "labels": []}
    for problem in problems:
        prompt = encode_prompt(task.prompt(problem, tokenizer), tokenizer).token_ids
        completion = tokenizer(task.demonstration(problem), add_special_tokens=False)["input_ids"]
        completion = [*completion, tokenizer.eos_token_id]
        rows["input_ids"].append([*prompt, *completion])
        rows["labels"].append([-100] * len(prompt) + completion)
    return Dataset.from_dict(rows)


@dataclass
class HeldOutCheck(TrainerCallback):  # type: ignore[misc]
    """Samples responses to held-out prompts now and then; stops the warm-up once they pass the thresholds.

    Attributes:
        policy: what is being trained, in place.
        task: asks and scores.
        trained_on: questions of the demonstrations.
        num_prompts: held-out prompts per check, the same at every check.
        every: optimizer steps between two checks.
        format_threshold: share of responses that must keep the format.
        accuracy_threshold: share of responses that must be correct, or None.
        seed: seed of prompts and sampling.
        trainer: receives the figures of each check in its log.
    """

    policy: Policy
    task: Task
    trained_on: frozenset[str]
    num_prompts: int
    every: int
    format_threshold: float
    accuracy_threshold: float | None
    seed: int
    trainer: Any = None

    def measure(self) -> dict[str, float]:
        """Format adherence and pass@1 on held-out prompts of the training split."""
        was_training = self.policy.model.training
        self.policy.model.eval()
        rollouts = sample_rollouts(
            self.policy,
            self.task,
            num_prompts=self.num_prompts,
            group_size=1,
            seed=self.seed,
            options=SamplingOptions(exclude=self.trained_on),
        )
        self.policy.model.train(was_training)
        formatted = [self.task.formatted(response) for response in rollouts.responses]
        return {
            "format_rate": sum(formatted) / len(formatted),
            "accuracy": float(rollouts.correct.mean()),
        }

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Check every ``every`` steps."""
        if state.global_step % self.every:
            return
        figures = self.measure()
        self.trainer.log(figures)
        accurate = self.accuracy_threshold is None or figures["accuracy"] >= self.accuracy_threshold
        if figures["format_rate"] >= self.format_threshold and accurate:
            control.should_training_stop = True


def warm_up(
    config: TrainConfig, model: nn.Module, tokenizer: Any, task: Task, settings: StepSettings, out: Path
) -> nn.Module:
    """Train on demonstrations until the thresholds are passed or the epochs are over.

    With an adapter configured the warm-up trains an adapter and merges it, so that reinforcement learning
    starts with a fresh one. The Trainer's log goes to ``out/trainer_state.json``.

    Args:
        config: the training configuration; its ``sft`` section must be there.
        model: the model to train, in place.
        tokenizer: its tokenizer.
        task: gives problems and demonstrations.
        settings: temperature and length of the sampling in the checks.
        out: folder of the warm-up's log.

    Returns:
        The warmed-up model, without adapter.

    Raises:
        ConfigError: the demonstrations leave too few held-out prompts, or one is too long for the model.
        TaskError: the task has no demonstrations.
        TrainingError: the training diverged.
    """
    sft = config.sft
    if sft is None:
        raise ConfigError("sft: the section is missing; add it to warm up")
    train = task.problems("train")
    if len(train) < sft.examples + sft.check_prompts:
        raise ConfigError(
            f"sft: {sft.examples} examples and {sft.check_prompts} check_prompts exceed the {len(train)} "
            f"training problems of {config.task}; lower sft.examples"
        )
    used = [train[i] for i in range(sft.examples)]
    task = asked_through(task, tokenizer)
    check = HeldOutCheck(
        policy=Policy(model=model, tokenizer=tokenizer, settings=settings),
        task=task,
        trained_on=frozenset(p.question for p in used),
        num_prompts=sft.check_prompts,
        every=sft.check_every,
        format_threshold=sft.format_threshold,
        accuracy_threshold=sft.accuracy_threshold,
        seed=config.seed,
    )
    rows = demonstration_rows(task, used, tokenizer)
    require_room(rows["input_ids"], model, "sft: prompts with their demonstrations")
    trainer = SFTTrainer(
        model=model,
        args=TrlSftConfig(
            output_dir=str(out),
            num_train_epochs=sft.epochs,
            per_device_train_batch_size=sft.batch_size,
            gradient_checkpointing=False,
            max_length=None,
            logging_steps=10,
            save_strategy="no",
            **shared_arguments(sft.optimizer, seed=config.seed, report_to=[]),
        ),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter(config.model.lora),
        callbacks=[check],
    )
    check.trainer = trainer
    install_callbacks(trainer, section="sft", logs=None)
    trainer.train()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(out / "trainer_state.json"))
    trained = trainer.accelerator.unwrap_model(trainer.model)
    merged: nn.Module = trained if config.model.lora is None else trained.merge_and_unload()
    return merged
