"""Tokens of some classes left out of a training: which ones, and by how much."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import Field, field_validator

from stepscope.errors import ConfigError, MeasurementError, shown
from stepscope.results import BoolArray, FloatArray
from stepscope.rules.interventions import Intervention
from stepscope.rules.token_classes import IN_TRAINING, LABELS, WAYS, Labels
from stepscope.rules.tokens import Tokens

OF_TEXTS = ("kind", "token")
"""Ways that look at what a token says."""

_FEW = 12


@dataclass(frozen=True)
class TokenRule:
    """The tokens of some classes of one way to divide them (:data:`stepscope.rules.token_classes.WAYS`).

    The same text means the same tokens in the table of a ledger and inside a training.

    Attributes:
        way: name of the way.
        labels: its classes.
    """

    way: str
    labels: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> TokenRule:
        """The rule that ``WAY=CLASS`` or ``WAY=CLASS|CLASS`` says, for example ``quadrant=wrong, rare``.

        Raises:
            ConfigError: there is no such way, or it has no such class.
        """
        way, equals, rest = text.partition("=")
        way = way.strip()
        if not equals or way not in WAYS:
            raise ConfigError(
                f"rule {shown(text)}: expected WAY=CLASS, with a way among {', '.join(WAYS)}; for example "
                '"quadrant=wrong, rare" or "kind=digits|operators"'
            )
        if way == "token":  # its classes are texts, in which blanks count
            labels = (rest,) if rest == "|" else tuple(rest.split("|"))
        else:
            labels = tuple(label.strip() for label in rest.split("|"))
        known = LABELS.get(way)
        for label in labels:
            if not label or (known is not None and label not in known):
                listed = f"expected one of {_listed(known)}" if known is not None else "name a class after ="
                raise ConfigError(f"rule {shown(text)}: no class {shown(label)} of {way}; {listed}")
        if len(set(labels)) < len(labels):
            raise ConfigError(f"rule {shown(text)}: a class is named twice; name each once")
        return cls(way, labels)

    def __str__(self) -> str:
        """The text that :meth:`parse` reads."""
        return f"{self.way}={'|'.join(self.labels)}"

    def for_training(self) -> TokenRule:
        """The rule, which a training can follow.

        Raises:
            ConfigError: a training does not know enough of its tokens before the step.
        """
        if self.way not in IN_TRAINING:
            raise ConfigError(
                f"rule {shown(str(self))}: a training does not know the {self.way} of a token before the "
                f"step; take one of {', '.join(IN_TRAINING)}"
            )
        return self

    @property
    def needs_texts(self) -> bool:
        """Whether it looks at what tokens say."""
        return self.way in OF_TEXTS

    def inside(self, table: Any) -> BoolArray:
        """(tok,) True on the tokens of the classes.

        Args:
            table: of tokens, its columns as attributes.
        """
        found: Labels = WAYS[self.way](table)
        return np.isin(np.array([str(label) for label in found], dtype=object), list(self.labels))

    def present(self, table: Any) -> BoolArray:
        """The same, of classes that must occur.

        Raises:
            MeasurementError: one has no token.
        """
        found = [str(label) for label in WAYS[self.way](table)]
        if lacking := [label for label in self.labels if label not in set(found)]:
            common = sorted(set(found), key=lambda label: (-found.count(label), label))
            raise MeasurementError(
                f"rule {shown(str(self))}: no token of the training is of class {shown(lacking[0])}; there "
                f"are {_listed(common)}"
            )
        return np.isin(np.array(found, dtype=object), list(self.labels))


def _listed(labels: Sequence[str]) -> str:
    more = f" and {len(labels) - _FEW} more" if len(labels) > _FEW else ""
    return "; ".join(labels[:_FEW]) + more


class Without(Intervention):
    """Tokens of a rule count less in the loss, or not at all: what a ledger's what-if is held against.

    Their advantage is multiplied by 1 - dose, and so is the token weight; a loss that divides by a number of
    tokens divides by the same number as without the rule.

    Attributes:
        rule: as :meth:`TokenRule.parse` reads it, of a way in
            :data:`stepscope.rules.token_classes.IN_TRAINING`.
        dose: share of the weight that is taken away; 1 takes the tokens out of the loss.
    """

    name: Literal["without"] = "without"
    rule: str
    dose: float = Field(default=1.0, ge=0, le=1)

    @field_validator("rule")
    @classmethod
    def _trainable(cls, value: str) -> str:
        try:
            TokenRule.parse(value).for_training()
        except ConfigError as error:
            raise ValueError(str(error)) from error
        return value

    @property
    def needs_texts(self) -> bool:
        """For rules about what tokens say."""
        return TokenRule.parse(self.rule).needs_texts

    def left_out(self, tokens: Tokens) -> BoolArray:
        """(tok,) True on the tokens of the rule.

        Raises:
            MeasurementError: the table does not tell the position or the text of its tokens.
        """
        rule = TokenRule.parse(self.rule)
        needed = {"position": ("position",)}.get(rule.way, (rule.way,) if rule.needs_texts else ())
        if lacking := [name for name in needed if getattr(tokens, name) is None]:
            raise MeasurementError(
                f"without: the rule {shown(self.rule)} needs the {lacking[0]} of every token, got none; "
                "measure a checkpoint with its tokenizer"
            )
        return rule.inside(tokens)

    def advantages(self, tokens: Tokens, random: np.random.Generator) -> FloatArray:
        """A, and (1 - dose) A on the tokens of the rule."""
        return np.where(self.left_out(tokens), (1 - self.dose) * tokens.advantage, tokens.advantage)
