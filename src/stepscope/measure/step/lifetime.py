"""What a batch does after its own step, and what part of a step a batch has by AdamW's arithmetic alone.

AdamW takes only (1 - b1) of a clipped gradient g into the step it belongs to; its first moment carries
(1 - b1) b1^j g into the j-th step after it. With the preconditioner 1/D and later gradients held as they are,
the displacement that a batch has caused after n steps, its own (number t) the first, is that of its own step
times

    L_n = sum_{j < n} b1^j (1 - b1^t) / (1 - b1^(t + j)) (1 - lr wd)^(n - 1 - j)

at a constant learning rate: a geometric series, up to the bias corrections, that ends near 1 / (1 - b1). To
first order every change that a batch causes grows by that factor.

For the same reason a batch never is the whole of a step. If gradients are white noise, a batch has the share
(1 - b1^2) / (1 - b1^(2t)) of the step's squared length, if they are all equal (1 - b1) / (1 - b1^t): the rest
is "momentum" whatever the training does. (Own derivation, held to ``torch.optim.AdamW``.)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.state import ParameterGroup, Policy
from stepscope.stats import Estimate

HORIZONS = (1, 10, 40)
"""Steps in all, the batch's own the first, at which the effect of a batch is given."""


@dataclass(frozen=True)
class Lifetime:
    """A batch's effect beyond its own step, and its share of that step against two kinds of gradients.

    Attributes:
        step: t, the number of the step; of the parameter with most steps.
        effect: steps in all to the displacement so far over that of the own step.
        share: <sequences, direction> / |direction|^2.
        white_noise_share: what independent gradients of constant size would give.
        constant_share: what a gradient that never changes would give.
    """

    step: int
    effect: dict[int, float]
    share: float
    white_noise_share: float
    constant_share: float

    @property
    def relative_share(self) -> float:
        """The share in units of the share under white noise."""
        return self.share / self.white_noise_share

    def to_dict(self) -> dict[str, Any]:
        """The fields for ``step.json``."""
        return {
            **asdict(self),
            "effect": {str(n): value for n, value in self.effect.items()},
            "relative_share": self.relative_share,
        }

    def figures(self, count: int) -> dict[str, Estimate]:
        """The headline figures.

        Args:
            count: prompts of the update batch.
        """
        nan = float("nan")
        found = {
            "share_sequences_relative": Estimate(
                self.relative_share,
                nan,
                count,
                "white-noise shares",
                f"share of this batch over {self.white_noise_share:.4g}, which independent gradients would "
                f"give at step {self.step}; an unchanging gradient would give {self.constant_share:.4g}",
            )
        }
        for n, value in self.effect.items():
            if n > 1:
                found[f"effect_after_{n}_steps"] = Estimate(
                    value,
                    nan,
                    count,
                    "own-step effects",
                    f"displacement of this batch over {n} steps, its own the first, through the first "
                    "moment; later gradients, preconditioner and learning rate held as they are",
                )
        return found


def carried(group: ParameterGroup, step: int, horizon: int) -> float:
    """L_n: displacement that a gradient has caused after n steps over that of its own step.

    Args:
        group: beta1, learning rate and weight decay; the learning rate stays what it is.
        step: t >= 1, the number of the gradient's own step.
        horizon: n >= 1, steps in all.
    """
    beta, moved = group.betas[0], 0.0
    for j in range(horizon):
        moved = moved * (1 - group.lr * group.weight_decay)
        moved += beta**j * (1 - beta**step) / (1 - beta ** (step + j))
    return moved


def lifetime(policy: Policy, step: Step, *, horizons: tuple[int, ...] = HORIZONS) -> Lifetime:
    """The lifetime of the batch of a step.

    Where groups of parameters differ in betas, decay or age, their effects count with the squared length
    that the batch's part has in them, and their shares with that of the whole step.

    Args:
        policy: with the AdamW state the step was rebuilt from.
        step: the step.
        horizons: steps in all at which the effect is wanted.

    Raises:
        CheckpointError: no optimizer state.
    """
    state = policy.optimizer
    if state is None:
        raise CheckpointError(
            f"{policy.path or 'this policy'}: no optimizer state, and the lifetime of a batch is its first "
            "moment's; load a checkpoint that has optimizer.pt"
        )
    ages = {n: state.steps[n] + 1 for group in state.groups for n in group.names}

    def average(vector: dict[str, Tensor], value: Callable[[ParameterGroup, int], float]) -> float:
        """Mean over parameters, weighted by squared length."""
        weighted = {n: t.double().square().sum() for n, t in vector.items()}
        found = {n: value(group, ages[n]) for group in state.groups for n in group.names}
        lengths = torch.stack([weighted[n] for n in found])
        values = torch.tensor(list(found.values()), dtype=torch.float64, device=lengths.device)
        return float((lengths * values).sum() / lengths.sum())

    own = step.components["sequences"]

    def after(count: int) -> float:
        return average(own, lambda group, age: carried(group, age, count))

    return Lifetime(
        step=max(ages.values()),
        effect={n: after(n) for n in horizons},
        share=vectors.dot(own, step.direction) / vectors.norm(step.direction) ** 2,
        white_noise_share=average(
            step.direction, lambda g, t: (1 - g.betas[0] ** 2) / (1 - g.betas[0] ** (2 * t))
        ),
        constant_share=average(step.direction, lambda g, t: (1 - g.betas[0]) / (1 - g.betas[0] ** t)),
    )
