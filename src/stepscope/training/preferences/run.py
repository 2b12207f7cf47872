"""Learning from preferences after the warm-up: its pairs, its settings, its training."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from trl import DPOConfig

from stepscope.config import HypoConfig, TrainConfig
from stepscope.console import say
from stepscope.errors import ConfigError
from stepscope.policy.forward import vocabulary_size
from stepscope.policy.loss.router import router_coefficient
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.state import Policy
from stepscope.tasks.load import TemplatedTask, asked_through
from stepscope.tasks.problem import Task
from stepscope.training.preferences.pairs import Pair, keep_pairs, kept_pairs, pairs_from_rollouts, read_pairs
from stepscope.training.preferences.trainer import PreferenceTrainer
from stepscope.training.rl import publish
from stepscope.training.setup.arguments import install_callbacks, shared_arguments
from stepscope.training.setup.preflight import require_room
from stepscope.training.setup.prompts import prompt_rows, question_settings
from stepscope.training.setup.start import adapter, writing

PAIRS = "pairs.parquet"
"""Name of the file in the run folder that has the pairs as token ids."""


def preference_settings(config: TrainConfig, hypo: HypoConfig) -> StepSettings:
    """The settings of a step, as the checkpoints record them: loss ``dpo`` where nothing is sampled."""
    sampled = {
        "kl_weight": hypo.kl_weight,
        "kl_group_size": hypo.kl_group_size,
        "kl_estimator": hypo.kl_estimator,
    }
    return StepSettings(
        loss_type="hypo" if hypo.kl_weight > 0 else "dpo",
        loss_parameters=sampled if hypo.kl_weight > 0 else {},
        scale_rewards="none",
        group_size=2,
        prompts_per_step=hypo.pairs_per_step,
        temperature=1.0,
        max_response_tokens=hypo.max_response_tokens,
        max_prompt_tokens=hypo.max_prompt_tokens,
        max_grad_norm=hypo.optimizer.max_grad_norm,
        beta=hypo.beta,
        **question_settings(config),
        disable_dropout=True,
    )


def prefer(
    config: TrainConfig, model: Any, tokenizer: Any, task: Task, out: Path, *, resume: Path | None
) -> None:
    """Train with DPO, or HyPO where ``kl_weight`` is above 0, and leave ``out/checkpoints/step-N``.

    The pairs are those of ``out/pairs.parquet`` where that is there; else they are made, or read from the
    user's file, and kept there. The reference is the policy that the training starts from. A fresh run also
    leaves ``step-0``, the policy before the first step.

    Args:
        config: the training configuration; its ``hypo`` section must be there.
        model: the policy to start from, without adapter.
        tokenizer: its tokenizer.
        task: asks and scores.
        out: run folder.
        resume: checkpoint to continue from, or None.

    Raises:
        ConfigError: too few pairs or prompts, a response or a prompt of the file that is too long, a mixture
            of experts that is balanced by a loss, or several processes.
        TaskError: the file of pairs cannot be read.
        TrainingError: the training diverged.
        RunFolderError: a checkpoint cannot be written.
    """
    hypo = config.hypo
    if hypo is None:
        raise ConfigError("hypo: the section is missing; add it to learn from preferences")
    task = asked_through(task, tokenizer)
    digest = task.digest if isinstance(task, TemplatedTask) else ""
    settings = replace(preference_settings(config, hypo), task_digest=digest)
    checkpoints = out / "checkpoints"
    arguments = _arguments(config, hypo, checkpoints)
    if arguments.world_size > 1:
        raise ConfigError(
            f"hypo: learning from preferences runs in one process, got {arguments.world_size}; start it "
            "without torchrun"
        )
    if (weight := router_coefficient(model, settings)) > 0:
        raise ConfigError(
            f"hypo: the model has a loss of weight {weight:g} that balances its routers, which TRL takes of "
            "the pairs alone and no step that is measured here holds; set router_aux_loss_coef to 0 in its "
            "config.json"
        )
    pairs = _pairs(hypo, Policy(model, tokenizer, settings), task, out)
    require_room([(*p.prompt, *max(p.chosen, p.rejected, key=len)) for p in pairs], model, "hypo.pairs")
    prompts = _prompts(hypo, task, tokenizer)
    if hypo.kl_weight > 0:
        asked = [p.prompt for p in pairs] if prompts is None else [ids for _, ids in prompts]
        whole = [(*ids, *[0] * hypo.max_response_tokens) for ids in asked]
        require_room(whole, model, "hypo.kl_prompts, with responses of hypo.max_response_tokens to them")
    trainer = PreferenceTrainer(
        settings=settings,
        section=hypo,
        pairs=pairs,
        prompts=prompts,
        model=model,
        ref_model=None if config.model.lora is not None else copy.deepcopy(model),
        args=arguments,
        processing_class=tokenizer,
        peft_config=adapter(config.model.lora),
    )
    install_callbacks(
        trainer,
        section="hypo",
        logs=out / "tensorboard" if "tensorboard" in hypo.report_to else None,
        resumed_from=0 if resume is None else int(resume.name.removeprefix("step-")),
    )
    if not (checkpoints / "step-0").exists():
        start = checkpoints / "checkpoint-0"
        with writing(start):
            trainer.save_model(str(start))
            trainer.state.save_to_json(str(start / "trainer_state.json"))
            publish(start, settings)
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))


def _arguments(config: TrainConfig, hypo: HypoConfig, checkpoints: Path) -> DPOConfig:
    """TRL's arguments: a step is on ``pairs_per_step`` pairs."""
    return DPOConfig(
        output_dir=str(checkpoints),
        max_steps=hypo.steps,
        per_device_train_batch_size=hypo.micro_batch_size,
        gradient_accumulation_steps=hypo.pairs_per_step // hypo.micro_batch_size,
        beta=hypo.beta,
        max_length=None,
        disable_dropout=True,
        gradient_checkpointing=hypo.gradient_checkpointing,
        logging_steps=1,
        save_strategy="steps",
        save_steps=hypo.save_every,
        **shared_arguments(hypo.optimizer, seed=config.seed, report_to=hypo.report_to),
    )


