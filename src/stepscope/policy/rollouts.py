"""Sampling responses from a policy and scoring them on a task."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import BatchError, CheckpointError, MeasurementError, RewardError, shown
from stepscope.policy.forward import TokenBatch, base_model, forward
from stepscope.policy.group import current
from stepscope.policy.loss.estimators import with_advantages
from stepscope.policy.passes import Budget, sweep_rows
from stepscope.policy.sampling.base import Request, Response, Sampler
from stepscope.policy.sampling.drawn_by import with_sampler
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.state import Policy
from stepscope.policy.texts import ResponseText
from stepscope.results import FloatArray, Rollouts, same_text
from stepscope.rules import FrontierWeights, InfluenceClipping
from stepscope.tasks.formats.prompts import Prompt, encode_prompt
from stepscope.tasks.load import asked_through, example_in, scored
from stepscope.tasks.problem import Chat, Problem, Task, Written

SAMPLING = Budget(max_sequences=64)


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """Which prompts are asked and how their responses are drawn.

    Attributes:
        exclude: questions or prompt ids not to use; for a probe batch ``update.asked``.
        resample: rounds in which prompt groups whose rewards are all equal are replaced by groups of other
            prompts; 0 keeps every group.
        draw: which of many independent draws of responses to the same prompts.
        sampler: who draws the responses, and by which temperature and truncation.
    """

    exclude: AbstractSet[str] = frozenset()
    resample: int = 0
    draw: int = 0
    sampler: Sampler = TransformersSampler()


@dataclass(frozen=True)
class _Sequence:
    """One sampled response and its score."""

    prompt_id: str
    question: str
    prompt: str
    prompt_token_ids: tuple[int, ...]
    response: str
    response_token_ids: tuple[int, ...]
    truncated: bool
    reward: float
    correct: bool
    engine_logprobs: FloatArray | None = None


def sample_rollouts(
    policy: Policy,
    task: Task,
    *,
    num_prompts: int,
    group_size: int,
    seed: int,
    split: str = "train",
    options: SamplingOptions = SamplingOptions(),
    budget: Budget = SAMPLING,
) -> Rollouts:
    """Sample ``group_size`` responses to each of ``num_prompts`` prompts and score them.

    Prompts are drawn without replacement, by their text: of several problems with the same question the first
    that comes is asked, so a question is as likely to be asked as the split has copies of it. Responses come
    from pi(.|s) = softmax(z(s)/T) itself, at the settings' temperature: no top-k, no penalties, whatever the
    model's generation config says; each ends with an end-of-sequence token, which counts, or is cut at
    ``max_response_tokens`` and flagged. Log-probs and entropies are recomputed with
    :func:`stepscope.policy.forward.forward`.

    By default transformers draws every token at a uniform number that belongs to its sequence and position
    (:class:`TransformersSampler`): the same arguments give the same batch on the same machine. With another
    sampler, temperature or truncation the batch also has log-probs of what it was drawn from
    (``sampler_logprobs``). Processes that measure together share out the responses, and each gets all.

    Args:
        policy: with a tokenizer.
        task: where prompts and rewards come from.
        num_prompts: prompt groups.
        group_size: responses per prompt; advantages are filled in when it is more than 1 and no
            KL divergence is taken off the rewards (``with_advantages`` makes them then).
        seed: of prompts and responses.
        split: ``train`` or ``test``.
        options: prompts to leave out, groups to replace, and how tokens are drawn.
        budget: how many sequences are generated at a time.

    Raises:
        BatchError: too few prompts, a prompt too long for the model, no reward variance after all rounds, or
            a sampler that cannot be reached or has another policy.
    """
    varied = options.resample > 0
    _check_request(policy, num_prompts, group_size, varied)
    task = asked_through(task, policy.tokenizer)
    problems = task.problems(split)
    order = np.random.default_rng([seed, 0]).permutation(len(problems))
    pool = _different((problems[int(i)] for i in order), options.exclude)
    kept: list[list[_Sequence]] = []
    missing = num_prompts
    for attempt in range(options.resample + 1):
        chosen = [problem for _, problem in zip(range(missing), pool, strict=False)]
        if len(chosen) < missing:
            raise BatchError(
                f"{split} split: {len(problems)} problems, less copies and those that are excluded, are "
                f"not enough for {num_prompts} different "
                f"prompts{' with reward variance' if varied else ''}; ask for fewer "
                "prompts or use a larger task"
            )
        drawn = [options.draw] if options.draw else []
        generator = np.random.default_rng([seed, 1 + attempt, *drawn])
        groups = _sample_groups(policy, task, chosen, group_size, generator, options.sampler, budget)
        kept += [g for g in groups if not varied or len({s.reward for s in g}) > 1]
        missing = num_prompts - len(kept)
        if missing == 0:
            break
    if missing:
        raise RewardError(
            f"{missing} of {num_prompts} prompt groups still have no reward variance after "
            f"{options.resample} rounds of resampling; use a larger group, a higher temperature or a "
            "task the policy solves sometimes",
            example_in(task, _assemble(policy, groups[0])),
        )
    rollouts = _assemble(policy, [sequence for group in kept for sequence in group])
    rollouts.refuse_ungraded()
    rollouts = _scored(policy, rollouts, options.sampler, budget, chosen=varied)
    if group_size == 1 or policy.settings.kl_in_reward != 0.0:
        return rollouts
    return with_advantages(rollouts, policy.settings)


def sample_influence_probe(policy: Policy, task: Task) -> Rollouts | None:
    """The probe batch that ``influence`` and ``frontier`` look at before a step; None for other rules.

    One response to each of the rule's ``num_prompts`` prompts of the training split. The run's seed and the
    step number seed it, so that training and rebuilt step look at the same.

    Args:
        policy: before the step.
        task: where prompts and rewards come from.
    """
    rule = policy.settings.objective
    if not isinstance(rule, InfluenceClipping | FrontierWeights):
        return None
    seed = int(np.random.SeedSequence([policy.settings.seed, policy.step, 2]).generate_state(1)[0])
    return sample_rollouts(policy, task, num_prompts=rule.num_prompts, group_size=1, seed=seed)


def sample_responses(
    policy: Policy, prompts: Sequence[tuple[int, ...]], *, seed: int, budget: Budget = SAMPLING
) -> Rollouts:
    """One response to each of some prompts given as token ids, sampled as by :func:`sample_rollouts`.

    Args:
        policy: with a tokenizer.
        prompts: a prompt as often as it is to be answered; each text is its own ``prompt_id``.
        seed: of the responses.
        budget: how many sequences are generated at a time.

    Returns:
        The batch; rewards are nan, because nobody graded it.

    Raises:
        BatchError: a prompt is too long for the model.
    """
    for ids in prompts:
        _require_room(policy, len(ids))
    sampler = SamplingOptions().sampler
    drawn = _drawn(policy, prompts, np.random.default_rng([seed, 1]), sampler, budget)
    responses = [response.token_ids for response in current().merge(drawn).values()]
    ends = set(end_tokens(policy))
    read = response_text(policy)
    texts = [policy.tokenizer.decode(list(ids)) for ids in prompts]
    sampled = [
        _Sequence(
            prompt_id=" ".join(map(str, ids)),
            question=text,
            prompt=text,
            prompt_token_ids=ids,
            response=read.whole(response),
            response_token_ids=response,
            truncated=response[-1] not in ends,
            reward=float("nan"),
            correct=False,
        )
        for ids, text, response in zip(prompts, texts, responses, strict=True)
    ]
    rollouts = _assemble(policy, sampled)
    logprobs, entropies = score_rollouts(policy, rollouts, budget=budget)
    return replace(rollouts, logprobs=logprobs, entropies=entropies)


def score_rollouts(
    policy: Policy, rollouts: Rollouts, *, budget: Budget = Budget()
) -> tuple[tuple[FloatArray, ...], tuple[FloatArray, ...]]:
    """Log-probs and entropies of given responses under the policy, in nats.

    Args:
        policy: the policy that scores; at the rollouts' temperature.
        rollouts: token ids; its own log-probs are not used.
        budget: how large micro-batches are.

    Returns:
        Log-probs and entropies, each one (tok,) array per sequence.
    """
    logprobs, entropies = _score(policy, rollouts, ("logprobs", "entropies"), budget)
    return logprobs, entropies


def score_discriminators(
    policy: Policy, rollouts: Rollouts, *, budget: Budget = Budget()
) -> tuple[FloatArray, ...]:
    """sum_v pi_v^2 (log pi_v + H_k) at every response token, one (tok,) array per sequence."""
    (found,) = _score(policy, rollouts, ("discriminators",), budget)
    return found


def _score(
    policy: Policy, rollouts: Rollouts, names: Sequence[str], budget: Budget
) -> list[tuple[FloatArray, ...]]:
    """Fields of ``policy.forward.TokenOutputs`` under the policy, each one (tok,) array per sequence."""
    squares = "discriminators" in names

    def fields(batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            outputs = forward(policy.model, batch, temperature=rollouts.temperature, keep_squares=squares)
        return torch.stack([getattr(outputs, name) for name in names], -1).double().cpu()

    rows = sweep_rows(policy, rollouts, fields, budget=budget, what="scoring")
    return [tuple(row[:, k].numpy().copy() for row in rows) for k in range(len(names))]


def end_tokens(policy: Policy) -> list[int]:
    """Token ids that end a response, as TRL has them: the tokenizer's and the generation config's.

    Raises:
        CheckpointError: the generation config names something else than tokens.
    """
    config = getattr(base_model(policy.model), "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    others = [] if listed is None else list(listed) if isinstance(listed, list | tuple) else [listed]
    if any(type(token) is not int or token < 0 for token in others):
        raise CheckpointError(
            f"{policy.path or 'this policy'}: generation_config.json: eos_token_id is {shown(listed)}, "
            "expected a token id or a list of them; mend it"
        )
    own = policy.tokenizer.eos_token_id
    return others if own is None or own in others else [own, *others]


def response_text(policy: Policy) -> ResponseText:
    """Reads the responses of a policy."""
    return ResponseText(policy.tokenizer, end_tokens(policy))


def _check_request(policy: Policy, num_prompts: int, group_size: int, variance: bool) -> None:
    if policy.tokenizer is None:
        raise BatchError("this policy has no tokenizer, so nothing can be sampled; load it from a checkpoint")
    if num_prompts < 1 or group_size < 1:
        raise BatchError(
            f"got num_prompts={num_prompts}, group_size={group_size}, expected at least 1 of each; ask "
            "for more"
        )
    if variance and group_size < 2:
        raise BatchError("a group of one response has no reward variance; use group_size of at least 2")


def _different(problems: Iterable[Problem], exclude: AbstractSet[str]) -> Iterator[Problem]:
    """The problems that are not excluded, each question once."""
    taken = {*exclude, *map(same_text, exclude)}
    for problem in problems:
        own = {problem.prompt_id, same_text(problem.question)}
        if taken.isdisjoint(own):
            taken |= own
            yield problem


def _sample_groups(
    policy: Policy,
    task: Task,
    problems: Sequence[Problem],
    group_size: int,
    generator: np.random.Generator,
    sampler: Sampler,
    budget: Budget,
) -> list[list[_Sequence]]:
    """``group_size`` scored responses to each problem."""
    asked = [task.prompt(problem, policy.tokenizer) for problem in problems]
    prompts = [_prompt(policy, one) for one in asked]
    rows = [i for i in range(len(problems)) for _ in range(group_size)]
    responses = _drawn(policy, [prompts[i].token_ids for i in rows], generator, sampler, budget)
    ends = set(end_tokens(policy))
    read = response_text(policy)
    written = {
        row: Written(
            problem=problems[rows[row]],
            asked=asked[rows[row]],
            prompt=prompts[rows[row]].text,
            prompt_ids=prompts[rows[row]].token_ids,
            response=read.whole(drawn.token_ids),
            token_ids=drawn.token_ids,
            truncated=drawn.token_ids[-1] not in ends,
        )
        for row, drawn in responses.items()
    }
    scores = scored(task, list(written.values()), policy.tokenizer)
    found = {
        row: _Sequence(
            prompt_id=one.problem.prompt_id,
            question=one.problem.question,
            prompt=one.prompt,
            prompt_token_ids=tuple(one.prompt_ids),
            response=one.response,
            response_token_ids=tuple(one.token_ids),
            truncated=one.truncated,
            reward=float(score.reward),
            correct=bool(score.correct),
            engine_logprobs=responses[row].logprobs,
        )
        for (row, one), score in zip(written.items(), scores, strict=True)
    }
    groups: list[list[_Sequence]] = [[] for _ in problems]
    for row, sequence in current().merge(found).items():
        groups[rows[row]].append(sequence)
    return groups


def _drawn(
    policy: Policy,
    prompts: Sequence[tuple[int, ...]],
    generator: np.random.Generator,
    sampler: Sampler,
    budget: Budget,
) -> dict[int, Response]:
    """Responses to some prompts by their places: this process's share."""
    length = policy.settings.max_response_tokens
    group = current()
    mine = group.share(range(len(prompts)))
    if not mine:
        return {}
    if group.lockstep and not isinstance(sampler, TransformersSampler):
        raise MeasurementError(f"{sampler.name} cannot run a model that is sharded; sample without --shard")
    request = Request(
        prompts=[prompts[i] for i in mine],
        randomness=sampler.randomness(generator, len(prompts), length)[mine],
        max_tokens=length,
        temperature=policy.settings.temperature,
        ends=tuple(end_tokens(policy)),
    )
    found = dict(zip(mine, sampler.sample(policy, request, budget), strict=True))
    return {place: found[place] for place in group.deal(mine)[group.rank]} if group.lockstep else found


