"""Which optimizer left a state: told by the keys of its groups and entries, never by what is usual.

Many optimizers keep ``exp_avg`` and ``exp_avg_sq`` and take other steps with them. So a state is one's only
where the keys are that optimizer's and none besides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy.optim.adafactor import AdafactorState
from stepscope.policy.optim.adamw import AdamState, AdamWState
from stepscope.policy.optim.base import OptimizerState
from stepscope.policy.optim.bitsandbytes import NESTED, BitsAndBytesAdamW
from stepscope.policy.optim.deepspeed import DeepSpeedAdam
from stepscope.policy.optim.lion import BitsAndBytesLion, LionState
from stepscope.policy.optim.muon import MuonState
from stepscope.policy.optim.saved import SavedGroup, SavedState
from stepscope.policy.optim.schedule_free import ScheduleFreeAdamW, ScheduleFreeSGD
from stepscope.policy.optim.sgd import SGDState
from stepscope.policy.optim.transformers_adafactor import TransformersAdafactorState

OPTIMIZERS: list[type[OptimizerState]] = [
    AdamWState,
    AdamState,
    BitsAndBytesAdamW,
    DeepSpeedAdam,
    SGDState,
    AdafactorState,
    TransformersAdafactorState,
    ScheduleFreeAdamW,
    ScheduleFreeSGD,
    MuonState,
    LionState,
    BitsAndBytesLion,
]
"""Those whose step can be rebuilt; one more is a class like these and an entry here."""

_SCHEDULES = frozenset({"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"})
_LABELS = frozenset({"params", "param_names", "name", "group_name"})
_FLAGS = ("amsgrad", "maximize", "nesterov", "decoupled_weight_decay")

_MARKS: tuple[tuple[str, frozenset[str]], ...] = (
    ("an AdamW with Kahan summation", frozenset({"compensation"})),
    ("AnyPrecisionAdamW", frozenset({"use_kahan_summation"})),
    ("NAdam", frozenset({"momentum_decay"})),
    ("Adamax", frozenset({"exp_inf"})),
    ("a low-rank projection of the gradient (GaLore, APOLLO)", frozenset({"update_proj_gap"})),
    ("a cautious AdamW", frozenset({"caution"})),
    ("a cautious AdamW", frozenset({"cautious"})),
    ("AdEMAMix", frozenset({"exp_avg_slow"})),
    ("AdEMAMix", frozenset({"beta3_warmup"})),
    ("Adan", frozenset({"exp_avg_diff"})),
    ("LAMB", frozenset({"trust_clip"})),
    ("LAMB", frozenset({"unorm_vec"})),
    ("Muon and AdamW in one optimizer", frozenset({"use_muon"})),
    ("an optimizer of the package dion", frozenset({"algorithm", "mu"})),
    ("a Muon other than torch's", frozenset({"ns_steps"})),
    ("a Muon other than torch's", frozenset({"backend_steps"})),
    ("schedule-free RAdam", frozenset({"silent_sgd_phase"})),
    ("a schedule-free optimizer", frozenset({"weight_sum"})),
    ("Adafactor or a relative of it", frozenset({"exp_avg_sq_row"})),
    ("Adagrad", frozenset({"lr_decay"})),
    ("Adadelta", frozenset({"rho"})),
    ("RMSprop", frozenset({"square_avg"})),
    ("transformers' former AdamW or a variant of it", frozenset({"correct_bias"})),
    ("an optimizer of bitsandbytes in 8 bits without blocks, of 2022,", frozenset({"new_max1"})),
    ("an optimizer of bitsandbytes with percentile clipping", frozenset({"gnorm_vec"})),
    ("an optimizer of bitsandbytes, not AdamW or Lion", frozenset({"state1"})),
)
"""Keys by which an optimizer is known that is not rebuilt, the most telling ones first."""

_PACKAGES = {
    "galore_torch": "GaLore",
    "apollo_torch": "APOLLO",
    "torchao": "a low-bit optimizer of torchao",
    "bitsandbytes": "an optimizer of bitsandbytes",
}

Entries = dict[Any, dict[str, Any]]


def measurable() -> str:
    """What to do about another optimizer."""
    labels = ", ".join(kind.label for kind in OPTIMIZERS)
    names = ", ".join(repr(name) for kind in OPTIMIZERS for name in kind.asked_for)
    return f"a step can be rebuilt of {labels}: train with optim={names}"


def recognised(saved: Mapping[str, Any], where: str) -> tuple[type[OptimizerState], Entries]:
    """The optimizer that left a state, and its entries by parameter number.

    Args:
        saved: ``state_dict()`` of the optimizer.
        where: what to name in an error.

    Raises:
        CheckpointError: it is the state of another optimizer, which is named where its keys tell.

    Pinned by ``tests/policy/test_optimizer_class.py`` on real optimizers.
    """
    _check_form(saved, where)
    groups = saved["param_groups"]
    entries = {number: _flat(entry) for number, entry in saved["state"].items()}
    for number, entry in entries.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and type(value) is not Tensor:
                raise _other(where, f"{key} of parameter {number} is torchao's {type(value).__name__}")
    in_groups = {str(key) for group in groups for key in group}
    in_entries = {str(key) for entry in entries.values() for key in entry}
    odd = {kind: _difference(kind, in_groups, in_entries) for kind in OPTIMIZERS}
    fitting = [kind for kind, (unknown, lacking) in odd.items() if not unknown | lacking]
    if not fitting:
        nearest = min(odd, key=lambda kind: len(odd[kind][0] | odd[kind][1]))
        unknown, lacking = odd[nearest]
        name = _name(in_groups | in_entries, lacking)
        raise _other(where, f"the state is that of {name} ({_words(nearest, unknown, lacking)})")
    kind = fitting[0]
    if kind.blank_entries:
        entries = {number: entry for number, entry in entries.items() if entry}
    for number, entry in entries.items():
        absent = kind.keys.entry - set(entry)
        bare = [key for key, value in entry.items() if key != "step" and not isinstance(value, Tensor)]
        if absent or bare:
            raise CheckpointError(
                f"{where}: the state of parameter {number} lacks {', '.join(sorted(absent) or bare)} as "
                f"tensors, expected what {kind.label} keeps; copy the file again"
            )
    if any(group.get("maximize") for group in groups):
        raise CheckpointError(f"{where}: the optimizer maximizes, expected one that minimizes a loss")
    objections = {kind: kind.objection(groups, entries) for kind in fitting}
    accepting = [kind for kind, problem in objections.items() if not problem]
    if not accepting:
        raise _other(where, " and ".join(dict.fromkeys(objections.values())))
    return accepting[0], entries


def shape_of(kind: type[OptimizerState], entry: Mapping[str, Any]) -> tuple[int, ...] | None:
    """The shape of the parameter that an entry is of; None where it does not tell."""
    return kind.shape_in(entry)


def named_state(
    saved: Mapping[str, Any],
    names_by_group: Sequence[Sequence[str]],
    model: nn.Module,
    *,
    where: str,
    dtype: torch.dtype | None = None,
    parameters: Mapping[str, Tensor] | None = None,
) -> OptimizerState:
    """An optimizer's state once it is known which of a model's parameters are in its groups.

    Args:
        saved: ``state_dict()`` of the optimizer.
        names_by_group: names of each group's parameters in the order of its ``params``, which are numbers or,
            in some formats, those names.
        model: the model.
        where: what to name in an error.
        dtype: type of the moments; None leaves bfloat16 and float16 at float32 and wider ones as they are.
        parameters: by name, where they are not the model's own but this process's parts of them.

    Returns:
        The state on the devices of the parameters. A parameter without state got no gradient in the whole
        run; it is left out of the groups.

    Raises:
        CheckpointError: another optimizer, another model, a shape that does not fit, no state at all, or one
            that the optimizer cannot have reached.
    """
    kind, entries = recognised(saved, where)
    groups: list[SavedGroup] = []
    by_name: dict[str, dict[str, Any]] = {}
    parameters, blank = parameters or dict(model.named_parameters()), list[str]()
    for group, names in zip(saved["param_groups"], names_by_group, strict=True):
        none: dict[str, Any] | None = {} if kind.keeps_nothing(group) else None
        named = {name: entries.get(n, none) for n, name in zip(group["params"], names, strict=True)}
        kept = {name: entry for name, entry in named.items() if entry is not None}
        groups.append(SavedGroup(group, tuple(kept), where))
        by_name |= kept
        blank += [name for name in named if name not in kept and parameters[name].requires_grad]
    if not by_name:
        count = sum(map(len, names_by_group))
        raise CheckpointError(
            f"{where}: there is no state for any of {count} parameters (an optimizer before its first step); "
            "use a checkpoint saved after at least one step"
        )
    source = SavedState(groups, by_name, parameters, where, dtype)
    state = replace(kind.read(source), blank=tuple(blank), source=source)
    state.refuse_impossible(where)
    return state


def kind_of(optimizer: object) -> type[OptimizerState] | None:
    """What a running optimizer is; None for one whose steps cannot be rebuilt."""
    return next((kind for kind in OPTIMIZERS if kind.runs(optimizer)), None)


def named_by(classes: list[str]) -> str:
    """The optimizer whose state holds objects of these classes (``module.name``), for an error."""
    names = [c for c in classes if c.replace(".", "").replace("_", "").isalnum()][:3]
    known = next((_PACKAGES[p] for c in names if (p := c.partition(".")[0]) in _PACKAGES), "")
    return f"it holds {', '.join(n[:80] for n in names)}" + (f", it is that of {known}" if known else "")


def _check_form(saved: Mapping[str, Any], where: str) -> None:
    """Raise where it is not what ``state_dict()`` gives: groups of parameters, and their states."""
    groups, state = saved["param_groups"], saved["state"]
    sound = isinstance(groups, list) and isinstance(state, Mapping)
    sound = sound and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    sound = sound and all(isinstance(key, int | str) for g in groups for key in g["params"])
    sound = sound and all(isinstance(g.get(flag, False), bool) for g in groups for flag in _FLAGS)
    for kernels in ([g.get("foreach"), g.get("fused")] for g in groups if sound):
        sound = all(flag is None or isinstance(flag, bool) for flag in kernels) and not all(kernels)
    if not sound or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise CheckpointError(
            f"{where}: param_groups and state are not laid out as state_dict() of a torch optimizer gives "
            "them; copy the file again"
        )


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    inner = entry.get(NESTED)
    flat = {**entry, **inner} if isinstance(inner, Mapping) else entry
    return {key: value for key, value in flat.items() if key != NESTED and value is not None}


def _difference(
    kind: type[OptimizerState], in_groups: set[str], in_entries: set[str]
) -> tuple[frozenset[str], frozenset[str]]:
    """Keys that an optimizer does not have, and keys of its own that are not there."""
    keys = kind.keys
    unknown = in_groups - keys.group - keys.group_optional - _SCHEDULES - _LABELS
    unknown |= in_entries - in_groups - keys.entry - keys.entry_optional
    lacking = keys.group - in_groups
    return frozenset(unknown), lacking | (keys.entry - in_entries) if in_entries else lacking


def _name(keys: set[str], lacking: frozenset[str]) -> str:
    for name, marks in _MARKS:
        if marks <= keys:
            return name
    if lacking == {"amsgrad"} and {"exp_avg", "exp_avg_sq"} <= keys:
        return "RAdam or another relative of Adam"
    if lacking == {"maximize"}:
        return "torchao's Adam or AdamW, where nothing says if the decay is inside or the rounding random,"
    if "exp_avg" in keys and "exp_avg_sq" not in keys:
        return "Lion or another optimizer without second moments"
    return "another optimizer"


def _words(kind: type[OptimizerState], unknown: frozenset[str], lacking: frozenset[str]) -> str:
    named = ", ".join(sorted(k[:40] for k in unknown)[:4])
    parts = [f"its keys {named} are not of {kind.label}"] * bool(unknown)
    parts += [f"it has no {', '.join(sorted(lacking))}"] * bool(lacking)
    return " and ".join(parts)


def _other(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}; {measurable()}")
