"""Reinforcement learning with TRL on batches of the policy itself, and the checkpoints it leaves."""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import Sampler
from trl import GRPOConfig, GRPOTrainer

from stepscope.config import RlConfig, TrainConfig
from stepscope.errors import ConfigError
from stepscope.policy.checkpoint.manifest import write_manifest
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.texts import ResponseText
from stepscope.results import FloatArray, IntArray, same_text
from stepscope.rules import UNCLIPPED, EntropyBonus
from stepscope.tasks.load import TemplatedTask, asked_through
from stepscope.tasks.problem import Problem, Score, Task
from stepscope.training.probe.callback import StepProbe
from stepscope.training.record.callback import StepRecorder
from stepscope.training.record.tap import Known
from stepscope.training.setup.arguments import diverged, install_callbacks, shared_arguments
from stepscope.training.setup.prompts import prompt_rows, question_settings
from stepscope.training.setup.start import adapter, writing
from stepscope.training.shaping.curriculum import BUCKETS, Curriculum
from stepscope.training.shaping.objectives import bonus_arguments, next_objective, shaper_for


class TaskReward:
    """TRL's view of a task: the reward of each completion; the same text is scored once a step."""

    __name__ = "task"

    def __init__(self, task: Task, problems: Sequence[Problem]) -> None:
        self.task = task
        self.problems = problems
        self.scores: dict[tuple[int, str], Score] = {}

    def score(self, index: int, completion: str) -> Score:
        """The score of a completion to problem ``index``."""
        key = (index, completion)
        if key not in self.scores:
            self.scores[key] = self.task.score(self.problems[index], completion)
        return self.scores[key]

    def __call__(self, prompts: list[str], completions: list[str], index: list[int], **_: Any) -> list[float]:
        """Rewards of a batch; TRL passes the columns of the data set as keywords."""
        return [self.score(i, text).reward for i, text in zip(index, completions, strict=True)]


SAME_EPOCH = 1e-6
"""Of an epoch, by which rounding may keep the trainer's count from its end."""


class OrderOfTheEpoch(Sampler[int]):
    """The rows that TRL's sampler draws in an epoch, whichever epoch is asked for first.

    Args:
        sampler: draws a new order at every pass.
        epoch: number of the epoch that is about to begin, or under way, from 0.
    """

    def __init__(self, sampler: Any, epoch: Callable[[], int]) -> None:
        self.sampler = sampler
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        """The rows of the epoch."""
        self.sampler.generator.manual_seed(self.sampler.seed)
        for _ in range(self.epoch()):
            torch.randperm(self.sampler.num_samples, generator=self.sampler.generator)
        return iter(self.sampler)

    def __len__(self) -> int:
        """Rows of an epoch, with repetitions."""
        return len(self.sampler)


