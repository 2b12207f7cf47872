"""Sampling and evaluating: the figures of one checkpoint, from sums over each prompt's responses."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from stepscope.errors import MeasurementError
from stepscope.evaluation.responses import write_responses
from stepscope.evaluation.rows import prompt_ratios
from stepscope.intervals import proportion
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import SAMPLING, SamplingOptions, response_text, sample_rollouts
from stepscope.policy.sampling.base import Sampler
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.results.evaluation import EvaluationRow, PromptResult
from stepscope.stats import clustered_quantile, clustered_ratio
from stepscope.tasks import Task
from stepscope.tasks.load import asked_through

logger = logging.getLogger(__name__)


def evaluate(
    policy: Policy,
    task: Task,
    *,
    num_prompts: int,
    samples_per_prompt: int,
    seed: int,
    ks: Sequence[int] = (1, 8),
    split: str = "test",
    temperature: float | None = None,
    top_p: float = 1.0,
    sampler: Sampler = TransformersSampler(),
    responses: Path | None = None,
    budget: Budget = SAMPLING,
) -> EvaluationRow:
    """Sample responses and evaluate them.

    Args:
        policy: with a tokenizer.
        task: asked and scored.
        num_prompts: prompts, drawn by ``seed``: the same for every checkpoint, so that changes are paired.
        samples_per_prompt: responses per prompt.
        seed: of prompts and samples.
        ks: numbers of samples k for pass@k; 1 is always among them.
        split: split of the task.
        temperature: sampling temperature; None means the settings' own.
        top_p: sample only from the smallest set of tokens that holds this much probability.
        sampler: who draws the responses.
        responses: parquet file to write the responses to (:func:`write_responses`), or None.
        budget: how many sequences are generated at a time; the figures do not depend on it.

    Raises:
        MeasurementError: a k is larger than ``samples_per_prompt``.
        BatchError: the split has fewer prompts.
    """
    _require_samples(ks, samples_per_prompt)
    task = asked_through(task, policy.tokenizer)
    if temperature is not None:
        policy = replace(policy, settings=replace(policy.settings, temperature=temperature))
    rollouts = sample_rollouts(
        policy,
        task,
        num_prompts=num_prompts,
        group_size=samples_per_prompt,
        seed=seed,
        split=split,
        options=SamplingOptions(sampler=nucleus(sampler, top_p)),
        budget=budget,
    )
    if sampler.conventions and top_p == 1:
        mismatch = sampler_mismatch(rollouts)
        if mismatch is not None and mismatch.doubt:
            logger.warning(
                "%s is not quite %s: %s", sampler.name, policy.path or "this policy", mismatch.doubt
            )
    if responses is not None:
        read = response_text(policy)
        tokens = [read.by_token(ids) for ids in rollouts.response_token_ids]
        write_responses(rollouts, task, responses, tokens)
    return evaluate_rollouts(
        rollouts,
        task,
        ks=ks,
        step=policy.step,
        checkpoint="" if policy.path is None else policy.path.name,
        split=split,
        top_p=top_p,
        seed=seed,
    )


def nucleus(sampler: Sampler, top_p: float) -> Sampler:
    """The sampler with this ``top_p``, where it is below 1."""
    return sampler if top_p == 1 else replace(sampler, decoding=replace(sampler.decoding, top_p=top_p))


def evaluate_rollouts(
    rollouts: Rollouts,
    task: Task,
    *,
    ks: Sequence[int] = (1, 8),
    step: int = 0,
    checkpoint: str = "",
    split: str = "test",
    top_p: float = 1.0,
    seed: int = 0,
) -> EvaluationRow:
    """Evaluate responses that are already there; the arithmetic of :func:`evaluate`.

    Args:
        rollouts: the same number of responses to every prompt.
        task: whose format the responses should keep.
        ks: numbers of samples k for pass@k; 1 is always among them.
        step: optimizer steps of the checkpoint.
        checkpoint: its name.
        split: where the prompts come from; recorded.
        top_p: nucleus they were sampled from; recorded.
        seed: with which they were sampled; recorded.

    Raises:
        MeasurementError: prompts with different numbers of responses, or a k larger than that number.
    """
    clusters = rollouts.prompt_index
    counts = np.bincount(clusters)
    if counts.min() != counts.max():
        raise MeasurementError(
            f"evaluation: between {counts.min()} and {counts.max()} responses per prompt, expected the same "
            "number for all; sample them with one group size, and copies of a prompt once"
        )
    samples = int(counts[0])
    _require_samples(ks, samples)
    prompts = _add_up(rollouts, task, samples)
    figures: dict[str, tuple[float, float]] = {}
    intervals: dict[str, tuple[float, float]] = {}
    for name, (x, y, unit) in prompt_ratios(prompts, sorted({1, *ks})).items():
        found = clustered_ratio(x, y, np.arange(len(prompts)), unit=unit, method="")
        figures[name] = (found.value, found.stderr)
        intervals[name] = proportion(x / y) if unit == "fraction" else (found.low, found.high)
    surprisals = [-logprobs for logprobs in rollouts.logprobs]
    for q in (50, 90, 99):
        name = f"surprisal_q{q}"
        found = clustered_quantile(surprisals, clusters, q / 100, unit="nats", method="")
        figures[name], intervals[name] = (found.value, found.stderr), (found.low, found.high)
    pass_at = {k: figures.pop(f"pass_at_{k}") for k in sorted({1, *map(int, ks)})}
    return EvaluationRow(
        step=step,
        checkpoint=checkpoint,
        checkpoint_digest="",
        task=task.spec,
        split=split,
        temperature=rollouts.temperature,
        top_p=top_p,
        seed=seed,
        num_prompts=len(prompts),
        samples_per_prompt=samples,
        num_tokens=int(rollouts.num_tokens.sum()),
        pass_at=pass_at,
        prompts=prompts,
        intervals=intervals,
        **{name: value for name, (value, _) in figures.items()},
        **{f"{name}_stderr": stderr for name, (_, stderr) in figures.items()},
    )


def _add_up(rollouts: Rollouts, task: Task, samples: int) -> tuple[PromptResult, ...]:
    """Sums over the responses of each prompt, in order of first appearance; copies are one prompt."""
    formatted = np.array([task.formatted(text) for text in rollouts.responses])

    def add(values: npt.ArrayLike) -> FloatArray:
        sums = np.bincount(rollouts.prompt_index, weights=np.asarray(values, dtype=np.float64))
        return sums.astype(np.float64)

    correct, well_formed, cut = add(rollouts.correct), add(formatted), add(rollouts.truncated)
    tokens, tokens_correct = add(rollouts.num_tokens), add(rollouts.num_tokens * rollouts.correct)
    reward, entropy = add(rollouts.rewards), add(rollouts.entropy_per_seq)
    first: dict[str, str] = {}
    for key, prompt_id in zip(rollouts.prompt_keys, rollouts.prompt_ids, strict=True):
        first.setdefault(key, prompt_id)
    surprisal = add([-float(v.sum()) for v in rollouts.logprobs])
    return tuple(
        PromptResult(
            prompt_id=prompt_id,
            num_samples=samples,
            num_correct=int(correct[i]),
            num_formatted=int(well_formed[i]),
            num_truncated=int(cut[i]),
            num_tokens=int(tokens[i]),
            num_tokens_correct=int(tokens_correct[i]),
            reward=float(reward[i]),
            entropy=float(entropy[i]),
            surprisal=float(surprisal[i]),
        )
        for i, prompt_id in enumerate(first.values())
    )


def _require_samples(ks: Sequence[int], samples: int) -> None:
    if not ks or min(ks) < 1 or max(ks) > samples:
        raise MeasurementError(
            f"evaluation: pass@k for k in {list(ks)} needs k between 1 and the {samples} samples per prompt; "
            "take more samples or smaller k"
        )
