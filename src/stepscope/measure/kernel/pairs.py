"""What a forward pass, or none, says of pairs of responses: the inputs of models of the kernel."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import numpy as np

from stepscope.measure.kernel.last_layer import layer_kernels, sequence_kernel
from stepscope.measure.kernel.structure import cosine_form, shared_prefix_length
from stepscope.policy.last_layer import LastLayer, last_layer, layer_states
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import BoolArray, Brief, FloatArray, IntArray, Rollouts

KINDS = ("diagonal", "same_prompt", "different_prompts")


@dataclass(frozen=True, repr=False)
class Pairs(Brief):
    """Pairs of the sequences of a batch.

    Attributes:
        prompts: (seq,) prompt of each sequence.
        kinds: kind of pair to (seq, seq) True where it is.
        texts: (feature, seq, seq) without a forward pass: 1, product and sum of the numbers of tokens,
            tokens shared from the start (of one prompt), its share of the shorter response, tokens in common
            as bags.
        layers: (layer, seq, seq) :func:`stepscope.measure.kernel.last_layer.layer_kernels`.
        last: metric to (seq, seq) kernel of the last layer.
    """

    prompts: IntArray
    kinds: dict[str, BoolArray]
    texts: FloatArray
    layers: FloatArray
    last: dict[str, FloatArray]

    def inputs(self) -> FloatArray:
        """(seq, seq, feature) for regressions: cosines in every layer, shares of tokens, kind of pair."""
        cosines = [cosine_form(K) for K in self.layers]
        sizes = np.log(self.texts[1])
        share, bags = self.texts[4], self.texts[5] / np.sqrt(self.texts[1])
        same = ~self.kinds["different_prompts"]
        return np.stack([*cosines, sizes, share, bags, same, self.kinds["diagonal"]], -1).astype(np.float64)


def pairs_of(
    policy: Policy,
    rollouts: Rollouts,
    metrics: dict[str, ParameterVector | None],
    *,
    budget: Budget = Budget(),
) -> tuple[Pairs, LastLayer]:
    """All pairs of a batch, and its last layer: two forward passes, without gradients.

    Args:
        policy: whose head is a plain linear layer.
        rollouts: the sequences.
        metrics: name to P by parameter, or None for the identity.
        budget: what may be used at a time.

    Raises:
        UnknownHeadError: the head is no plain linear layer.
    """
    layer = last_layer(policy, rollouts, budget=budget)
    states = layer_states(policy, rollouts, budget=budget)
    prompts = rollouts.prompt_index
    same, own = prompts[:, None] == prompts[None, :], np.eye(len(rollouts), dtype=np.bool_)
    kinds = dict(zip(KINDS, (own, same & ~own, ~same), strict=True))
    pairs = Pairs(
        prompts=prompts,
        kinds=kinds,
        texts=_texts(rollouts),
        layers=layer_kernels(layer, rollouts, states),
        last=sequence_kernel(layer, rollouts, metrics),
    )
    return pairs, layer


def _texts(rollouts: Rollouts) -> FloatArray:
    """(feature, seq, seq) of the ids of tokens that the policy wrote."""
    responses, prompts, written = rollouts.response_token_ids, rollouts.prompt_index, rollouts.written
    count = len(responses)
    lengths = rollouts.num_policy_tokens.astype(np.float64)
    bags = [Counter(np.array(row)[mask].tolist()) for row, mask in zip(responses, written, strict=True)]
    prefix, common = np.zeros((count, count)), np.zeros((count, count))
    for i in range(count):
        for j in range(i + 1):
            common[i, j] = common[j, i] = (bags[i] & bags[j]).total()
            if prompts[i] == prompts[j]:
                shared = shared_prefix_length(responses[i], responses[j])
                prefix[i, j] = prefix[j, i] = written[i][:shared].sum()
    shorter = np.minimum.outer(lengths, lengths)
    return np.stack(
        [
            np.ones((count, count)),
            np.outer(lengths, lengths),
            np.add.outer(lengths, lengths),
            prefix,
            prefix / shorter,
            common,
        ]
    )
