"""To which parameters the running numbers of an optimizer's state belong, where no names were saved.

Trainers hand parameters over in groups, each in the model's order. The rules by which Hugging Face's Trainer
has made its two groups over the years are tried, each against the number of parameters and the shape of every
moment; so are layers that were frozen, and groups of the user's own. An order counts only if it is the single
one that fits.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from stepscope.errors import CheckpointError

Shape = tuple[int, ...] | None
"""Of a parameter; None where the state does not tell, and any fits."""

Groups = list[list[str]]

_Way = tuple[Any, int, str] | None

_NORMS = (r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)")
_RULES: tuple[tuple[str, ...], ...] = (_NORMS, ("bias", "layernorm", "rmsnorm"), ("bias",))
"""What transformers exempted from weight decay beside LayerNorm: today, for a while, and up to 4.49."""

MOST_GROUPS = 3
"""Groups of the user's own that are sorted out by shapes."""

NAMES = "build the optimizer from model.named_parameters() so that names are saved"


def decay_parameter_names(model: nn.Module, exempted: Sequence[str] = _NORMS) -> set[str]:
    """Names of the parameters to which Hugging Face's Trainer applies weight decay.

    All but those in a LayerNorm and those whose name says bias or norm, as
    ``transformers.Trainer.get_decay_parameter_names`` has it.

    Args:
        model: the model.
        exempted: patterns of the names without weight decay.
    """
    inside = {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if isinstance(module, nn.LayerNorm)
        for name, _ in module.named_parameters()
    }
    return {
        name
        for name, _ in model.named_parameters()
        if name not in inside and not any(re.search(pattern, name.lower()) for pattern in exempted)
    }


def names_in_order(
    shapes: Sequence[Sequence[Shape]], lrs: Sequence[float], model: nn.Module, *, where: str
) -> Groups:
    """The names of each group's parameters in the order of its numbers.

    Args:
        shapes: per group, the shape of each parameter.
        lrs: learning rate of each group; the Trainer's have one in common.
        model: with ``requires_grad`` as in training.
        where: what to name in an error.

    Raises:
        CheckpointError: no order fits the shapes, or several do.
    """
    trainable = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
    sizes, held = [len(group) for group in shapes], sum(map(len, shapes))
    made_by_trainer = len(shapes) <= 2 and len(set(lrs)) == 1
    rules = _by_rule(model, list(trainable), len(shapes)) if made_by_trainer else []
    whole = [r for r in rules if _fits(shapes, r, trainable)]
    if whole:
        return _single(whole, where, f"groups of {sizes} parameters fit this model in several orders")
    if held == len(trainable) and len(shapes) > 1:
        filled = [group for group in shapes if group]
        own = _interleaved(shapes, trainable) if len(filled) <= MOST_GROUPS else [[], [[]]]
        if own:
            return _single(
                own,
                where,
                f"{len(shapes)} parameter groups with learning rates {', '.join(map(str, lrs))} are not the "
                "Trainer's own and carry no names, and shapes do not tell which parameters are in which",
            )
    elif 0 < held < len(trainable) and rules:
        parts = [part for rule in rules for part in _embedded(shapes, rule, trainable)]
        if parts:
            return _single(
                parts,
                where,
                f"the optimizer holds {held} of the model's {len(trainable)} parameters, so layers were "
                "frozen, and the shapes do not tell which",
            )
    for rule in rules:
        if [len(names) for names in rule] == sizes:
            return rule  # whoever takes the moments names the one whose shape is wrong
    expected = [[len(names) for names in rule] for rule in rules[:1]] or [[len(trainable)]]
    raise CheckpointError(
        f"{where}: groups of {sizes} parameters, expected {expected[0]} for this model; their shapes fit "
        "none of its orders, so this is the optimizer state of another model or of another set of trainable "
        f"parameters: copy the one that belongs to these weights, or {NAMES}"
    )


def _single(found: list[Groups], where: str, otherwise: str) -> Groups:
    if any(other != found[0] for other in found[1:]):
        raise CheckpointError(f"{where}: {otherwise}; {NAMES}")
    return found[0]


def _by_rule(model: nn.Module, trainable: list[str], groups: int) -> list[Groups]:
    """What the model's order, or the Trainer's rules, would have in each group; each once."""
    if groups == 1:
        return [[trainable]]
    found: list[Groups] = []
    for rule in _RULES:
        decay = decay_parameter_names(model, rule)
        made = [[n for n in trainable if n in decay], [n for n in trainable if n not in decay]]
        if made not in found:
            found.append(made)
    return found


def _same(stored: Shape, own: tuple[int, ...]) -> bool:
    return stored is None or stored == own


def _fits(shapes: Sequence[Sequence[Shape]], names: Groups, own: dict[str, tuple[int, ...]]) -> bool:
    return all(
        len(group) == len(part) and all(_same(s, own[n]) for s, n in zip(group, part, strict=True))
        for group, part in zip(shapes, names, strict=True)
    )


def _embedded(
    shapes: Sequence[Sequence[Shape]], names: Groups, own: dict[str, tuple[int, ...]]
) -> list[Groups]:
    """Ways to leave names out of each group so that the rest fits: none, the only one, or two of them."""
    ways = [_subsequences(group, part, own) for group, part in zip(shapes, names, strict=True)]
    if not all(ways):
        return []
    return [[w[0] for w in ways], [w[-1] for w in ways]]


def _subsequences(
    shapes: Sequence[Shape], names: list[str], own: dict[str, tuple[int, ...]]
) -> list[list[str]]:
    """The first and the last subsequence of names that fits; they are the same where there is only one."""
    first, last = (_greedy(s, n, own) for s, n in ((shapes, names), (shapes[::-1], names[::-1])))
    return [first, last[::-1]] if first is not None and last is not None else []


def _greedy(shapes: Sequence[Shape], names: list[str], own: dict[str, tuple[int, ...]]) -> list[str] | None:
    found: list[str] = []
    for name in names:
        if len(found) < len(shapes) and _same(shapes[len(found)], own[name]):
            found.append(name)
    return found if len(found) == len(shapes) else None


def _interleaved(shapes: Sequence[Sequence[Shape]], own: dict[str, tuple[int, ...]]) -> list[Groups]:
    """Ways to deal the model's parameters out, in order, to the groups: none, the only one, or two of them.

    At each parameter those fillings of the groups are kept that its shape allows; two ways to one filling are
    two ways in all if that filling can be completed.
    """
    fillings: dict[tuple[int, ...], list[_Way]] = {(0,) * len(shapes): [None]}
    for name, shape in own.items():
        following: dict[tuple[int, ...], list[_Way]] = {}
        for filled, ways in fillings.items():
            for g, group in enumerate(shapes):
                if filled[g] < len(group) and _same(group[filled[g]], shape):
                    kept = following.setdefault((*filled[:g], filled[g] + 1, *filled[g + 1 :]), [])
                    kept.extend((way, g, name) for way in ways[: 2 - len(kept)])
        fillings = following
    return [_dealt(way, len(shapes)) for way in fillings.get(tuple(map(len, shapes)), [])]


def _dealt(way: _Way, count: int) -> Groups:
    groups: Groups = [[] for _ in range(count)]
    while way is not None:
        way, group, name = way
        groups[group].insert(0, name)
    return groups