def _scored(
    policy: Policy, rollouts: Rollouts, sampler: Sampler, budget: Budget, *, chosen: bool
) -> Rollouts:
    """The batch with the policy's log-probs and entropies, and the sampler's where it is not the policy."""
    if sampler.conventions or not sampler.decoding.is_policy(rollouts.temperature):
        return with_sampler(policy, rollouts, sampler, budget, chosen=chosen)
    logprobs, entropies = score_rollouts(policy, rollouts, budget=budget)
    return replace(rollouts, logprobs=logprobs, entropies=entropies)


def _prompt(policy: Policy, asked: str | Chat) -> Prompt:
    """A prompt's token ids, their end where it is longer than allowed; refused where it does not fit."""
    prompt = encode_prompt(asked, policy.tokenizer)
    limit = policy.settings.max_prompt_tokens
    ids = prompt.token_ids if limit is None else prompt.token_ids[-limit:]
    _require_room(policy, len(ids))
    return replace(prompt, token_ids=ids)


def _require_room(policy: Policy, count: int) -> None:
    """Refuse a prompt of so many tokens that the longest response has no room after it."""
    room = getattr(getattr(base_model(policy.model), "config", None), "max_position_embeddings", None)
    if room is not None and count + policy.settings.max_response_tokens > room:
        raise BatchError(
            f"a prompt of {count} tokens and a response of {policy.settings.max_response_tokens} do "
            f"not fit the model's {room} positions; lower max_response_tokens or set max_prompt_tokens"
        )


