"""Criteria: scores that claim to know, without a gradient, which tokens or sequences move the entropy.

A criterion is a function of the token table alone. Signed criteria predict the first-order change of the
entropy, c > 0 raises it; magnitude criteria (masks, weights, norms) only say where the large effects are.
With S_v = pi_v (log pi_v + H), dH/dz_v = -S_v and M = E_{v~pi} S_v, all signed ones of the literature are
A times a function of p, H and M at the token's own position: the same tabular quantity under different
ideas of how one token's gradient moves the logits.

A criterion of one's own is a :class:`Criterion` around a function over :class:`TokenFacts`; give it to
``rank_criteria`` beside, or instead of, :func:`known_criteria`.
"""

from __future__ import annotations

from stepscope.measure.criteria.controls import CONTROLS
from stepscope.measure.criteria.facts import Criterion, TokenFacts, token_facts
from stepscope.measure.criteria.sequences import SEQUENCES
from stepscope.measure.criteria.tokens import TOKENS

__all__ = ["Criterion", "TokenFacts", "known_criteria", "token_facts"]


def known_criteria() -> tuple[Criterion, ...]:
    """All criteria of the literature and all controls: of tokens, then of sequences.

    Not among them, because no equation of theirs was read: the shaping by perplexity and position of
    2508.02260. Not among them, because a token table does not determine them: divergences between tokens'
    distributions (2606.19771) and global entropy bonuses (2505.22312), which score no token.
    """
    return (*TOKENS, *CONTROLS, *SEQUENCES)
