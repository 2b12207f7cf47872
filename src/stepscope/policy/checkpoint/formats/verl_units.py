"""What FSDP1 keeps in one flat parameter: found again from the sizes of the moments.

With ``use_orig_params=False`` FSDP joins the parameters of each module that it wraps, without those of
wrapped modules inside, and pads them so that every process has as many numbers. Which modules it wraps
follows from a policy that the checkpoint does not keep. All policies that verl offers are tried with torch's
own functions (``get_fsdp_wrap_policy`` in ``verl/utils/fsdp_utils.py``, 0.9.1), and one counts only if it is
the single one whose sizes fit. Pinned by ``tests/policy/test_verl.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from torch import nn
from torch.distributed.fsdp.wrap import (
    _or_policy,
    _recursive_wrap,
    lambda_auto_wrap_policy,
    size_based_auto_wrap_policy,
    transformer_auto_wrap_policy,
)

from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import is_adapted

Units = list[list[str]]
"""Names of the parameters in each entry of the optimizer's state, in order."""

_Policy = Callable[..., bool]


def units_of(
    model: nn.Module, order: Sequence[str], sizes: Sequence[int | None], shards: int, *, where: str
) -> Units:
    """The parameters of each entry; none of one without state.

    Args:
        model: with ``requires_grad`` as in training.
        order: names of all its parameters, in the order that they had in training.
        sizes: numbers in each entry over all processes; None for one without state.
        shards: processes that share them.
        where: what to name in an error.

    Raises:
        CheckpointError: no way to join the parameters has these sizes, or several have.
    """
    each = [[name] for name in order]
    found = [_with_state(each, sizes)] if _fits(model, each, sizes, 1) else []
    for wrapped in _cuts(model, sizes, shards):
        units = _joined(order, wrapped)
        if _fits(model, units, sizes, shards):
            found.append(_with_state(units, sizes))
    if found and all(units == found[0] for units in found):
        return found[0]
    known = [size for size in sizes if size is not None]
    raise CheckpointError(
        f"{where}: {len(sizes)} entries, {len(known)} of them with moments of {sum(known)} numbers in all; "
        + (
            "FSDP joins the parameters of this model to entries of these sizes in several ways, which cannot "
            "be told apart; "
            if found
            else "no way in which FSDP joins the parameters of this model gives entries of these sizes, so "
            "they are those of another model, of another set of trained parameters, or of a wrap policy that "
            "is not verl's; "
        )
        + "save the run with use_orig_params=true or strategy=fsdp2"
    )


def _fits(model: nn.Module, units: Units, sizes: Sequence[int | None], multiple: int) -> bool:
    own = dict(model.named_parameters())
    return len(units) == len(sizes) and all(
        size is None
        or (
            size == -(-sum(own[name].numel() for name in unit) // multiple) * multiple
            and all(own[name].requires_grad for name in unit)
        )
        for unit, size in zip(units, sizes, strict=True)
    )


def _with_state(units: Units, sizes: Sequence[int | None]) -> Units:
    return [[] if size is None else unit for unit, size in zip(units, sizes, strict=True)]


def _joined(order: Sequence[str], wrapped: set[str]) -> Units:
    """The parameters by the innermost wrapped module around them, outer modules first."""
    units: dict[str, list[str]] = {}
    first: dict[str, int] = {}
    for place, name in enumerate(order):
        parts = name.split(".")
        around = [outer for i in range(len(parts)) if (outer := ".".join(parts[:i])) in wrapped or not i]
        for outer in around:
            first.setdefault(outer, place)
        units.setdefault(around[-1], []).append(name)
    return [units[outer] for outer in sorted(units, key=lambda outer: (first[outer], len(outer)))]


def _cuts(model: nn.Module, sizes: Sequence[int | None], shards: int) -> Iterator[set[str]]:
    """Names of the modules that each policy wraps, beside the model itself."""
    yield set()  # wrap_policy.disable
    inside = [module for module in model.modules() if module is not model]
    adapter = [partial(lambda_auto_wrap_policy, lambda_fn=_trained_leaf)] if is_adapted(model) else []
    named: Any = getattr(model, "_no_split_modules", None) or ()
    classes: list[set[type[nn.Module]]] = [{type(m) for m in inside if type(m).__name__ in set(named)}]
    classes += [{kind} for kind in dict.fromkeys(map(type, inside))]
    for chosen in classes:
        of_class = partial(transformer_auto_wrap_policy, transformer_layer_cls=chosen)
        yield _wrapped(model, partial(_or_policy, policies=[*adapter, of_class]))
    known = [size for size in sizes if size is not None]
    if len(known) == len(sizes) > 1:
        # the smallest entry that is not the model's own wraps what its threshold wraps, up to padding
        for smallest in {min(known), min(known[1:])}:
            for padding in range(shards):
                threshold = partial(size_based_auto_wrap_policy, min_num_params=max(1, smallest - padding))
                yield _wrapped(model, threshold)


def _trained_leaf(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return not list(module.children()) and weight is not None and bool(weight.requires_grad)


def _wrapped(model: nn.Module, policy: _Policy) -> set[str]:
    found: list[nn.Module] = []

    def record(module: nn.Module, **_: Any) -> nn.Module:
        found.append(module)
        return module

    _recursive_wrap(model, policy, record, set(), set(), only_wrap_children=True)
    chosen = {id(module) for module in found}
    return {name for name, module in model.named_modules() if id(module) in chosen and name}
