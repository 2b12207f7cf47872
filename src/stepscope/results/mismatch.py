"""``sampler.json``: how far what drew the batches is from the policy that is measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from stepscope.results.records import Record
from stepscope.stats import Estimate, Number


@dataclass(frozen=True)
class WorstToken(Record):
    """A token whose two log-probs are far apart.

    Attributes:
        sequence_id: its sequence.
        position: from 0 in the response.
        token_id: id.
        logprob: of the policy, in nats.
        sampler_logprob: of what drew it, in nats.
    """

    sequence_id: int
    position: int
    token_id: int
    logprob: Number
    sampler_logprob: Number


@dataclass(frozen=True, repr=False)
class SamplerMismatch(Record):
    """Sampler q against policy pi on one batch that q drew; errors clustered by prompt.

    Attributes:
        figures: by name, see :func:`stepscope.measure.mismatch.sampler_mismatch`.
        worst: the tokens with the largest |log q - log pi|, largest first.
        doubt: why the batch is not one of the policy's own; empty where it can pass for one.
    """

    figures: Mapping[str, Estimate]
    worst: tuple[WorstToken, ...]
    doubt: str


@dataclass(frozen=True, repr=False)
class SamplerReport(Record):
    """Sampler against policy, of every batch that the policy itself did not draw.

    Attributes:
        settings: of the sampler, by name; empty where the batch comes from a file.
        batches: batch name (``update``, ``probe``) to its mismatch.
    """

    settings: Mapping[str, str]
    batches: Mapping[str, SamplerMismatch]
