"""What a quantity is, and the register of those there are.

A quantity is F(params) = E_y[sum_k f_k], y sampled from the policy. f_k has two parts: a *prefix value*,
known before token k is drawn (entropy), and a *token value*, known after (reward, on the last token). A
token's choice therefore moves everything that comes after it:

    grad F = E[ sum_k grad f_k + sum_k (R_k - b_k) grad l_k ]
    R_k = sum_{j>k} prefix_j + sum_{j>=k} token_j

The second sum is the visitation term; ``fixed_prefix`` leaves it out. Per token the quantity is F/N with
N = E[response length], whose gradient is that of E[sum_k (f_k - Fbar)]/N with Fbar = F/N and N held fixed;
Fbar counts as a prefix value. (Policy gradient theorem; Rao-Blackwellised KL: Amini et al. 2504.10637.)
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.policy.forward import Reading, TokenBatch, TokenOutputs
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

NORMALISATIONS = ("per_token", "per_seq")
VERSIONS = ("on_policy", "fixed_prefix")


@dataclass(frozen=True, kw_only=True, eq=False)
class Quantity:
    """What can be measured: the sums over responses of some f_k, in a normalisation and a version.

    A new one is a subclass in a file of ``measure.quantity.kinds``, named like it: a name, a unit, and one of
    ``prefix_values`` and ``token_values``; the derivatives, estimators and errors are the same for all. One
    that needs more of a distribution than log-prob and entropy has a ``reading`` of it, and finds what that
    says in ``outputs.read[self.values_key]``.

    Attributes:
        name: as on the command line.
        sum_unit: of the sum over a response.
        needs_rewards: whether the batch must be graded.
        normalisations: those for which the quantity is not constant by definition.
        versions: those for which the quantity is not constant by definition.
        normalisation: ``per_token``, over the expected length, or ``per_seq``.
        version: ``on_policy``, where prefixes move with the policy, or ``fixed_prefix``.

    Raises:
        MeasurementError: no such normalisation or version, or the quantity is constant in it.
    """

    name: ClassVar[str]
    sum_unit: ClassVar[str]
    needs_rewards: ClassVar[bool] = False
    normalisations: ClassVar[tuple[str, ...]] = NORMALISATIONS
    versions: ClassVar[tuple[str, ...]] = VERSIONS

    normalisation: str = "per_token"
    version: str = "on_policy"

    def __post_init__(self) -> None:
        """Refuse what is not there or constant."""
        for kind, chosen, every, supported in (
            ("normalisation", self.normalisation, NORMALISATIONS, self.normalisations),
            ("version", self.version, VERSIONS, self.versions),
        ):
            if chosen not in every:
                raise MeasurementError(f"unknown {kind} {chosen!r}; choose from {', '.join(every)}")
            if chosen not in supported:
                raise MeasurementError(
                    f"{self.name} with {kind} {chosen} is constant by definition; "
                    f"choose {' or '.join(supported)}"
                )

    def prefix_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """(seq, tok) the part of f_k that is a function of the prefix; zero on padding."""
        return torch.zeros_like(outputs.logprobs)

    def token_values(self, outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
        """(seq, tok) the part of f_k that is a function of prefix and token; zero on padding."""
        return torch.zeros_like(outputs.logprobs)

    def reading(self, batch: TokenBatch) -> Reading | None:
        """What is read off the whole distribution at each position of a micro-batch; None for nothing."""
        return None

    def on(self, rollouts: Rollouts, policy: Policy | None, reference: nn.Module | None) -> Quantity:
        """The quantity with what it needs of a batch, the policy that sampled it, and a reference model."""
        return self

    @property
    def per_token(self) -> bool:
        """Whether it is divided by the expected length."""
        return self.normalisation == "per_token"

    @property
    def on_policy(self) -> bool:
        """Whether the prefixes move with the policy."""
        return self.version == "on_policy"

    @property
    def fisher_sign(self) -> int:
        """Sign with which E[grad S grad S'] is part of Hess F, S a response's log-prob; 0 where it is not."""
        return 0

    @property
    def unit(self) -> str:
        """Unit in the normalisation, for example ``nats/token``."""
        return f"{self.sum_unit}/{'token' if self.per_token else 'sequence'}"

    @property
    def values_key(self) -> tuple[object, ...]:
        """Equal where f_k is the same, so that one pass serves both."""
        own = (f.name for f in fields(self) if f.name not in ("normalisation", "version"))
        return (type(self), *(id(getattr(self, name)) for name in own))

    def variants(self) -> tuple[Quantity, ...]:
        """The quantity in every normalisation and version in which it is not constant, in that nesting."""
        return tuple(
            replace(self, normalisation=n, version=v) for n in self.normalisations for v in self.versions
        )


def readings_of(chosen: Sequence[Quantity], batch: TokenBatch) -> dict[Hashable, Reading]:
    """What some quantities read off the distributions of a micro-batch, for the forward pass."""
    found = {quantity.values_key: quantity.reading(batch) for quantity in chosen}
    return {key: reading for key, reading in found.items() if reading is not None}


def quantities() -> dict[str, type[Quantity]]:
    """The quantities there are, by name: those of ``measure.quantity.kinds`` and all other subclasses."""
    for file in sorted((Path(__file__).parent / "kinds").glob("[a-z]*.py")):
        import_module(f"stepscope.measure.quantity.kinds.{file.stem}")
    return {kind.name: kind for kind in sorted(Quantity.__subclasses__(), key=lambda kind: kind.name)}


def make_quantity(
    quantity: str | Quantity,
    rollouts: Rollouts,
    *,
    policy: Policy | None = None,
    reference: nn.Module | None = None,
    normalisation: str | None = None,
    version: str | None = None,
) -> Quantity:
    """A quantity, ready to be measured on a batch.

    Args:
        quantity: its name: ``entropy``, ``reward``, ``length``, ``kl``, ``logprob`` or that of a subclass;
            or a quantity.
        rollouts: the probe batch.
        policy: the policy that sampled it; needed for ``kl`` only.
        reference: the reference model of ``kl``; without one a PEFT policy is compared with TRL's frozen copy
            of the adapter it started from (``ref``), or with its base model where there is none.
        normalisation: ``per_token`` or ``per_seq``; by default the quantity's own, which for one that has a
            name only is ``per_token`` unless it is constant in it.
        version: ``on_policy`` or ``fixed_prefix``; by default the quantity's own.

    Raises:
        MeasurementError: unknown name, normalisation or version, the quantity is constant in them, or ``kl``
            without a policy or a reference.
    """
    if isinstance(quantity, str):
        known = quantities()
        if quantity not in known:
            raise MeasurementError(f"unknown quantity {quantity!r}; choose from {', '.join(known)}")
        quantity = known[quantity]()
    form = {"normalisation": normalisation, "version": version}
    quantity = replace(quantity, **{name: value for name, value in form.items() if value is not None})
    return quantity.on(rollouts, policy, reference)
