"""The update batch that a dump holds, and how far what it gives is from what is computed here."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from stepscope.errors import BatchError, ConfigError
from stepscope.pipeline.inputs.update_files.checks import (
    length_figure,
    logprob_figures,
    reward_functions,
    reward_weights,
)
from stepscope.pipeline.inputs.update_files.fields import Logged, logged
from stepscope.pipeline.inputs.update_files.refusals import (
    in_loss,
    refuse_later_update,
    refuse_odd_groups,
    refuse_other_rows,
)
from stepscope.pipeline.inputs.update_files.rows import Dump, read_dump
from stepscope.pipeline.inputs.update_files.tokens import TokenReader, Told
from stepscope.policy.loss.estimators import with_advantages
from stepscope.policy.loss.registry import of_preferences
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.stats import Estimate

_KINDS = {
    "trl": "TRL's log of completions",
    "verl": "verl's rollout dump",
    "slime": "slime's rollout dump",
    "prime-rl": "prime-rl's rollouts",
    "table": "a table",
}


@dataclass(frozen=True)
class GivenBatch:
    """An update batch from a file.

    Attributes:
        rollouts: the batch, with log-probs and entropies of the policy that is measured.
        figures: differences between what the file gives and what is computed here, for ``summary.json``.
        notes: what a user should know of it, a sentence each.
    """

    rollouts: Rollouts
    figures: dict[str, Estimate] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def update_from_file(policy: Policy, source: Path, *, step: int | None, budget: Budget) -> GivenBatch:
    """Read the batch of the step that a checkpoint takes next.

    Token ids are those logged, or those of the text (:class:`TokenReader`); advantages those logged, or those
    of the rewards by the settings' scaling; log-probs and entropies are this policy's. Old log-probs that are
    logged enter the ratio of the loss; other logged log-probs, and advantages beside rewards, are compared.

    Args:
        policy: the checkpoint, with its tokenizer.
        source: a file or folder, see :func:`read_dump`.
        step: the optimizer step whose rows are wanted; None for the next one.
        budget: of the forward pass.

    Raises:
        BatchError: the file cannot be read, has no rows of the step, or holds something else than the step's
            responses.
    """
    if policy.tokenizer is None:
        raise BatchError(f"{source}: this policy has no tokenizer to read it with; load it from a checkpoint")
    dump = read_dump(source, next_step=_next_step(policy), chosen=step)
    refuse_other_rows(policy, dump)
    rows = in_loss(policy, logged(dump, reward_functions(policy), reward_weights(policy)))
    reader = TokenReader(policy, stripped=dump.kind == "verl")
    told = [reader.tell(row) for row in rows]
    of_step = "" if dump.step is None else f" of step {dump.step}"
    notes = [f"{_KINDS[dump.kind]}, {len(rows)} responses{of_step}", *_on_tokens(told)]
    batch, more = _assembled(policy, dump, rows, told)
    logprobs, entropies = score_rollouts(policy, batch, budget=budget)
    batch = replace(
        batch,
        logprobs=logprobs,
        entropies=entropies,
        old_logprobs=_all_or_none(rows, "old_logprobs"),
        sampler_logprobs=_all_or_none(rows, "logprobs"),
    )
    refuse_later_update(policy, dump, batch)
    figures = logprob_figures(batch, [row.logprobs for row in rows], "logprob") | logprob_figures(
        batch, [row.old_logprobs for row in rows], "old_logprob"
    )
    if any(t.from_text for t in told) and (found := length_figure(policy, batch, dump.step)):
        figures["update_length_difference"] = found
    refuse_odd_groups(policy, batch, rows)
    batch, scaled, further = _with_advantages(policy, batch, rows)
    figures |= scaled
    doubts = [f"{figure.reason} ({name})" for name, figure in figures.items() if not figure.reliable]
    return GivenBatch(batch, figures, (*notes, *more, *further, *doubts))


def _next_step(policy: Policy) -> int:
    """As the trainer counts: TRL its optimizer's steps, verl its batches, which name its folders."""
    parts = () if policy.path is None else reversed(policy.path.resolve().parts)
    named = (re.fullmatch(r"global_step_(\d+)", part) for part in parts)
    return next((int(found[1]) for found in named if found), policy.step) + 1


def _on_tokens(told: Sequence[Told]) -> list[str]:
    notes = []
    if retold := [t.retold for t in told if t.retold is not None]:
        notes.append(
            f"{retold.count(False)} of {len(retold)} texts do not give their logged ids when tokenized again"
        )
    if from_text := sum(t.from_text for t in told):
        cut = sum(t.truncated for t in told)
        notes.append(
            f"the tokens of {from_text} responses are those of their text, with the end token put back to "
            f"all but {cut} that were cut; a response sampled in other tokens, or with special tokens "
            "inside, leaves no trace in a text"
        )
    return notes


