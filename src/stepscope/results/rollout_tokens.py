"""The response tokens of a batch, a row each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stepscope.results.records import BoolArray, FloatArray, IntArray
from stepscope.results.tables import Table, TextArray


@dataclass(frozen=True, repr=False)
class RolloutTokens(Table):
    """``update_tokens.parquet``, ``probe_tokens.parquet``: a row per response token of a batch.

    Attributes:
        sequence_id: its sequence.
        position: from 0 in the response.
        token_id: id.
        token: what it adds to the text.
        logprob: log-prob at the sampling temperature, in nats; 0 for a token that the policy did not write.
        entropy: of the policy before it, in nats; 0 likewise.
        response_mask: True where the policy wrote it, False where a tool or an environment did; None where
            the policy wrote all.
        advantage: of the token; None where all tokens of a response have the response's.
        old_logprob: log-prob of the policy that the loss divides by; None where that is ``logprob``.
        sampler_logprob: of what the sampler drew it from; None where that is not known, or the policy itself.
        decoding_logprob: the same as this policy has it, at the sampler's temperature and truncation; None
            where those are the policy's, or not known.
        kept_mass: S_k, the policy's probability of all that truncation keeps; None without, or not known.
        token_weight: w_k = -dLoss/dl_k; None before, or without, a step that the batch makes.
        entropy_weight: -dLoss/dH_k; None where the loss sees no entropy.
    """

    format_version: ClassVar[int] = 2

    sequence_id: IntArray
    position: IntArray
    token_id: IntArray
    token: TextArray
    logprob: FloatArray
    entropy: FloatArray
    response_mask: BoolArray | None = None
    advantage: FloatArray | None = None
    old_logprob: FloatArray | None = None
    sampler_logprob: FloatArray | None = None
    decoding_logprob: FloatArray | None = None
    kept_mass: FloatArray | None = None
    token_weight: FloatArray | None = None
    entropy_weight: FloatArray | None = None
