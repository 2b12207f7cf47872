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

import numpy as np
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.state import Policy
from stepscope.results.step import Lifetime
from stepscope.stats import Estimate, exact

HORIZONS = (1, 10, 40)
"""Steps in all, the batch's own the first, at which the effect of a batch is given."""


def lifetime(policy: Policy, step: Step, *, horizons: tuple[int, ...] = HORIZONS) -> Lifetime | None:
    """The lifetime of the batch of a step; None where a step is no sum over gradients.

    Where groups of parameters differ in betas, decay or age, their effects count with the squared length
    that the batch's part has in them, and their shares with that of the whole step.

    Args:
        policy: with the optimizer's state that the step was rebuilt from.
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
    if state.nonlinear:
        return None
    own = step.components["sequences"]

    def average(vector: dict[str, Tensor], values: list[float]) -> float:
        """Mean over parameters, weighted by squared length."""
        squares = vectors.dots_by_name(vector, vector)
        lengths = np.array([squares[name] for name in state.names])
        return float(lengths @ np.array(values) / lengths.sum())

    share = vectors.dot(own, step.direction) / vectors.norm(step.direction) ** 2
    by_arithmetic = [state.own_shares(name) for name in state.names]
    white = average(step.direction, [noise for noise, _ in by_arithmetic])
    return Lifetime(
        step=max(state.steps.values(), default=policy.step) + 1,
        effect={n: average(own, [state.carried(name, n) for name in state.names]) for n in horizons},
        share=share,
        white_noise_share=white,
        constant_share=average(step.direction, [same for _, same in by_arithmetic]),
        relative_share=share / white,
    )


def lifetime_figures(found: Lifetime, count: int) -> dict[str, Estimate]:
    """The headline figures of what becomes of the batch.

    Args:
        found: of the step.
        count: prompts of the update batch.
    """
    figures = {
        "share_sequences_relative": exact(
            found.relative_share,
            count,
            "white-noise shares",
            f"share of this batch over {found.white_noise_share:.4g}, which independent gradients would "
            f"give at step {found.step}; an unchanging gradient would give {found.constant_share:.4g}",
        )
    }
    for n, value in found.effect.items():
        if n > 1:
            figures[f"effect_after_{n}_steps"] = exact(
                value,
                count,
                "own-step effects",
                f"displacement of this batch over {n} steps, its own the first, through the first "
                "moment; later gradients, preconditioner and learning rate held as they are",
            )
    return figures
