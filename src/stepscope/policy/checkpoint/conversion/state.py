"""An optimizer's state as ``optimizer.pt`` has it: under numbers, in the groups of Hugging Face's Trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.policy.checkpoint.parameter_order import decay_parameter_names
from stepscope.policy.optim.saved import SavedGroup, SavedState


def numbered_state(source: SavedState, model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """What ``torch.save`` is to write, and what of it is not as the Trainer would have it.

    The groups are the Trainer's two, with and without decay, where each has one set of settings in the
    source; else they are the source's own. Names are saved beside the numbers in either case.

    Args:
        source: the state with its parameters named.
        model: whose order the numbers follow.
    """
    lost: list[str] = []
    order = [name for name, _ in model.named_parameters() if name in source.entries]
    groups = _trainers(source.groups, order, decay_parameter_names(model))
    if groups is None:
        groups = [(_settings(group), list(group.names)) for group in source.groups]
        lost.append(
            f"the Trainer's two groups: the {len(groups)} of the run have settings of their own, so that the "
            "Trainer resumes only with the same groups"
        )
    held = sum(len(group.settings["params"]) for group in source.groups)
    if held > len(order):
        lost.append(f"{held - len(order)} parameters of the optimizer without a state: they had no gradient")
    state: dict[int, dict[str, Any]] = {}
    listed: list[dict[str, Any]] = []
    for settings, names in groups:
        numbers = list(range(len(state), len(state) + len(names)))
        state |= {
            number: {key: _alone(value) for key, value in source.entries[name].items()}
            for number, name in zip(numbers, names, strict=True)
        }
        listed.append({**settings, "params": numbers, "param_names": names})
    return {"state": state, "param_groups": listed}, lost


def _trainers(
    groups: Sequence[SavedGroup], order: Sequence[str], decayed: set[str]
) -> list[tuple[dict[str, Any], list[str]]] | None:
    """The Trainer's two groups; None where the settings of one of them differ."""
    owner = {name: group for group in groups for name in group.names}
    found: list[tuple[dict[str, Any], list[str]]] = []
    for names in ([n for n in order if n in decayed], [n for n in order if n not in decayed]):
        settings = [_settings(group) for group in {id(owner[n]): owner[n] for n in names}.values()]
        if any(repr(sorted(s.items())) != repr(sorted(settings[0].items())) for s in settings[1:]):
            return None
        found.append((settings[0] if settings else {}, names))
    (first, _), (second, _) = found
    without = {"weight_decay": 0.0} if "weight_decay" in first else {}
    return [(first or second, found[0][1]), (second or first | without, found[1][1])]


def _settings(group: SavedGroup) -> dict[str, Any]:
    return {key: v for key, v in group.settings.items() if key not in ("params", "param_names")}


def _alone(value: Any) -> Any:
    """A tensor that is saved without what else is in its memory."""
    if not isinstance(value, Tensor):
        return value
    whole = value.untyped_storage().nbytes() == value.numel() * value.element_size()
    return value.detach() if whole and value.is_contiguous() else value.detach().contiguous().clone()


def same_state(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Whether two entries of a parameter are the same to the bit."""
    return first.keys() == second.keys() and all(
        torch.equal(value, second[key]) and value.dtype == second[key].dtype
        if isinstance(value, Tensor) and isinstance(second[key], Tensor)
        else value == second[key]
        for key, value in first.items()
    )
