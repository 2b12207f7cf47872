"""bitsandbytes' AdamW with moments in 32 bits, whose step is that of torch's.

Its GPU kernel decays after the update instead of before it, which differs by lr x weight_decay of the step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from stepscope.policy.optim.adamw import AdamWState
from stepscope.policy.optim.base import Keys, SavedState

NESTED = "__bnb_optimizer_quant_state__"
"""Key of an entry under which bitsandbytes has kept its tensors since 2026."""

_TORCHS_NAMES = {"state1": "exp_avg", "state2": "exp_avg_sq"}


@dataclass(frozen=True, repr=False, kw_only=True)
class BitsAndBytesAdamW(AdamWState):
    """The state under torch's names; the types of its moments say nothing of the parameters'."""

    label: ClassVar[str] = "bitsandbytes' AdamW in 32 bits"
    asked_for: ClassVar[tuple[str, ...]] = ("paged_adamw_32bit",)
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "eps", "weight_decay"}),
        group_optional=frozenset({"alpha", "t_alpha", "t_beta3"}),
        entry=frozenset({"step", "state1", "state2"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = None

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """Moments in 8 bits, and the three moments of AdEMAMix."""
        if any(entry[key].dtype != torch.float32 for entry in entries.values() for key in _TORCHS_NAMES):
            return "the moments are bitsandbytes' in 8 bits"
        plain = all(not group.get("alpha") and len(group["betas"]) == 2 for group in groups)
        return "" if plain else "the state is that of an optimizer of bitsandbytes, not AdamW"

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters."""
        entries = {
            name: {_TORCHS_NAMES.get(key, key): value for key, value in entry.items()}
            for name, entry in saved.entries.items()
        }
        return super().read(replace(saved, entries=entries))
