"""Interventions applied to a table of tokens, and read from the record that a checkpoint keeps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import ValidationError

from stepscope.errors import ConfigError, shown
from stepscope.results import FloatArray, IntArray
from stepscope.rules.frontier import FrontierWeights
from stepscope.rules.interventions import (
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
from stepscope.rules.left_out import Without
from stepscope.rules.tokens import Tokens

INTERVENTIONS: dict[str, type[Intervention]] = {
    kind.model_fields["name"].default: kind
    for kind in (
        ClipCov,
        KlCov,
        TopEntropy,
        Reweighting,
        Steer,
        DiscriminatorClipping,
        InfluenceClipping,
        FrontierWeights,
        EntropyBonus,
        Without,
    )
}
"""By the name under which a checkpoint records them."""


def token_advantages(
    intervention: Intervention, tokens: Tokens, *, seed: int, step: int, order: IntArray | None = None
) -> FloatArray:
    """(tok,) advantages of an intervention in one optimizer step.

    Args:
        intervention: what is changed in the loss.
        tokens: of the step.
        seed: the run's seed; together with ``step`` it decides every random draw.
        step: optimizer steps taken so far.
        order: of the sequences, from which its micro-batches are cut; that of the table by default.
    """
    random = np.random.default_rng([seed, step])
    made = np.empty(len(tokens))
    for places, part in tokens.micro_batches(intervention.micro_batch_size, order):
        made[places] = intervention.advantages(part, random)
    return made


def intervention_from_record(record: Mapping[str, Any]) -> Intervention:
    """The intervention that ``to_record`` wrote.

    Raises:
        ConfigError: it is not understood.
    """
    name = record.get("name")
    kind = INTERVENTIONS.get(name) if isinstance(name, str) else None
    if kind is None:
        raise ConfigError(f"unknown name {shown(name)}")
    parameters = {*kind.model_fields, "micro_batch_size"} - {"scope"}
    if odd := sorted(parameters ^ set(record)):
        raise ConfigError(f"{name} {'has no' if odd[0] in record else 'needs a'} parameter {odd[0]}")
    given = {n: v for n, v in record.items() if n != "micro_batch_size"}
    if record["micro_batch_size"] is not None:
        if not issubclass(kind, ScopedIntervention):
            raise ConfigError(f"{name} has no statistics over micro-batches; set micro_batch_size to null")
        given["scope"] = record["micro_batch_size"]
    try:
        return kind.model_validate(given)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"][:1])) or "parameters"
        raise ConfigError(f"{name}: {place}: {first['msg']}, got {shown(first['input'])}") from error
