"""Which items of such a checkpoint are an optimizer's state, and which are weights.

An optimizer's state is saved nested (``optimizer.state.NAME.exp_avg``, ``optimizer.param_groups.0.lr``) or
with flat keys (``state.NAME.exp_avg``, ``param_groups.NAME.lr``, a group's settings once for each parameter),
below whatever the trainer calls it: ``optimizer`` (accelerate), ``app.optimizers`` (prime-rl),
``optim.optim`` (NeMo-RL), ``optim`` (Automodel).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.formats.distributed.metadata import Directory, Place, Span
from stepscope.policy.checkpoint.formats.distributed.tensors import ChunkedTensor
from stepscope.policy.checkpoint.pickles import read_item

STATE, GROUPS = "state", "param_groups"

_FLAT = re.compile(rf"(?:(?P<above>.+?)\.)?(?P<kind>{STATE}|{GROUPS})\.(?P<rest>.+)")


@dataclass(frozen=True)
class Located:
    """Where an item stands in an optimizer's state.

    Attributes:
        root: what the trainer calls the optimizer.
        kind: of the two halves of a state.
        keys: below: a parameter's name and the key of its entry, or a group's number (or one of its
            parameters' names) and the key of its setting; nothing for all groups at once.
    """

    root: str
    kind: str
    keys: tuple[str, ...]


def located(place: Place) -> Located | None:
    """Where an item stands in an optimizer's state; None where it is no part of one."""
    parts = [str(part) for part in place]
    for i, part in enumerate(parts):
        rest = parts[i + 1 :]
        if part == STATE and len(rest) >= 2:
            return Located(".".join(parts[:i]), STATE, (rest[0], ".".join(rest[1:])))
        if part == GROUPS and len(rest) in (0, 2):
            return Located(".".join(parts[:i]), GROUPS, tuple(rest))
    if (found := _FLAT.fullmatch(parts[-1])) is None:
        return None
    name, _, key = found["rest"].rpartition(".")
    if not name:
        return None
    root = ".".join([*parts[:-1], *([found["above"]] if found["above"] else [])])
    return Located(root, found["kind"], (name, key))


@dataclass(frozen=True)
class Sorted:
    """A checkpoint's items: an optimizer's by root, the tensors that are in none."""

    states: Mapping[str, Mapping[tuple[str, ...], ChunkedTensor | Span]]
    groups: Mapping[str, Mapping[tuple[str, ...], Span | ChunkedTensor]]
    others: Mapping[str, ChunkedTensor]


def sort_items(directory: Directory) -> Sorted:
    """Every item to where it belongs."""
    halves: dict[str, dict[str, dict[tuple[str, ...], Any]]] = {
        STATE: defaultdict(dict),
        GROUPS: defaultdict(dict),
    }
    others: dict[str, ChunkedTensor] = {}
    for place, item in _items(directory):
        if (at := located(place)) is not None:
            halves[at.kind][at.root][at.keys] = item
        elif isinstance(item, ChunkedTensor):
            others[".".join(map(str, place))] = item
    whole = {root: found for root, found in halves[STATE].items() if root in halves[GROUPS]}
    return Sorted(whole, halves[GROUPS], others)


def optimizer_dict(items: Sorted, *, where: str) -> dict[str, Any]:
    """The state as ``state_dict()`` of an optimizer gives it, under the names of parameters.

    Raises:
        CheckpointError: no optimizer, or several; an item is damaged.
    """
    if len(items.states) != 1:
        names = ", ".join(repr(root) for root in items.states) or "none"
        raise CheckpointError(
            f"{where}: the states of {len(items.states)} optimizers are there ({names}), expected one; save "
            "the state of a single optimizer"
        )
    ((root, entries),) = items.states.items()
    state: dict[str, dict[str, Any]] = defaultdict(dict)
    for (name, key), item in entries.items():
        state[name][key] = _value(item, f"{where}: {key} of {name}")
    settings = {keys: _value(item, f"{where}: {'.'.join(keys)}") for keys, item in items.groups[root].items()}
    return {"state": dict(state), "param_groups": _groups(settings, where)}


def _groups(settings: Mapping[tuple[str, ...], Any], where: str) -> list[dict[str, Any]]:
    """Parameter groups out of their settings; flat ones are put together where all of them are the same."""
    if () in settings:
        found = settings[()]
        if isinstance(found, list) and all(isinstance(group, dict) for group in found):
            return found
        raise CheckpointError(f"{where}: its parameter groups are no list of settings; copy it again")
    gathered: dict[str, dict[str, Any]] = defaultdict(dict)
    for (owner, key), value in settings.items():
        gathered[owner][key] = value
    if all(owner.isdecimal() for owner in gathered):
        return [gathered[owner] for owner in sorted(gathered, key=int)]
    groups: dict[str, dict[str, Any]] = {}
    for name, own in gathered.items():
        group = groups.setdefault(repr(sorted(own.items())), own | {"params": []})
        group["params"].append(name)
    return list(groups.values())


def _items(directory: Directory) -> Iterator[tuple[Place, ChunkedTensor | Span]]:
    for place, entry in directory.tensors.items():
        yield place, ChunkedTensor(entry)
    yield from directory.values.items()


def _value(item: ChunkedTensor | Span, where: str) -> Any:
    return item[...] if isinstance(item, ChunkedTensor) else read_item(item.read(), where=where)