class OnPolicyTrainer(GRPOTrainer):  # type: ignore[misc]
    """TRL's GRPO trainer that replaces dead prompt groups and leaves checkpoints a measurement can use.

    A group whose rewards are all equal has zero advantages and no gradient. Up to ``max_resample`` times
    such groups are dropped and groups of other prompts sampled in their place; groups that are still dead
    then stay. Loss, generation and advantages of sequences are TRL's own; an objective of the settings turns
    these into advantages of tokens before every optimizer step. The logged ``reward``, ``correct``,
    ``formatted`` and lengths are those of the responses as first sampled (an unbiased view of the policy);
    ``reward_kept`` is the reward of the batch the step is made of.

    Args:
        settings: written beside every checkpoint as ``stepscope.json``.
        reward: scores completions.
        max_resample: rounds of replacement; 0 keeps every group.
        curriculum: chooses the prompts, numbered as the rows of the data set; None for each once per epoch.
        kwargs: arguments of ``GRPOTrainer``.
    """

    def __init__(
        self,
        *,
        settings: StepSettings,
        reward: TaskReward,
        max_resample: int,
        curriculum: Curriculum | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(reward_funcs=[reward], **kwargs)
        self.settings = settings
        self.reward = reward
        self.max_resample = max_resample
        self.curriculum = curriculum
        self.shaper = shaper_for(settings, reward.task, self.processing_class, self.eos_token_ids)
        self._shaped: list[Tensor] = []
        rows = kwargs["train_dataset"]
        self._prompt_token_ids = dict(zip(rows["prompt"], rows["prompt_token_ids"], strict=True))
        self._numbers = {index: i for i, index in enumerate(rows["index"])}
        self._questions = [same_text(reward.problems[index].question) for index in self._numbers]
        self._rows: list[dict[str, Any]] = []
        self._sampled_reward = float("nan")

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        """Generate, replacing dead groups on the way; report the reward of the responses as first sampled."""
        if self.curriculum is not None:
            inputs = self._rows_of_the_curriculum(self.curriculum, len(inputs))
        self._rows = inputs
        self.reward.scores.clear()
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)
        metrics = self._metrics["train"]
        metrics["reward_kept"].append(metrics["reward"][-1])
        metrics["reward"][-1] = self._sampled_reward
        return output

    def known_response(self, row: dict[str, Any], completion: str) -> Known:
        """What a recorder of the training cannot see of a completion to a row of the data set."""
        problem = self.reward.problems[row["index"]]
        correct = self.reward.score(row["index"], completion).correct
        return Known(problem.prompt_id, problem.question, correct)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """The next micro-batch, with advantages per token where there is an objective."""
        inputs: dict[str, Any] = super()._prepare_inputs(generation_batch)
        if self.shaper is None:
            return inputs
        place = self._step % self.args.steps_per_generation
        if place == 0:
            self._shaped, changed = self.shaper(
                self.model,
                self.accelerator,
                self._buffered_inputs,
                optimizer=self.optimizer,
                first_update=self._step % (self.args.steps_per_generation * self.num_iterations) == 0,
                step=self.state.global_step,
            )
            self._metrics["train"]["objective_changed"].append(changed)
        return {**inputs, "advantages": self._shaped[place]}

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """TRL's sampler, in the order of the epoch that the training is in.

        TRL draws the order of every epoch from one generator, so that a training that goes on from its second
        epoch would see the order of the first.
        """
        sampler = super()._get_train_sampler(dataset)
        if not hasattr(sampler, "generator"):
            return sampler
        return OrderOfTheEpoch(sampler, lambda: int((self.state.epoch or 0.0) + SAME_EPOCH))

    def _rows_of_the_curriculum(self, curriculum: Curriculum, count: int) -> list[dict[str, Any]]:
        """This process's rows of a batch that the curriculum chose."""
        total = count * self.accelerator.num_processes // self.num_generations
        random = np.random.default_rng([self.args.seed, self.state.global_step, 1])
        chosen = curriculum.draw(total, random)
        drawn = np.bincount(curriculum.buckets()[chosen], minlength=len(BUCKETS)) / total
        for name, share in zip(BUCKETS, drawn, strict=True):
            self._metrics["train"][f"curriculum_{name}"].append(float(share))
        first = self.accelerator.process_index * count
        places = np.repeat(chosen, self.num_generations)[first : first + count]
        return [self.train_dataset[int(i)] for i in places]

    def _observe(self, places: Sequence[int], completions: list[str]) -> None:
        """Tell the curriculum which completions at these places of this process are correct."""
        if self.curriculum is not None:
            indices = [self._rows[place]["index"] for place in places]
            results = [
                (self._numbers[index], self.reward.score(index, completions[place]).correct)
                for index, place in zip(indices, places, strict=True)
            ]
            self.curriculum.observe(gather_object(results))

    def _tokenize_prompts(self, prompts: list[str]) -> tuple[list[list[int]], None, dict[str, Any]]:
        """The ids that sampling and measuring use; rendered text is not tokenized a second time."""
        return [list(self._prompt_token_ids[prompt]) for prompt in prompts], None, {}

    def _generate(self, prompts: list[str]) -> tuple[Any, ...]:
        """Generate one completion per prompt, then replace dead groups; ``prompts`` is changed in place.

        TRL scores ``self._rows`` afterwards, so these are changed in place too. Completions are read as
        evaluation reads them, with the tags that the tokenizer calls special. Only lengths, ``correct`` and
        ``formatted`` of the first completions are logged.
        """
        prompt_ids, completion_ids, tool_mask, _, *rest = super()._generate(prompts)
        read = ResponseText(self.processing_class, self.eos_token_ids)
        completions = [read.whole(ids) for ids in completion_ids]
        rewards = self._group_rewards(prompts, completions, completion_ids)
        self._sampled_reward = float(rewards.mean())
        for row, completion in zip(self._rows, completions, strict=True):
            score = self.reward.score(row["index"], completion)
            self._log_metric("correct", float(score.correct))
            self._log_metric("formatted", float(score.formatted))
        self._observe(range(len(prompts)), completions)
        random = np.random.default_rng([self.args.seed, self.state.global_step])
        replaced = 0
        for _ in range(self.max_resample):
            dead = np.flatnonzero(np.ptp(rewards, axis=1) == 0)
            fresh = self._unused_rows(len(dead), random)
            if not fresh:
                break
            places = self._replace_prompts(dead, fresh, prompts)
            if places:
                ids, _, _ = self._tokenize_prompts([prompts[place] for place in places])
                sampled, _ = self._generate_single_turn(ids, None, {}, self.num_generations)
                for place, prompt, response in zip(places, ids, sampled, strict=True):
                    prompt_ids[place], completion_ids[place] = prompt, response
                    completions[place] = read.whole(response)
            self._observe(places, completions)
            replaced += len(fresh)
            rewards = self._group_rewards(prompts, completions, completion_ids)
        self._log_metric("resampled_groups", float(replaced))
        return prompt_ids, completion_ids, tool_mask, completions, *rest

    def _unused_rows(self, count: int, random: np.random.Generator) -> list[dict[str, Any]]:
        """At most ``count`` rows of prompts that are not in the batch; the same rows on every process."""
        used = {
            self._questions[self._numbers[i]] for i in gather_object([row["index"] for row in self._rows])
        }
        if self.curriculum is not None:
            exclude = {i for i, question in enumerate(self._questions) if question in used}
            chosen = self.curriculum.draw(count, random, exclude=exclude)
        else:
            unused = list({q: i for i, q in enumerate(self._questions) if q not in used}.values())
            chosen = random.choice(unused, size=min(count, len(unused)), replace=False)
        return [self.train_dataset[int(i)] for i in chosen]

    def _replace_prompts(self, dead: IntArray, fresh: list[dict[str, Any]], prompts: list[str]) -> list[int]:
        """Give dead groups fresh prompts; the places that changed on this process."""
        first = self.accelerator.process_index * len(prompts)
        places = []
        for group, row in zip(dead, fresh, strict=False):
            start = int(group) * self.num_generations - first
            for place in range(max(start, 0), min(start + self.num_generations, len(prompts))):
                self._rows[place], prompts[place] = row, row["prompt"]
                places.append(place)
        return places

    def _group_rewards(self, prompts: list[str], completions: list[str], ids: list[list[int]]) -> FloatArray:
        """(prompt, response) rewards of the whole batch, over all processes."""
        rewards = self._calculate_rewards(self._rows, prompts, completions, ids)
        groups: FloatArray = rewards[:, 0].double().cpu().numpy().reshape(-1, self.num_generations)
        return groups

    def _generate_single_turn(self, prompt_ids: Any, *args: Any, **kwargs: Any) -> Any:
        """Sample as TRL does; a policy without probabilities has diverged."""
        try:
            return super()._generate_single_turn(prompt_ids, *args, **kwargs)
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            fault = "the policy's probabilities are not finite"
            raise diverged("rl", self.state.global_step + 1, fault) from error

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card: a run folder is described by its own files."""

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the Trainer's checkpoint and what we add to it, then give it its name ``step-N``."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                if self.curriculum is not None:
                    self.curriculum.save(folder)
                publish(folder, self.settings_of_the_next_step())

    def settings_of_the_next_step(self) -> StepSettings:
        """The settings, with the weight that an adaptive entropy bonus will have."""
        objective = self.settings.objective
        if not isinstance(objective, EntropyBonus) or not self.use_adaptive_entropy:
            return self.settings
        acts = self._last_world_entropy <= self.args.entropy_target
        coefficient = self.entropy_coef if acts else 0.0
        return replace(self.settings, objective=objective.model_copy(update={"coefficient": coefficient}))


def publish(folder: Path, settings: StepSettings) -> Path:
    """Add settings and manifest to a finished checkpoint ``.../checkpoint-N`` and rename it ``.../step-N``.

    An adapter whose base lies in the same run folder names it relative to itself, so that the run folder
    can move.
    """
    settings.save(folder)
    adapter_config = folder / "adapter_config.json"
    if adapter_config.exists():
        content = json.loads(adapter_config.read_text(encoding="utf-8"))
        base, run = Path(content["base_model_name_or_path"]), folder.resolve().parent.parent
        if base.is_dir() and run in base.resolve().parents:
            content["base_model_name_or_path"] = os.path.relpath(base.resolve(), folder.resolve())
            adapter_config.write_text(json.dumps(content, indent=2), encoding="utf-8")
    write_manifest(folder)
    return folder.replace(folder.with_name(folder.name.replace("checkpoint-", "step-")))


def step_settings(config: TrainConfig) -> StepSettings:
    """The settings of a configuration's reinforcement learning, as its checkpoints record them."""
    rl = config.rl or RlConfig()
    objective = next_objective(rl)
    unclipped = objective is not None and objective.unclipped
    return StepSettings(
        loss_type=rl.loss_type,
        scale_rewards=rl.scale_rewards,
        group_size=rl.group_size,
        prompts_per_step=rl.prompts_per_step,
        temperature=rl.temperature,
        max_response_tokens=rl.max_response_tokens,
        max_prompt_tokens=rl.max_prompt_tokens,
        max_grad_norm=rl.optimizer.max_grad_norm,
        epsilon_low=1.0 if unclipped else rl.epsilon_low,
        epsilon_high=UNCLIPPED if unclipped else rl.epsilon_high,
        beta=rl.beta,
        **question_settings(config),
        objective=objective,
        num_iterations=rl.num_iterations,
        micro_batch_size=rl.micro_batch_size,
    )


