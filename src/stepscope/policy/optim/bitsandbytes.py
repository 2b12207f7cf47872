"""bitsandbytes' AdamW (Dettmers et al. 2022, arXiv:2110.02861), with moments in 8 or 32 bits, paged or not.

The moments are decoded, AdamW takes its step with them in float32, and what is left of them is encoded again:
the step to come is known exactly. What the codes of the last step lost is known up to an interval
(:mod:`stepscope.measure.step.storage`).

The library's CUDA kernels decay last (``csrc/kernels.cu``), theta' = (theta + lr u) (1 - lr wd), where torch
and the library elsewhere decay first; the two differ by lr wd of u. A state does not say where it comes from,
and is taken to be a GPU's: trainings with this optimizer are on GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from stepscope.errors import CheckpointError
from stepscope.policy.optim.adamw import AdamWGroup, AdamWState
from stepscope.policy.optim.block_codes import CPU_SLACK, BlockCodes
from stepscope.policy.optim.saved import Keys, SavedState

NESTED = "__bnb_optimizer_quant_state__"
"""Key of an entry under which bitsandbytes has kept its tensors since 2026."""


@dataclass(frozen=True, repr=False, kw_only=True)
class BitsAndBytesAdamW(AdamWState):
    """The state under torch's names; the types of its moments say nothing of the parameters'.

    Attributes:
        on_gpu: the training's parameters are on a GPU.
    """

    on_gpu: bool = True

    label: ClassVar[str] = "bitsandbytes' AdamW"
    asked_for: ClassVar[tuple[str, ...]] = (
        "adamw_8bit",
        "adamw_bnb_8bit",
        "paged_adamw_8bit",
        "paged_adamw_32bit",
    )
    keys: ClassVar[Keys] = Keys(
        group=frozenset({"lr", "betas", "eps", "weight_decay"}),
        group_optional=frozenset({"alpha", "t_alpha", "t_beta3"}),
        entry=frozenset({"step", "state1", "state2"}),
        entry_optional=frozenset({"qmap1", "qmap2", "absmax1", "absmax2"}),
    )
    library: ClassVar[type[torch.optim.Optimizer] | None] = None

    @classmethod
    def runs(cls, optimizer: object) -> bool:
        """By name, since the library need not be there; its Adam decays as its AdamW does."""
        made = type(optimizer)
        return made.__module__.startswith("bitsandbytes.optim.adam") and "Adam" in made.__name__

    @classmethod
    def objection(cls, groups: Sequence[Mapping[str, Any]], entries: Mapping[Any, Mapping[str, Any]]) -> str:
        """The three moments of AdEMAMix."""
        plain = all(not group.get("alpha") and len(group["betas"]) == 2 for group in groups)
        return "" if plain else "the state is that of an optimizer of bitsandbytes, not AdamW"

    @classmethod
    def read(cls, saved: SavedState) -> Self:
        """The state of named parameters, decoded where it is in 8 bits."""
        plain, codes = decoded(saved, {"1": "exp_avg", "2": "exp_avg_sq"})
        return replace(super().read(plain), codes=codes)

    @classmethod
    def fresh(cls, parameter: Tensor, settings: Mapping[str, Any]) -> dict[str, Any]:
        """Moments of zero."""
        zero = torch.zeros_like(parameter, dtype=torch.float32)
        return {"step": 0, "state1": zero, "state2": zero}

    @classmethod
    def mean_gradient(cls, entry: Mapping[str, Any], settings: Mapping[str, Any]) -> Tensor | None:
        """M / (1 - b1^t)."""
        if "state1" not in entry:
            return None
        first = entry["state1"]
        if first.dtype != torch.float32:
            first = BlockCodes(first, entry["absmax1"], entry["qmap1"]).value
        return super().mean_gradient({"step": entry["step"], "exp_avg": first}, settings)

    def of_cpu(self) -> Self:
        """The same of a training on a CPU."""
        codes = {
            key: {name: replace(found, slack=CPU_SLACK) for name, found in by_name.items()}
            for key, by_name in self.codes.items()
        }
        return replace(self, on_gpu=False, codes=codes)

    def _shrunk(self, group: AdamWGroup) -> float:
        """1 - lr wd where the decay comes last."""
        return 1 - group.lr * group.weight_decay if self.on_gpu else 1.0


def decoded(
    saved: SavedState, names: Mapping[str, str]
) -> tuple[SavedState, dict[str, dict[str, BlockCodes]]]:
    """A state of bitsandbytes under other keys, in 32 bits, and what it keeps in 8 by key and parameter.

    Args:
        saved: the state.
        names: what is called ``state1`` and ``state2``, by number.

    Raises:
        CheckpointError: codes that do not fit their blocks and map.
    """
    codes: dict[str, dict[str, BlockCodes]] = {}
    entries: dict[str, dict[str, Any]] = {}
    for name, entry in saved.entries.items():
        entries[name] = {"step": entry["step"]}
        for number, key in names.items():
            tensor = entries[name][key] = entry[f"state{number}"]
            if tensor.dtype == torch.float32:
                continue
            parts: Any = tensor, entry.get(f"absmax{number}"), entry.get(f"qmap{number}")
            if problem := BlockCodes.problem(*parts):
                raise CheckpointError(
                    f"{saved.where}: state{number} of {name} has {problem}; copy the file again"
                )
            found = BlockCodes(*parts).to(saved.parameters[name].device)
            entries[name][key] = found.value
            codes.setdefault(key, {})[name] = found
    return replace(saved, entries=entries), codes
