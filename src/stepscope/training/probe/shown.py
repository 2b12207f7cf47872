"""What trackers see of a probe beside its figures: distributions over tokens, and responses in colour."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from stepscope.measure.change.online import Prediction
from stepscope.policy.texts import ResponseText
from stepscope.stats import Estimate
from stepscope.trackers import Entry, Responses, ShownResponse, strongest


def probe_entry(
    source: str, step: int, prediction: Prediction, figures: Mapping[str, Estimate], read: ResponseText
) -> Entry:
    """Histograms over the probe's tokens, and the responses whose entropy this step moves most.

    The number of a token is the predicted change of the entropy at its position by this step, lr times the
    derivative along it, at this prefix: what the step does to how often the prefix is met is not in it.

    Args:
        source: ``probe`` or ``probe/NAME``.
        step: optimizer step that was probed.
        prediction: of the probe.
        figures: of the probe, with their errors.
        read: reads the policy's responses.
    """
    rollouts = prediction.rollouts
    sequences, positions = rollouts.places
    flat = prediction.lr * prediction.slope.prefix[sequences, positions]
    changes = rollouts.rows(flat)
    shown = [
        ShownResponse(
            prompt=rollouts.prompts[i],
            tokens=read.by_token(rollouts.response_token_ids[i]),
            values=np.where(rollouts.written[i], changes[i], np.nan),
            facts={"change": float(changes[i].sum()), "reward": float(rollouts.rewards[i])},
        )
        for i in strongest(np.array([row.sum() for row in changes]))
    ]
    histograms = {
        "token_entropy": rollouts.flat(rollouts.entropies),
        "token_surprisal": -rollouts.flat(rollouts.logprobs),
        "token_change": flat,
        "response_length": rollouts.num_policy_tokens.astype(np.float64),
    }
    what = "predicted change of the entropy at the token by this step, nats"
    return Entry(source, step, {}, figures, histograms, Responses(what, True, shown))
