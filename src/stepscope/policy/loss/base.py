"""What a loss is here: a function of a padded batch, its parameters, and how it is averaged."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from stepscope.errors import ConfigError, shown
from stepscope.policy.loss.batch import LossBatch


class LossParameters(BaseModel):
    """Base of the parameters of a loss: none."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def read(cls, given: Mapping[str, Any], *, key: str, owner: str) -> Self:
        """Parameters from plain data; those left out keep their default.

        Args:
            given: by name.
            key: the setting that holds them.
            owner: whose they are.

        Raises:
            ConfigError: one is unknown, or has a value that it cannot have.
        """
        try:
            return cls.model_validate(dict(given))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"])) or "parameters"
            known = ", ".join(cls.model_fields) or "none"
            raise ConfigError(
                f"{key}.{place} of {owner}: {first['msg']}, got {shown(first['input'])}; it has {known}"
            ) from error


@dataclass(frozen=True)
class Loss:
    """A loss under the name that settings know it by.

    Attributes:
        name: its name.
        function: (seq, tok) or (seq, 1) loss of every token, from a batch and parameters; the scalar loss
            itself where ``aggregation`` is empty.
        parameters: class of its parameters.
        aggregation: how it is averaged by default, one of
            :data:`~stepscope.policy.loss.aggregation.AGGREGATIONS`; empty where the function does it all, a
            KL penalty too.
        own_average: ``aggregation`` is part of the loss; that of the settings is for the KL penalty alone.
        per_piece: it looks at other tokens of a micro-batch, so it is computed on each.
        ratio_on_kl: TRL's KL penalty, which its ratio can multiply; verl's otherwise.
        pairs: it compares the two responses of a prompt, of which the rewards say which is chosen.
        reference: ``beta`` weighs something that needs the reference policy.
    """

    name: str
    function: Callable[[LossBatch, Any], Tensor]
    parameters: type[LossParameters] = LossParameters
    aggregation: str = "token-mean"
    own_average: bool = False
    per_piece: bool = False
    ratio_on_kl: bool = False
    pairs: bool = False
    reference: bool = True

    def read(self, given: Mapping[str, Any]) -> LossParameters:
        """Parameters from plain data; those left out keep their default.

        Raises:
            ConfigError: one is unknown, or has a value that it cannot have.
        """
        return self.parameters.read(given, key="loss_parameters", owner=self.name)
