"""What a batch of responses must hold to be one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from stepscope.errors import BatchError
from stepscope.results.records import BoolArray

if TYPE_CHECKING:
    from stepscope.results.rollouts import Rollouts

_NUMBERS = (
    *("logprobs", "entropies", "token_advantages", "old_logprobs"),
    *("decoding_logprobs", "kept_masses"),
)
_PER_TOKEN = (*_NUMBERS, "sampler_logprobs", "response_masks")
_PER_SEQUENCE = (
    "prompts",
    "responses",
    "prompt_token_ids",
    "response_token_ids",
    "rewards",
    "correct",
    "truncated",
    "advantages",
    "questions",
    *_PER_TOKEN,
)


def refuse_broken(rollouts: Rollouts) -> None:
    """Refuse fields of different length, numbers that are not finite, and responses not of the policy.

    Raises:
        BatchError: naming the field and the sequence.
    """
    for name in _PER_SEQUENCE:
        values = getattr(rollouts, name)
        if values is not None and len(values) != len(rollouts):
            raise BatchError(
                f"rollouts: {name} has {len(values)} entries, expected {len(rollouts)}, one per sequence"
            )
    for name in _PER_TOKEN:
        for i, values in enumerate(getattr(rollouts, name) or ()):
            if len(values) != (count := len(rollouts.response_token_ids[i])):
                raise BatchError(
                    f"rollouts: sequence {i} has {len(values)} {name} for {count} response tokens"
                )
    refuse_values(rollouts, np.isinf(rollouts.rewards), "rewards")
    if rollouts.advantages is not None:
        refuse_values(rollouts, ~np.isfinite(rollouts.advantages), "advantages")
    for name in _NUMBERS:
        rows = getattr(rollouts, name)
        if rows and not np.isfinite(np.concatenate(rows)).all():
            i = next(i for i, row in enumerate(rows) if not np.isfinite(row).all())
            position = int(np.flatnonzero(~np.isfinite(rows[i]))[0])
            raise BatchError(
                f"rollouts: sequence {i} ({rollouts.prompt_ids[i]}), response token {position}: {name} holds "
                f"{rows[i][position]}, expected a finite number; sample the batch again"
            )
    _refuse_masks(rollouts)


def refuse_values(rollouts: Rollouts, broken: BoolArray, name: str) -> None:
    """Refuse a number per sequence that is not one.

    Args:
        rollouts: the batch.
        broken: (seq,) where the number is none.
        name: field of the numbers.

    Raises:
        BatchError: naming the first sequence.
    """
    if broken.any():
        i = int(np.flatnonzero(broken)[0])
        raise BatchError(
            f"rollouts: sequence {i} ({rollouts.prompt_ids[i]}): {name} holds {getattr(rollouts, name)[i]}, "
            "expected a finite number; mend the scores, or leave the sequence out"
        )


def _refuse_masks(rollouts: Rollouts) -> None:
    for i, mask in enumerate(rollouts.response_masks or ()):
        if not mask.any():
            raise BatchError(
                f"rollouts: sequence {i} ({rollouts.prompt_ids[i]}): its response mask has no token that the "
                "policy wrote; leave the sequence out"
            )
        for name in ("logprobs", "entropies"):
            if np.any(getattr(rollouts, name)[i][~mask]):
                raise BatchError(
                    f"rollouts: sequence {i} ({rollouts.prompt_ids[i]}): {name} of tokens that the policy "
                    "did not write are not 0, and they have none; set them to 0"
                )
