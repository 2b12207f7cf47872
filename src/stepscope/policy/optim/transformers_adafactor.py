"""Adafactor as transformers has it (``optim="adafactor"``): torch's but for where the eps are and what s is.

V'        = r' k' / mean(r') of x^2 + eps1, without a least value
direction = - s wd params + P a
s         = max(eps2, RMS(params)) with ``scale_parameter``, else 1
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from transformers.optimization import Adafactor

from stepscope.policy.optim.adafactor import AdafactorGroup, AdafactorState, refuse_incomplete, two_eps
from stepscope.policy.optim.saved import Keys, SavedGroup, SavedState


@dataclass(frozen=True, repr=False, kw_only=True)
class TransformersAdafactorState(AdafactorState):
    """transformers' Adafactor without a first moment, its learning rate given, under torch's names."""

    label: ClassVar[str] = "transformers' Adafactor"
    asked_for: ClassVar[tuple[str, ...]] = ("adafactor",)
    keys: ClassVar[Keys] = Keys(
        group=frozenset(
            {
                "lr",
                "eps",
                "clip_threshold",
                "decay_rate",
                "beta1",
                "weight_decay",
                "scale_parameter",
                "relative_step",
                "warmup_init",
            }
        ),
        entry=frozenset({"step", "RMS"}),
        entry_optional=frozenset({"exp_avg_sq_row", "exp_avg_sq_col", "exp_avg_sq", "exp_avg"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = Adafactor

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """A first moment, which holds steps with the learning rates they had; rates without a schedule."""
        if any(group["beta1"] is not None for group in groups):
            return (
                "Adafactor keeps a first moment (beta1) of steps with their learning rates in them, so that "
                "its step is no direction times a learning rate"
            )
        if any(group["relative_step"] or group["lr"] is None for group in groups):
            return (
                "Adafactor makes its own learning rate (relative_step), and a step is measured at a given one"
            )
        return ""

    @classmethod
    def shape_in(cls, entry: Mapping[str, Any]) -> tuple[int, ...] | None:
        """From rows and columns, or of the whole second moment."""
        if "exp_avg_sq" in entry:
            return tuple(entry["exp_avg_sq"].shape)
        if "exp_avg_sq_row" in entry and "exp_avg_sq_col" in entry:
            return (*entry["exp_avg_sq_row"].shape, *entry["exp_avg_sq_col"].shape[-1:])
        return None

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters; its moments are in float32 whatever the parameters are."""
        refuse_incomplete(saved, ("exp_avg_sq_row", "exp_avg_sq_col"), "exp_avg_sq")
        rows = saved.tensors("exp_avg_sq_row", lambda shape: shape[:-1])
        columns = saved.tensors("exp_avg_sq_col", lambda shape: (*shape[:-2], shape[-1]))
        return cls(
            groups=tuple(map(_group, saved.groups)),
            steps=saved.steps(),
            row_var={name: t.unsqueeze(-1) for name, t in rows.items()},
            col_var={name: t.unsqueeze(-2) for name, t in columns.items()},
            variance=saved.tensors("exp_avg_sq"),
        )

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Second moments of zero."""
        start = {"step": 0, "RMS": torch.zeros(())}
        if parameter.dim() < 2:
            return start | {"exp_avg_sq": torch.zeros_like(parameter)}
        rows = torch.zeros_like(parameter[..., 0])
        return start | {"exp_avg_sq_row": rows, "exp_avg_sq_col": torch.zeros_like(parameter[..., 0, :])}

    def _root(self, group: AdafactorGroup, name: str, point: Tensor) -> Tensor:
        weight = (self.steps[name] + 1) ** group.beta2_decay
        squares = point.square() + (group.eps[0] or 0.0)
        if name not in self.row_var:
            return self.variance[name].lerp(squares, weight).rsqrt()
        rows = self.row_var[name].lerp(squares.mean(-1, keepdim=True), weight)
        columns = self.col_var[name].lerp(squares.mean(-2, keepdim=True), weight)
        return (rows / rows.mean(-2, keepdim=True)).rsqrt() * columns.rsqrt()

    def _factor(self, group: AdafactorGroup, name: str, parameter: Tensor) -> float:
        """S."""
        return group.scale(parameter)

    def _decay(self, group: AdafactorGroup, parameter: Tensor) -> float:
        return group.weight_decay * group.scale(parameter)


def _group(saved: SavedGroup) -> AdafactorGroup:
    return AdafactorGroup(
        **saved.shared,
        beta2_decay=saved.number("decay_rate"),
        eps=two_eps(saved, none=False),
        d=saved.number("clip_threshold"),
        relative=bool(saved.settings["scale_parameter"]),
    )