def _assembled(
    policy: Policy, dump: Dump, rows: Sequence[Logged], told: Sequence[Told]
) -> tuple[Rollouts, list[str]]:
    """The batch without numbers of the policy and without advantages."""
    notes = []
    size = policy.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    for row, t in zip(rows, told, strict=True):
        if odd := [token for token in (*t.prompt.token_ids, *t.ids) if not 0 <= token < size]:
            raise BatchError(
                f"{row.where}: token {odd[0]}, and the model knows 0 to {size - 1}; the dump is of another "
                "model"
            )
    given = [row.reward for row in rows]
    rewards = np.array([np.nan if r is None else r for r in given], dtype=np.float64)
    if np.isnan(rewards).any():
        if not np.isnan(rewards).all():
            i = int(np.isnan(rewards).argmax())
            raise BatchError(f"{rows[i].where}: no reward, and other rows have one; give all or none")
        values = [row.level for row in rows]
        if any(value is None for value in values):
            raise BatchError(f"{dump.path}: neither rewards nor advantages; give one of them")
        rewards = np.array(values, dtype=np.float64)
        notes.append("no rewards are logged; advantages stand in their place")
    if any(row.correct is None for row in rows) and not of_preferences(policy.settings.loss_type):
        notes.append("responses count as correct where their reward is above 0")
    correct = [r > 0 if row.correct is None else row.correct for r, row in zip(rewards, rows, strict=True)]
    zeros = tuple(np.zeros(len(t.ids)) for t in told)
    batch = Rollouts(
        prompt_ids=_groups(dump, rows, told, policy.settings.group_size),
        prompts=tuple(t.prompt.text for t in told),
        responses=tuple(t.response for t in told),
        prompt_token_ids=tuple(t.prompt.token_ids for t in told),
        response_token_ids=tuple(t.ids for t in told),
        rewards=rewards,
        correct=np.array(correct, dtype=np.bool_),
        truncated=np.array([t.truncated for t in told], dtype=np.bool_),
        logprobs=zeros,
        entropies=zeros,
        temperature=policy.settings.temperature,
        max_response_tokens=policy.settings.max_response_tokens,
        questions=tuple(t.question for t in told),
    )
    if all(t.mask is None or t.mask.all() for t in told):
        return batch, notes
    masks = tuple(np.ones(len(t.ids), dtype=np.bool_) if t.mask is None else t.mask for t in told)
    return replace(batch, response_masks=masks), notes


def _groups(dump: Dump, rows: Sequence[Logged], told: Sequence[Told], size: int) -> tuple[str, ...]:
    """Ids of the groups: as logged; else blocks of the run's size with one prompt each; else by prompt."""
    if all(row.group is not None for row in rows):
        return tuple(f"{dump.path.stem}/{row.group}" for row in rows)
    prompts = [t.prompt.token_ids for t in told]
    blocks = [prompts[k : k + size] for k in range(0, len(prompts), size)]
    if all(len(block) == size and len(set(block)) == 1 for block in blocks):
        return tuple(f"{dump.path.stem}/{k // size}" for k in range(len(prompts)))
    numbers: dict[Any, int] = {}
    return tuple(f"{dump.path.stem}/{numbers.setdefault(p, len(numbers))}" for p in prompts)


def _with_advantages(
    policy: Policy, batch: Rollouts, rows: Sequence[Logged]
) -> tuple[Rollouts, dict[str, Estimate], list[str]]:
    """The batch with advantages: those logged, or those of the rewards; and how far the two are apart."""
    given = [row.level for row in rows]
    settings = policy.settings
    how = settings.advantage_estimator or f"GRPO's, scaled by {settings.scale_rewards}"
    if all(value is None for value in given):
        note = f"advantages are those of the rewards ({how})"
        if of_preferences(settings.loss_type):
            note = "rewards say which response of a pair is chosen"
        return with_advantages(batch, settings), {}, [note]
    if None in given:
        i = given.index(None)
        raise BatchError(f"{rows[i].where}: no advantage, and other rows have one; give all or none")
    theirs = np.array(given, dtype=np.float64)
    per_token = _all_or_none(rows, "token_advantages")
    logged_ones = replace(batch, advantages=theirs, token_advantages=per_token)
    if any(row.reward is None for row in rows):
        return logged_ones, {}, []
    try:
        ours = with_advantages(batch, settings).advantages
    except ConfigError as error:  # of more than rewards
        return logged_ones, {}, [f"advantages are the logged ones ({error})"]
    assert ours is not None
    apart = float(np.abs(theirs - ours).max())
    close = apart <= 1e-3 * max(1.0, float(np.abs(ours).max()))
    figure = Estimate(
        apart,
        float("nan"),
        len(rows),
        "advantage",
        f"largest |logged advantage - that of the logged rewards ({how})|; the logged ones are used",
        reliable=close,
        reason="" if close else "the logged advantages are not those of the logged rewards by the settings",
    )
    return logged_ones, {"update_advantage_difference": figure}, []


def _all_or_none(rows: Sequence[Logged], name: str) -> tuple[FloatArray, ...] | None:
    values = [getattr(row, name) for row in rows]
    if all(value is None for value in values):
        return None
    if any(value is None for value in values):
        i = next(i for i, value in enumerate(values) if value is None)
        raise BatchError(f"{rows[i].where}: no {name}, and other rows have some; give all or none")
    return tuple(values)
