"""What makes the responses of a dump others than those of the step: refused, with what to do."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from stepscope.errors import BatchError
from stepscope.pipeline.inputs.update_files.checks import evaluated, steps_on_a_generation
from stepscope.pipeline.inputs.update_files.fields import Logged
from stepscope.pipeline.inputs.update_files.rows import Dump
from stepscope.policy.loss.registry import loss_named
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.state import Policy
from stepscope.results import Rollouts


def refuse_other_rows(policy: Policy, dump: Dump) -> None:
    """Refuse a log of TRL or verl that holds more or fewer responses than the step, or others.

    Both log what was sampled together, which may be cut into several steps; TRL keeps the last generation
    alone (``generation_batch_size`` rows), and an evaluation writes its responses over those of its step.

    Raises:
        BatchError: saying which of these it is.
    """
    if dump.kind not in ("trl", "verl"):
        return
    size = policy.settings.group_size
    expected = policy.settings.prompts_per_step * size
    count = len(dump.rows)
    if count > expected:
        raise BatchError(
            f"{dump.path}: {count} responses were sampled together, and the run takes {expected} for a step; "
            "which of them made the next one is not in the file. Give a table of those, with old_logprobs "
            "where it was not the first step on them, or say "
            f"loss.prompts_per_step={count // size} if one step took all"
        )
    if count < expected:
        raise BatchError(
            f"{dump.path}: {count} responses, and the run takes {expected} for a step; TRL logs the last "
            "generation of a step alone (steps_per_generation below gradient_accumulation_steps), or the "
            "file was cut. Give a table of all of them, or say "
            f"loss.prompts_per_step={max(1, count // size)} if the step took no more"
        )
    if dump.kind == "verl" or dump.step is None:
        return
    first = dump.step - (dump.step - 1) % steps_on_a_generation(policy)
    for step in range(first, dump.step + 1):
        if evaluated(policy, step):
            raise BatchError(
                f"{dump.path}: the run evaluated after step {step}, and TRL writes the responses of an "
                "evaluation over those of the training; give a table of the batch, or measure another step"
            )


def refuse_later_update(policy: Policy, dump: Dump, batch: Rollouts) -> None:
    """Refuse a later update on a batch that brings no log-probs from before the first; verl counts batches.

    Raises:
        BatchError: the step is not on policy, and nothing says what its loss divides by.
    """
    updates = steps_on_a_generation(policy)
    done = policy.step % updates
    if done and dump.kind in ("trl", "table") and batch.old_logprobs is None:
        raise BatchError(
            f"{dump.path}: the next step is the update {done + 1} of {updates} on its batch, and its loss "
            "divides by the log-probs before the first one; give them in a column old_logprobs, or measure "
            "the checkpoint before the first update"
        )


def in_loss(policy: Policy, rows: Sequence[Logged]) -> list[Logged]:
    """The rows without responses that a mask takes out of the loss as a whole.

    Raises:
        BatchError: the batch without them would make another step, or nothing is left.
    """
    kept = [row for row in rows if row.mask is None or row.mask.any()]
    if len(kept) == len(rows):
        return kept
    odd = next(row for row in rows if row.mask is not None and not row.mask.any())
    why = f"{odd.where}: its mask takes the whole response out of the loss"
    if not kept:
        raise BatchError(f"{why}, and so do those of all others; give the masks of another batch")
    if any(row.level is None for row in kept):
        raise BatchError(
            f"{why}, and without advantages in the file those of its group cannot be told; log advantages"
        )
    if _counts_responses(policy.settings):
        raise BatchError(
            f"{why}, and the average of {policy.settings.loss_type} counts it all the same; if it left the "
            "loss because it was cut, log it with truncated=true and without that mask, and give "
            "loss.mask_truncated=true"
        )
    return kept


def _counts_responses(settings: StepSettings) -> bool:
    """Whether the weight of a token in the loss depends on how many responses have none in it."""
    loss = loss_named(settings.loss_type)
    name = settings.aggregation or loss.aggregation
    size, step = settings.micro_batch_size, settings.group_size * settings.prompts_per_step
    if name == "piece-token-mean":
        return size is not None and size < step
    return loss.own_average or name not in ("token-mean", "token-sum")


def refuse_odd_groups(policy: Policy, batch: Rollouts, rows: Sequence[Logged]) -> None:
    """Refuse to compare rewards within groups that are told by their prompts and are none of the run's.

    Raises:
        BatchError: equal prompts are more or fewer than a group of the run.
    """
    size = policy.settings.group_size
    if all(row.group is not None for row in rows) or any(row.level is not None for row in rows):
        return
    counts = np.bincount(batch.group_index)
    if (counts != size).any():
        i = int(np.flatnonzero(counts[batch.group_index] != size)[0])
        raise BatchError(
            f"{rows[i].where}: its prompt has {counts[batch.group_index[i]]} responses in the file, and a "
            f"group of the run has {size}, so that its baseline cannot be told; give advantages, a column "
            "prompt_id, or loss.group_size"
        )
