"""What a criterion is, and the registry of those that are known.

A criterion is a function of the token table alone, a score that claims to know, without a gradient, which
tokens or sequences move the entropy. Signed criteria predict the first-order change of the entropy, c > 0
raises it; magnitude criteria (masks, weights, norms) only say where the large effects are. With
S_v = pi_v (log pi_v + H), dH/dz_v = -S_v and M = E_{v~pi} S_v, all signed ones of the literature are A times
a function of p, H and M at the token's own position: the same tabular quantity under different ideas of how
one token's gradient moves the logits.

A third kind is what a model of the kernel predicts (``models.py``): it knows what a token does at other
positions, and needs more of a forward pass than the table has.

A new one is a function with a decorator, :func:`literature` or :func:`control`, in ``tokens.py`` or
``sequences.py``, or ``predicts`` in ``models.py``. One of a user's own is a :class:`Criterion` around a
function; give it to ``rank_criteria`` beside, or instead of, :func:`known_criteria`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np

from stepscope.errors import MeasurementError
from stepscope.results import FloatArray
from stepscope.results.criteria import CriterionDefinition, Kind, Level, Target
from stepscope.rules import TokenFacts

Score = Callable[[TokenFacts], FloatArray]

_SIGN: dict[Target, str] = {
    "signed": "c > 0: predicted to raise the entropy",
    "magnitude": "none: 1 where the rule acts",
}


@dataclass(frozen=True)
class Criterion:
    """A named score; the fields without a line here are those of its :class:`CriterionDefinition`.

    Attributes:
        name: column of ``criteria_tokens.parquet``.
        score: the function; returns (tok,) values, or (seq,) for the level ``sequence``.
        needs: entry of :attr:`stepscope.rules.TokenFacts.modelled` that it reads; without that it is not
            ranked. Empty where the table suffices.
    """

    name: str
    score: Score
    formula: str
    sign: str = _SIGN["signed"]
    paper: str = ""
    equation: str = ""
    verified: bool = True
    level: Level = "token"
    kind: Kind = "literature"
    target: Target = "signed"
    needs: str = ""

    def __call__(self, facts: TokenFacts) -> FloatArray:
        """The score of every token (or sequence) of a batch.

        Raises:
            MeasurementError: the function returned another number of values, or one that is not finite.
        """
        found = np.asarray(self.score(facts), dtype=np.float64)
        expected = len(facts) if self.level == "token" else len(facts.advantages)
        if found.shape != (expected,):
            raise MeasurementError(
                f"criterion {self.name}: returned shape {found.shape}, expected ({expected},), one value per "
                f"{self.level}; mend its function"
            )
        if not np.isfinite(found).all():
            raise MeasurementError(
                f"criterion {self.name}: {int((~np.isfinite(found)).sum())} of its values are not finite; "
                "mend its function"
            )
        return found

    def definition(self) -> CriterionDefinition:
        """What the page says about it."""
        return CriterionDefinition(**{f.name: getattr(self, f.name) for f in fields(CriterionDefinition)})


_KNOWN: dict[str, Criterion] = {}


def known_criteria() -> tuple[Criterion, ...]:
    """All criteria of the literature and all controls, of tokens, then of sequences; then the models.

    Not among them, because no equation of theirs was read: the shaping by perplexity and position of
    2508.02260. Not among them, because a token table does not determine them: divergences between tokens'
    distributions (2606.19771) and global entropy bonuses (2505.22312), which score no token.
    """
    return tuple(sorted(_KNOWN.values(), key=lambda c: (c.kind == "model", c.level == "sequence")))


def literature(
    formula: str,
    paper: str,
    equation: str,
    *,
    target: Target = "signed",
    sign: str | None = None,
    verified: bool = True,
    level: Level = "token",
) -> Callable[[Score], Score]:
    """Make a function a criterion of the literature, under its own name; see :class:`CriterionDefinition`."""

    def register(score: Score) -> Score:
        name = score.__name__
        said = _SIGN[target] if sign is None else sign
        _KNOWN[name] = Criterion(
            name, score, formula, said, paper, equation, verified, level=level, target=target
        )
        return score

    return register


def control(name: str, score: Score, formula: str, target: Target, level: Level = "token") -> None:
    """Add a control: a trivial score that a criterion has to beat before it has shown anything.

    Its orientation is chosen with hindsight when criteria are compared with it.
    """
    sign = "either, chosen with hindsight" if target == "signed" else "none: larger says more effect"
    _KNOWN[name] = Criterion(name, score, formula, sign, level=level, kind="control", target=target)


def model(name: str, formula: str) -> None:
    """Add what a model of the kernel predicts of each token's influence: an entry of ``facts.modelled``."""
    _KNOWN[name] = Criterion(name, lambda facts: facts.modelled[name], formula, kind="model", needs=name)