def _assemble(policy: Policy, sequences: Sequence[_Sequence]) -> Rollouts:
    """The records as one batch; log-probs and entropies still to be filled in."""
    empty = tuple(np.zeros(len(s.response_token_ids)) for s in sequences)
    return Rollouts(
        prompt_ids=tuple(s.prompt_id for s in sequences),
        prompts=tuple(s.prompt for s in sequences),
        responses=tuple(s.response for s in sequences),
        prompt_token_ids=tuple(s.prompt_token_ids for s in sequences),
        response_token_ids=tuple(s.response_token_ids for s in sequences),
        rewards=np.array([s.reward for s in sequences], dtype=np.float64),
        correct=np.array([s.correct for s in sequences], dtype=np.bool_),
        truncated=np.array([s.truncated for s in sequences], dtype=np.bool_),
        logprobs=empty,
        entropies=empty,
        questions=tuple(s.question for s in sequences),
        sampler_logprobs=_all_or_none([s.engine_logprobs for s in sequences]),
        temperature=policy.settings.temperature,
        max_response_tokens=policy.settings.max_response_tokens,
    )


def _all_or_none(rows: Sequence[FloatArray | None]) -> tuple[FloatArray, ...] | None:
    known = tuple(row for row in rows if row is not None)
    return known if len(known) == len(rows) else None
