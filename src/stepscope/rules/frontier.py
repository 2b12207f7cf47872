"""The frontier as an intervention: sequences reweighted for the most reward at a given loss of entropy."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np
from pydantic import Field

from stepscope.errors import MeasurementError
from stepscope.results import FloatArray
from stepscope.rules.interventions import Intervention
from stepscope.rules.tokens import Tokens


class FrontierWeights(Intervention):
    """Frontier: before every step sequences get the weights that buy most reward at a given loss of entropy.

    Influences on entropy and expected reward are measured on a fresh probe batch, as for ``influence``, but
    of whole sequences, from folds of the probe, and over a batch's lifetime in the optimizer's first moment:
    what one step shows of its own batch is (1 - b1) of that. Then the program of
    :mod:`stepscope.rules.program` is solved. Where no weights keep the entropy, those that lose least are
    taken.

    Source: :mod:`stepscope.rules.program`; no published method.

    Attributes:
        max_loss: nats per token of entropy that a batch may cost, by its own gradient.
        most: largest weight of a sequence.
        caution: standard errors that a predicted gain over the plain step is counted less.
        num_prompts: prompts of the probe batch, of the training split, with one response each.
        folds: parts of the probe, for errors.
    """

    measures = True

    name: Literal["frontier"] = "frontier"
    max_loss: float = Field(default=0.0, ge=0)
    most: float = Field(default=2.0, ge=1)
    caution: float = Field(default=1.0, ge=0)
    num_prompts: int = Field(default=64, ge=2)
    folds: int = Field(default=16, ge=2)

    def weights(self, tokens: Tokens) -> FloatArray:
        """(seq,) x.

        Raises:
            MeasurementError: the table has no program.
        """
        if tokens.program is None:
            raise MeasurementError(
                "frontier: the objective needs every sequence's influence on entropy and reward, got none; "
                "pass those of measure.frontier.before_step"
            )
        program = replace(tokens.program, most=self.most, caution=self.caution)
        if not len(program.gram):
            return np.ones(len(tokens.advantages))
        best = program.solve(aim="entropy")
        if program.sure("entropy", best) > -self.max_loss:
            best = program.solve(aim="reward", at_least=-self.max_loss, start=best)
        return program.spread(best)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A times its sequence's weight."""
        return np.asarray(tokens.advantage * self.weights(tokens)[tokens.sequence])