def reinforce(
    config: TrainConfig, model: Any, tokenizer: Any, task: Task, out: Path, *, resume: Path | None
) -> None:
    """Train with TRL's GRPO and leave checkpoints under ``out/checkpoints/step-N``.

    Batches are sampled from the policy itself (no nucleus, no top-k) and used for ``num_iterations``
    optimizer steps; no dropout. A fresh run also leaves ``step-0``, the policy before the first step, for
    evaluation: it has no optimizer state.

    Args:
        config: the training configuration; its ``rl`` section must be there.
        model: the policy to start from, without adapter.
        tokenizer: its tokenizer.
        task: asks and scores.
        out: run folder.
        resume: checkpoint to continue from, or None.

    Raises:
        ConfigError: the batch does not fit the number of processes, or there are too few prompts.
        TrainingError: the training diverged.
        RunFolderError: a checkpoint cannot be written.
    """
    rl = config.rl
    if rl is None:
        raise ConfigError("rl: the section is missing; add it to train with reinforcement learning")
    task = asked_through(task, tokenizer)
    problems = task.problems("train")
    rows = prompt_rows(
        task, problems, tokenizer, longest=rl.max_prompt_tokens, distinct=rl.curriculum is not None
    )
    if len(rows) < rl.prompts_per_step:
        raise ConfigError(
            f"rl.prompts_per_step: {rl.prompts_per_step} prompts asked for, {config.task} has {len(rows)}; "
            "lower it"
        )
    if rl.probe is not None and rl.probe.num_prompts > (held_out := len(task.problems("test"))):
        raise ConfigError(
            f"rl.probe.num_prompts: {rl.probe.num_prompts} prompts asked for, the test split of "
            f"{config.task} has {held_out}; lower it"
        )
    checkpoints = out / "checkpoints"
    digest = task.digest if isinstance(task, TemplatedTask) else ""
    settings = replace(step_settings(config), task_digest=digest)
    curriculum = None
    if rl.curriculum is not None:
        curriculum = Curriculum(rl.curriculum, [problems[i].prompt_id for i in rows["index"]])
        if resume is not None:
            curriculum.restore(resume)
    trainer = OnPolicyTrainer(
        settings=settings,
        reward=TaskReward(task, problems),
        max_resample=rl.max_resample,
        curriculum=curriculum,
        model=model,
        args=grpo_arguments(config, rl, settings, checkpoints),
        train_dataset=rows,
        processing_class=tokenizer,
        peft_config=adapter(config.model.lora),
    )
    if rl.probe is not None:
        probe = StepProbe(task, seed=config.seed, file=out / "probes.parquet", **rl.probe.model_dump())
        trainer.add_callback(probe)
    if rl.record is not None:
        trainer.add_callback(StepRecorder(out, **rl.record.model_dump()))
    install_callbacks(
        trainer,
        section="rl",
        logs=out / "tensorboard" if "tensorboard" in rl.report_to else None,
        resumed_from=0 if resume is None else int(resume.name.removeprefix("step-")),
    )
    if trainer.is_world_process_zero() and not (checkpoints / "step-0").exists():
        start = checkpoints / "checkpoint-0"
        with writing(start):
            trainer.save_model(str(start))
            trainer.state.save_to_json(str(start / "trainer_state.json"))
            publish(start, trainer.settings_of_the_next_step())
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def grpo_arguments(
    config: TrainConfig, rl: RlConfig, settings: StepSettings, checkpoints: Path
) -> GRPOConfig:
    """TRL's arguments: every optimizer step is on the whole of a generated batch."""
    total = rl.prompts_per_step * rl.group_size
    shared = shared_arguments(rl.optimizer, seed=config.seed, report_to=rl.report_to)
    processes = GRPOConfig(output_dir=str(checkpoints), **shared).world_size
    if total % (rl.micro_batch_size * processes):
        raise ConfigError(
            f"rl.micro_batch_size: {rl.micro_batch_size} sequences on {processes} processes do not divide "
            f"the {total} sequences of a step; give a divisor"
        )
    micro_batches = total // (rl.micro_batch_size * processes)
    return GRPOConfig(
        output_dir=str(checkpoints),
        max_steps=rl.steps,
        per_device_train_batch_size=rl.micro_batch_size,
        gradient_accumulation_steps=micro_batches,
        steps_per_generation=micro_batches,
        num_generations=rl.group_size,
        num_iterations=rl.num_iterations,
        loss_type=rl.loss_type,
        scale_rewards=rl.scale_rewards,
        beta=rl.beta,
        use_bias_correction_kl=settings.bias_correction_kl,
        epsilon=settings.epsilon_low,
        epsilon_high=settings.epsilon_high,
        temperature=rl.temperature,
        top_p=1.0,
        top_k=0,
        max_completion_length=rl.max_response_tokens,
        disable_dropout=True,
        gradient_checkpointing=rl.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=rl.save_every,
        **bonus_arguments(rl),
        **shared,
    )
