"""Kinship as stored: of a ledger, what a step adds to it, and of the step that a measurement is of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stepscope.results.frames import frame
from stepscope.results.records import FloatArray, IntArray, Record
from stepscope.results.tables import Table, TextArray
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate, Number

if TYPE_CHECKING:
    import pandas as pd

KINSHIP, KIN_ROWS = "ledger_kinship.json", "ledger_kinship.parquet"
"""Names of the files of a ledger."""

STEP_KINSHIP = "kinship.json"
"""That of a measurement."""

SAME_POSITION, SAME_RESPONSE, SAME_PROMPT = "same_position", "same_response", "same_prompt"
OTHER_PROMPTS, VISITATION = "other_prompts", "visitation"

KINS: Mapping[str, str] = {
    SAME_POSITION: "its own position",
    SAME_RESPONSE: "the rest of its response",
    SAME_PROMPT: "other responses to its prompt",
    OTHER_PROMPTS: "other prompts",
    VISITATION: "which prefixes are reached",
}
"""What a token acts on; the last is no position, but how often positions are come to."""

BATCH, FRESH, HELD_OUT = "batch", "fresh", "held_out"

LOOKS: Mapping[str, str] = {
    BATCH: "the batches' own positions",
    FRESH: "fresh responses to the batches' prompts",
    HELD_OUT: "responses to held-out prompts",
}
"""Where the entropy is looked at."""

WHOLE, OWN_STEP = "whole", "own_step"
"""The displacement a token has made: over the rest of the path, and in its own step."""

PLAIN, NATURAL = "plain", "natural"

FORMULAS: Mapping[str, str] = {
    PLAIN: "a plain step in the logits of the own position, -w (S - M)",
    NATURAL: "a natural step in the logits of the own position, -w (log p + H)",
}
"""What tabular theory says of a token: Wang 2602.03392, Theorem 3.3, and Cui 2505.22617, Theorem 2."""


@dataclass(frozen=True, repr=False)
class KinPart(Record):
    """What the tokens of one step did to the entropy of one look by one kin.

    Attributes:
        look: one of :data:`LOOKS`.
        kin: one of :data:`KINS`.
        through: ``whole`` or ``own_step``.
        done: (prompt,) by the tokens of each prompt of the batch.
        received: (prompt,) at the positions of each prompt, by tokens of others.
        groups: (group,) what each group of held-out prompts adds to the error; empty of other looks.
        draw_variance: of the sum, because a part of the tokens was drawn; 0 where none was.
    """

    look: str
    kin: str
    through: str
    done: FloatArray
    received: FloatArray
    groups: FloatArray
    draw_variance: Number


@dataclass(frozen=True, repr=False)
class KinFormula(Record):
    """What tabular theory says of the tokens of one step, at the batch's own positions.

    Attributes:
        name: one of :data:`FORMULAS`.
        sums: (prompt,) of the formula over the tokens.
        squares: (prompt,) of its square.
        products: (prompt,) of it times the effect on the own position, over the rest of the path.
    """

    name: str
    sums: FloatArray
    squares: FloatArray
    products: FloatArray


@dataclass(frozen=True, repr=False)
class KinStep(Record):
    """Kinship of one step.

    Attributes:
        number: of the optimizer step.
        prompts: what each prompt of its batch goes by.
        sequence_ids: (prompt,) place of its first sequence in the batch.
        tokens: number of distinct tokens with a weight, in distinct contexts.
        drawn: how many of these were looked at for their own position; all, where it is the same.
        positions: look to its number of positions.
        at_prompts: look to (prompt,) those in answers to each of these prompts.
        pairs: look to kin to the number of pairs of token and position.
        parts: of every look, kin and displacement.
        formulas: of tabular theory.
        own_squares: (prompt,) sum of the squared effects on the own position.
    """

    number: int
    prompts: tuple[str, ...]
    sequence_ids: IntArray
    tokens: int
    drawn: int
    positions: Mapping[str, int]
    at_prompts: Mapping[str, IntArray]
    pairs: Mapping[str, Mapping[str, int]]
    parts: tuple[KinPart, ...]
    formulas: tuple[KinFormula, ...]
    own_squares: FloatArray

    def part(self, look: str, kin: str, through: str) -> KinPart:
        """One of the parts."""
        return next(p for p in self.parts if (p.look, p.kin, p.through) == (look, kin, through))


@dataclass(frozen=True, repr=False)
class KinShare(Record):
    """What the tokens of some steps did to the entropy of one look by one kin; intervals as in ``Kinship``.

    Attributes:
        steps: ``all``, ``first third`` or ``last third`` of the steps in the account.
        look: one of :data:`LOOKS`.
        kin: one of :data:`KINS`.
        influence: over the rest of the path.
        own_step: through the tokens' own steps alone.
        share: of what the same tokens did to the whole of this look.
        against_held_out: over what they did to the entropy on held-out prompts, on policy.
        draw_stderr: the part of the error of ``influence`` that comes from drawing tokens.
        pairs: pairs of token and position, in the steps looked at.
    """

    steps: str
    look: str
    kin: str
    influence: Estimate
    own_step: Estimate
    share: Estimate
    against_held_out: Estimate
    draw_stderr: Number
    pairs: int


@dataclass(frozen=True, repr=False)
class KinTotal(Record):
    """What the tokens of some steps did to the whole of one look.

    Attributes:
        steps: as in :class:`KinShare`.
        look: one of :data:`LOOKS`.
        influence: over the rest of the path.
        own_step: through the tokens' own steps alone.
    """

    steps: str
    look: str
    influence: Estimate
    own_step: Estimate


@dataclass(frozen=True, repr=False)
class KinTheory(Record):
    """How far a formula of tabular theory goes.

    Attributes:
        formula: one of :data:`FORMULAS`.
        at_tokens: correlation over tokens, about 0, with their effect on the own position.
        at_steps: look to the correlation over steps, about 0, of the formula's sum with what the step's
            tokens did to the whole look.
    """

    formula: str
    at_tokens: Estimate
    at_steps: Mapping[str, Estimate]


@dataclass(frozen=True, repr=False)
class Kinship(Record):
    """``ledger_kinship.json``: what the tokens of a training acted on.

    All is of the entropy per token at given positions, to first order from where a token's step starts; each
    step that was looked at stands for its neighbours. Intervals take the training's prompts, the held-out
    ones and the tokens that were drawn for a sample.

    Attributes:
        first_step: number of the first step in the account.
        last_step: of the last.
        every: one step in so many was looked at.
        steps: (step,) numbers of those.
        num_prompts: of the training, in these steps.
        num_probe_prompts: held out.
        tokens: distinct tokens with a weight, in distinct contexts.
        drawn: of these, looked at for their own position.
        shares: by steps, look and kin.
        totals: by steps and look.
        theory: for each formula.
        ledger_tokens: what the ledger's entries of the same tokens add up to: on held-out prompts, on policy,
            with gradients along the rest of the path in place of those where each step starts.
    """

    first_step: int
    last_step: int
    every: int
    steps: IntArray
    num_prompts: int
    num_probe_prompts: int
    tokens: int
    drawn: int
    shares: tuple[KinShare, ...]
    totals: tuple[KinTotal, ...]
    theory: tuple[KinTheory, ...]
    ledger_tokens: Estimate

    def share(self, look: str, kin: str, steps: str = "all") -> KinShare:
        """One row of ``shares``."""
        return next(s for s in self.shares if (s.look, s.kin, s.steps) == (look, kin, steps))

    def total(self, look: str, steps: str = "all") -> KinTotal:
        """One row of ``totals``."""
        return next(t for t in self.totals if (t.look, t.steps) == (look, steps))


@dataclass(frozen=True, repr=False)
class KinRows(Table):
    """``ledger_kinship.parquet``: a row per step, prompt of its batch, look and kin.

    Attributes:
        step: number of the optimizer step.
        stands_for: number of steps that it stands for.
        prompt: the prompt.
        sequence_id: place of its first sequence in the batch.
        look: where the entropy is looked at.
        kin: what the tokens acted on.
        influence: by the tokens of this prompt, over the rest of the path.
        own_step: the same through the step itself.
        received: at the positions of this prompt, by the tokens of others, over the rest of the path.
    """

    step: IntArray
    stands_for: IntArray
    prompt: TextArray
    sequence_id: IntArray
    look: TextArray
    kin: TextArray
    influence: FloatArray
    own_step: FloatArray
    received: FloatArray


@dataclass(frozen=True, repr=False)
class StepKin(Record):
    """What the tokens of a step do to the entropy of one look by one kin.

    Attributes:
        look: one of :data:`LOOKS`.
        kin: one of :data:`KINS`.
        influence: in nats/token per unit of the learning rate.
        share: of what all tokens do to this look, in a batch of ``of_prompts`` prompts.
        per_pair: what one token does to one position, divided by the number of positions.
        draw_stderr: the part of the error of ``influence`` that comes from drawing tokens.
        pairs: pairs of a token with a weight and a position.
    """

    look: str
    kin: str
    influence: Estimate
    share: Estimate
    per_pair: Estimate
    draw_stderr: Number
    pairs: int


@dataclass(frozen=True, repr=False)
class StepKinship(Plotted, Record):
    """``kinship.json``: what the tokens of a checkpoint's step act on.

    All is of the entropy per token at given positions, to first order, per unit of the learning rate.
    Intervals take the batch's prompts for a sample.

    Attributes:
        lr: learning rate of the step.
        num_prompts: of the batch.
        num_sequences: of the batch.
        of_prompts: prompts of the batch that the shares are of.
        tokens: distinct tokens with a weight, in distinct contexts.
        drawn: of these, looked at for their own position.
        positions: look to its number of positions.
        kin: by look and kin.
        totals: look to what all tokens do to it.
        theory: formula of tabular theory to its correlation over tokens, about 0, with their effect on the
            own position.
    """

    lr: float
    num_prompts: int
    num_sequences: int
    of_prompts: int
    tokens: int
    drawn: int
    positions: Mapping[str, int]
    kin: tuple[StepKin, ...]
    totals: Mapping[str, Estimate]
    theory: Mapping[str, Estimate]

    def of(self, look: str, kin: str) -> StepKin:
        """One row of ``kin``."""
        return next(row for row in self.kin if (row.look, row.kin) == (look, kin))

    def to_pandas(self) -> pd.DataFrame:
        """A row by look and kin."""
        return frame(self.kin)

    def _viewed(self) -> Parts:
        return Parts("What the tokens act on", {"kinship": self})
