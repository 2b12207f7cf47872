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

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.state import ParameterGroup, Policy
from stepscope.results.step import Lifetime
from stepscope.stats import Estimate

HORIZONS = (1, 10, 40)
"""Steps in all, the batch's own the first, at which the effect of a batch is given."""


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

    share = vectors.dot(own, step.direction) / vectors.norm(step.direction) ** 2
    white = average(step.direction, lambda g, t: (1 - g.betas[0] ** 2) / (1 - g.betas[0] ** (2 * t)))
    return Lifetime(
        step=max(ages.values()),
        effect={n: after(n) for n in horizons},
        share=share,
        white_noise_share=white,
        constant_share=average(step.direction, lambda g, t: (1 - g.betas[0]) / (1 - g.betas[0] ** t)),
        relative_share=share / white,
    )


def lifetime_figures(found: Lifetime, count: int) -> dict[str, Estimate]:
    """The headline figures.

    Args:
        found: of the step.
        count: prompts of the update batch.
    """
    nan = float("nan")
    figures = {
        "share_sequences_relative": Estimate(
            found.relative_share,
            nan,
            count,
            "white-noise shares",
            f"share of this batch over {found.white_noise_share:.4g}, which independent gradients would "
            f"give at step {found.step}; an unchanging gradient would give {found.constant_share:.4g}",
        )
    }
    for n, value in found.effect.items():
        if n > 1:
            figures[f"effect_after_{n}_steps"] = Estimate(
                value,
                nan,
                count,
                "own-step effects",
                f"displacement of this batch over {n} steps, its own the first, through the first "
                "moment; later gradients, preconditioner and learning rate held as they are",
            )
    return figures
