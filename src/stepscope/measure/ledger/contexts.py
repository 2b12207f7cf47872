"""Contexts: what a position stands behind, a prompt and the response up to there; and who is kin to whom.

A position of a response is a state of the policy only by its context, so that positions with equal contexts
are one, in whichever response they are. Kin of a token is, each without those before it: its own context;
the contexts that its response goes through; those of its prompt; those of other prompts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.results.kinship import OTHER_PROMPTS, SAME_POSITION, SAME_PROMPT, SAME_RESPONSE


class Contexts:
    """Numbers of contexts and prompts, the same for the same in whatever batch they occur.

    Attributes:
        update: the batch whose tokens have kin.
        prompts: (seq,) its prompts, 0, 1, ... in their order; by their ids, which is what the policy sees.
    """

    def __init__(self, update: Rollouts) -> None:
        self._prompts: dict[tuple[int, ...], int] = {}
        self._nodes: dict[tuple[int, int], int] = {}
        self.update = update
        self.prompts = self.prompts_of(update)

    @cached_property
    def own(self) -> tuple[IntArray, ...]:
        """Those of the batch; see :meth:`of`."""
        return self.of(self.update)

    @property
    def num_prompts(self) -> int:
        """Prompts of the batch."""
        return int(self.prompts.max()) + 1

    def prompts_of(self, rollouts: Rollouts) -> IntArray:
        """(seq,) number of each sequence's prompt; prompts that are not the batch's have larger ones."""
        known = self._prompts
        numbers = [known.setdefault(ids, len(known)) for ids in rollouts.prompt_token_ids]
        return np.array(numbers, dtype=np.int64)

    def of(self, rollouts: Rollouts) -> tuple[IntArray, ...]:
        """Per sequence (tok,) the context of each position of the response."""
        found = []
        for prompt, ids in zip(self.prompts_of(rollouts), rollouts.response_token_ids, strict=True):
            node, row = self._node(-1 - int(prompt), -1), np.empty(len(ids), dtype=np.int64)
            for k, token in enumerate(ids):
                row[k] = node
                node = self._node(node, token)
            found.append(row)
        return tuple(found)

    def _node(self, behind: int, token: int) -> int:
        return self._nodes.setdefault((behind, token), len(self._nodes))


@dataclass(frozen=True)
class Kindred:
    """How often the contexts of a batch occur among the positions of a look.

    Attributes:
        at: per sequence of the batch (tok,) positions of the look that have the context of each token; 0 at
            tokens that the policy did not write.
        positions: number of positions of the look.
        by_prompt: (prompt of the batch,) those in answers to each.
    """

    at: tuple[FloatArray, ...]
    positions: int
    by_prompt: IntArray

    @classmethod
    def of(cls, contexts: Contexts, look: Rollouts) -> Kindred:
        """Count them."""
        own, theirs = contexts.own, look.flat(contexts.of(look))
        answered = contexts.prompts_of(look)[look.places[0]]
        most = max(int(row.max()) for row in own if len(row))
        counts = np.bincount(theirs, minlength=most + 1)
        at = tuple(
            np.where(mask, counts[row], 0).astype(np.float64)
            for row, mask in zip(own, contexts.update.written, strict=True)
        )
        there = np.bincount(answered, minlength=contexts.num_prompts)[: contexts.num_prompts]
        return cls(at, len(theirs), there.astype(np.int64))

    def pairs(self, contexts: Contexts, weights: Sequence[FloatArray]) -> dict[str, IntArray]:
        """Pairs of a token with a weight and a position of the look, by kin.

        Returns:
            (2, prompt) of each kin: those of the tokens of each prompt, and those at the positions of each
            prompt with tokens of others.
        """
        pushing = [np.asarray(row) != 0 for row in weights]
        rows = zip(self.at, pushing, strict=True)
        sums = np.array([[push.sum(), at[push].sum(), push.sum() * at.sum()] for at, push in rows])
        many, near, path = (
            np.bincount(contexts.prompts, weights=row, minlength=contexts.num_prompts).astype(np.int64)
            for row in sums.T
        )
        asked, nothing = many * self.by_prompt, np.zeros_like(many)
        others = np.stack([many * self.positions - asked, many.sum() * self.by_prompt - asked])
        return {
            SAME_POSITION: np.stack([near, nothing]),
            SAME_RESPONSE: np.stack([path - near, nothing]),
            SAME_PROMPT: np.stack([asked - path, nothing]),
            OTHER_PROMPTS: others,
        }


def first_of(numbers: IntArray) -> IntArray:
    """(number,) where each of 0, 1, ... occurs first."""
    return np.unique(numbers, return_index=True)[1].astype(np.int64)
