"""The losses that are known, by name. A new one is a function, and an entry in one of the tables here."""

from __future__ import annotations

from stepscope.errors import ConfigError
from stepscope.policy.loss import hypo, preference, trl, verl
from stepscope.policy.loss.base import Loss

LOSSES: dict[str, Loss] = {
    loss.name: loss for loss in (*trl.LOSSES, *verl.LOSSES, *preference.LOSSES, *hypo.LOSSES)
}
"""TRL's under TRL's names, verl's under theirs after ``verl:``."""


def known_loss(name: str) -> bool:
    """Whether a loss goes by this name."""
    return name in LOSSES


def of_preferences(name: str) -> bool:
    """Whether the loss of this name is one of pairs of responses; not for a name that is not known."""
    return known_loss(name) and LOSSES[name].pairs


def loss_named(name: str) -> Loss:
    """The loss of a name.

    Raises:
        ConfigError: there is none.
    """
    if name not in LOSSES and ":" in name and not name.startswith(verl.PREFIX):
        raise ConfigError(
            f"loss_type: {name[:60]!r} is a function of somebody's own, which no file of a checkpoint can "
            f"have imported; give loss.loss_type={name[:60]} yourself"
        )
    if name not in LOSSES:
        raise ConfigError(
            f"loss_type: got {name[:60]!r}, expected one of {', '.join(LOSSES)}; other losses cannot be "
            "measured"
        )
    return LOSSES[name]
