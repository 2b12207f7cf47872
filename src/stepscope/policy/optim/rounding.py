"""Whether params + lr * direction is where a training goes that may round its weights after every step."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from stepscope.policy.numerics.precision import HALF_TYPES, type_name


def rounding_doubt(types: tuple[str, ...], moments: Mapping[str, torch.dtype] | None = None) -> str:
    """Why params + lr * direction may not be where the training goes; empty if it is.

    A training that keeps its weights in a half type rounds them after every step: at small learning rates
    most do not move at all. The direction is that of the step before the rounding.

    Args:
        types: of the stored weights.
        moments: types of the optimizer's moments in the file by parameter, where torch made them: it gives
            them the type of the parameter.
    """
    kinds = {type_name(kind) for kind in (moments or {}).values()}
    if kept := sorted(kinds & set(HALF_TYPES)):
        return (
            f"the weights are stored in {'/'.join(kept)} and rounded after every step, and this is of the "
            "step before rounding"
        )
    narrow = [name for name in types if name in HALF_TYPES]
    if not narrow:
        return ""
    if kinds:
        return (
            f"the weights are stored in {'/'.join(narrow)} and the optimizer's moments in "
            f"{'/'.join(sorted(kinds))}: the training had finer weights than those that this step starts from"
        )
    return (
        f"the weights are stored in {'/'.join(narrow)}: a training that keeps them so rounds every step, and "
        "this is the step before rounding"
    )
