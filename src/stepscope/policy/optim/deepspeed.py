"""DeepSpeed's FusedAdam and CPUAdam, whose step is that of AdamW in another order.

``csrc/adam/multi_tensor_adam.cu`` adds the decay to the update, params' = params - lr (m^ / D + wd params),
and ``csrc/adam/cpu_adam_impl.cpp`` shrinks the parameter first, as torch does: the same but for round-off.
Both keep to themselves whether the decay is decoupled (``adam_w_mode``, which is their default).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from stepscope.policy.optim.adamw import AdamWState
from stepscope.policy.optim.saved import Keys


@dataclass(frozen=True, repr=False, kw_only=True)
class DeepSpeedAdam(AdamWState):
    """The state of both, and of apex's FusedAdam, from which the first was made."""

    label: ClassVar[str] = "DeepSpeed's FusedAdam and CPUAdam"
    asked_for: ClassVar[tuple[str, ...]] = ()
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "eps", "weight_decay", "bias_correction"}),
        group_optional=frozenset({"amsgrad", "step"}),
        entry=frozenset({"step", "exp_avg", "exp_avg_sq"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = None

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """A step without the bias corrections, or with AMSGrad, which they do not have."""
        if any(group["bias_correction"] not in (True, 1) for group in groups):
            return "FusedAdam or CPUAdam takes its steps without bias correction"
        return "FusedAdam or CPUAdam with AMSGrad" if any(g.get("amsgrad") for g in groups) else ""