def _pairs(hypo: HypoConfig, policy: Policy, task: Task, out: Path) -> list[Pair]:
    """The run's pairs, made or read when it begins."""
    path = out / PAIRS
    if path.exists():
        return kept_pairs(path)
    if hypo.pairs is not None:
        variables = policy.settings.chat_template_kwargs
        pairs = read_pairs(
            Path(hypo.pairs),
            policy.tokenizer,
            longest=hypo.max_response_tokens,
            longest_prompt=hypo.max_prompt_tokens,
            vocabulary=vocabulary_size(policy.model),
            variables=variables,
        )
        origin, cure = f"{hypo.pairs} has", "give a longer file"
    else:
        seed = policy.settings.seed
        rollouts = sample_rollouts(
            policy,
            task,
            num_prompts=hypo.pair_prompts,
            group_size=hypo.pair_samples,
            seed=seed,
            options=SamplingOptions(exclude=_too_long(hypo, task, policy.tokenizer)),
        )
        pairs = pairs_from_rollouts(rollouts, per_prompt=hypo.pairs_per_prompt, seed=seed)
        solved = rollouts.correct.mean()
        origin = f"{len(rollouts)} responses to {hypo.pair_prompts} prompts, {solved:.0%} of them right, give"
        cure = "raise hypo.pair_prompts or pair_samples"
        say(f"hypo: {origin} {len(pairs)} pairs of a right and a wrong one")
    if len(pairs) < hypo.pairs_per_step:
        raise ConfigError(
            f"hypo.pairs_per_step: {hypo.pairs_per_step} pairs asked for, {origin} {len(pairs)}; {cure}, "
            f"or lower it"
        )
    keep_pairs(pairs, path)
    return pairs


def _too_long(hypo: HypoConfig, task: Task, tokenizer: Any) -> frozenset[str]:
    """Ids of the task's prompts that are longer than any that is asked; sampling would cut them."""
    if hypo.max_prompt_tokens is None:
        return frozenset()
    problems = task.problems("train")
    rows = prompt_rows(task, problems, tokenizer, longest=hypo.max_prompt_tokens, section="hypo")
    return frozenset(p.prompt_id for p in problems) - {problems[i].prompt_id for i in rows["index"]}


def _prompts(hypo: HypoConfig, task: Task, tokenizer: Any) -> list[tuple[str, tuple[int, ...]]] | None:
    """What of the task is sampled from; None where that is the prompts of the pairs, or nothing."""
    if hypo.kl_prompts == "pairs" or hypo.kl_weight == 0.0:
        return None
    problems = task.problems("train")
    rows = prompt_rows(
        task, problems, tokenizer, longest=hypo.max_prompt_tokens, distinct=True, section="hypo"
    )
    if len(rows) < hypo.pairs_per_step:
        raise ConfigError(
            f"hypo.kl_prompts: task has {len(rows)} prompts, {hypo.pairs_per_step} are asked for a step; "
            "lower hypo.pairs_per_step"
        )
    numbered = zip(rows["index"], rows["prompt_token_ids"], strict=True)
    return [(problems[i].question, tuple(ids)) for i, ids in numbered]
