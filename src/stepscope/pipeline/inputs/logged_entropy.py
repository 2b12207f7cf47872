"""The entropy of sampled responses against the one that the training logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepscope.policy.check.health.entropy import logged_entropy
from stepscope.policy.state import Policy
from stepscope.stats import Estimate

KEY = "entropy_logged"
"""Key of the provenance: what was logged, and what it makes of the measured entropy."""


def entropy_against_log(policy: Policy, entropy: Estimate) -> Mapping[str, Any] | None:
    """What the trainer logged up to the checkpoint's step, and how the entropy measured differs from it.

    Args:
        policy: whose checkpoint may have the trainer's log.
        entropy: of responses that it wrote itself, at its own temperature; nats per token.

    Returns:
        Fields of :class:`stepscope.policy.check.health.entropy.LoggedEntropy`, and ``doubt``, which is empty
        where the two agree; None where nothing is logged.

    Raises:
        CheckpointError: the log is damaged.
    """
    logged = None if policy.path is None else logged_entropy(policy.path, policy.step)
    return None if logged is None else {**logged.to_plain(), "doubt": logged.doubt(entropy)}
