"""The published token rules, once: what training changes in its loss by them, and criteria score tokens by.

All of them are functions of one table of plain arrays; no torch, no gradient.
"""

from __future__ import annotations

from stepscope.rules.applied import intervention_from_record, token_advantages
from stepscope.rules.frontier import FrontierWeights
from stepscope.rules.interventions import (
    UNCLIPPED,
    ClipCov,
    DiscriminatorClipping,
    EntropyBonus,
    InfluenceClipping,
    Intervention,
    KlCov,
    Reweighting,
    ScopedIntervention,
    Steer,
    TopEntropy,
)
from stepscope.rules.left_out import TokenRule, Without
from stepscope.rules.tokens import TokenFacts, Tokens, covariance, largest

__all__ = [
    "UNCLIPPED",
    "ClipCov",
    "DiscriminatorClipping",
    "EntropyBonus",
    "FrontierWeights",
    "InfluenceClipping",
    "Intervention",
    "KlCov",
    "Reweighting",
    "ScopedIntervention",
    "Steer",
    "TokenFacts",
    "TokenRule",
    "Tokens",
    "TopEntropy",
    "Without",
    "covariance",
    "intervention_from_record",
    "largest",
    "token_advantages",
]
