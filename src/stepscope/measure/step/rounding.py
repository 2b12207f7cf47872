"""The step as a training takes it that keeps its weights in a half type: the library's own and its roundings.

With weights theta, moments and gradients in bfloat16 (8 significant bits) torch rounds after every operation,
and theta' = round(theta + lr direction) is theta itself wherever the step is below half the spacing of the
numbers around it, |lr direction| < 2^-9 |theta| or so. The step here is taken by the optimizer's
library, such as ``torch.optim.AdamW``, on copies of the weights, in the implementation that the checkpoint
names (fused rounds the weights once, the others after every operation), after
``torch.nn.utils.clip_grad_norm_`` on the gradient in that type. What is not the training's own is the
gradient: computed at the measurement's precision and rounded, where the training ran its backward pass in the
half type.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.measure.step.reconstruct import Step
from stepscope.policy import vectors
from stepscope.policy.numerics.finiteness import first_not_finite
from stepscope.policy.state import Policy
from stepscope.results import Brief
from stepscope.results.step import Rounding


@dataclass(frozen=True, repr=False)
class RoundedStep(Brief):
    """Where a training in a half type is after the step, and how that differs from params + lr * direction.

    Attributes:
        parameters: theta', in the types the training keeps them in; each is exact in float32.
        kept_in: those half types, by name.
        kernel: which of torch's implementations took the step, ``fused``, ``foreach`` or ``single tensor``.
        lr: learning rate of the step.
        share_moved: share of the coordinates with theta' != theta.
        cosine: of theta' - theta and the direction before rounding; nan where nothing moves.
        norm_ratio: |theta' - theta| / |lr * direction|.
    """

    parameters: dict[str, Tensor]
    kept_in: str
    kernel: str
    lr: float
    share_moved: float
    cosine: float
    norm_ratio: float

    def report(self) -> Rounding:
        """The figures, without the parameters."""
        return Rounding(**{field.name: getattr(self, field.name) for field in fields(Rounding)})


def rounded_step(policy: Policy, step: Step, lr: float) -> RoundedStep | None:
    """Take the step the way a training with weights in a half type takes it.

    Args:
        policy: with its optimizer's state, the moments exact as stored.
        step: rebuilt from it.
        lr: learning rate, the step's own or one in its place where that is 0.

    Returns:
        None where no parameter was in a half type: torch's moments have the type of their parameter.

    Raises:
        MeasurementError: the weights are no numbers of the type that their moments say, or the step is not
            finite in that type.

    Pinned by ``tests/measure/test_rounding.py`` on trainings in bfloat16 and on the operations one by one.
    """
    state = policy.optimizer
    if state is None or not state.half_types or not lr > 0:
        return None
    if odd := state.finer_than_kept(policy.parameters):
        raise MeasurementError(f"{odd}; measure a checkpoint as its training wrote it")
    start = {name: policy.parameters[name].detach() for name in step.direction}
    copies: dict[str, nn.Parameter] = {}
    for name, value in start.items():
        kept = state.moment_types.get(name, value.dtype)
        copies[name] = nn.Parameter(value.to(kept, copy=True))
        copies[name].grad = -step.ascent[name].to(kept)
    if policy.settings.max_grad_norm > 0:
        nn.utils.clip_grad_norm_(copies.values(), policy.settings.max_grad_norm)
    kernel = state.take(copies, scale=lr / step.lr if step.lr > 0 else None, lr=lr)
    parameters = {name: copy.detach() for name, copy in copies.items()}
    if problem := first_not_finite(parameters.items()):
        raise MeasurementError(
            f"the step of a training in {'/'.join(state.half_types)} is not finite: {problem}; eps or second "
            "moments are 0 in that type, and the training ends here; measure an earlier checkpoint"
        )
    moved = {name: parameters[name].float() - start[name].float() for name in parameters}
    length = lr * vectors.norm(step.direction)
    return RoundedStep(
        parameters=parameters,
        kept_in="/".join(state.half_types),
        kernel=kernel,
        lr=lr,
        share_moved=sum(int(t.count_nonzero()) for t in moved.values())
        / sum(t.numel() for t in moved.values()),
        cosine=vectors.cosine(moved, step.direction),
        norm_ratio=vectors.norm(moved) / length if length > 0 else float("nan"),
    )
