"""Which optimizer left a state: AdamW's is told from those that look like it by what its groups carry.

Many optimizers keep ``exp_avg`` and ``exp_avg_sq`` and take other steps with them. So a state counts as
AdamW's only where the keys of groups and entries are torch's AdamW's and none besides, or those of
bitsandbytes' 32-bit AdamW, whose step is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stepscope.errors import CheckpointError

MEASURABLE = (
    "a step can be rebuilt of torch's AdamW and of bitsandbytes' in 32 bits: train with optim='adamw_torch', "
    "'adamw_torch_fused' or 'paged_adamw_32bit'"
)
"""What to do about another optimizer."""

_NEEDED = frozenset({"lr", "betas", "eps", "weight_decay", "amsgrad", "maximize"})
_ADAMW = _NEEDED | {"params", "foreach", "capturable", "differentiable", "fused", "decoupled_weight_decay"}
_SCHEDULES = frozenset({"initial_lr", "max_lr", "min_lr", "swa_lr", "base_momentum", "max_momentum"})
_LABELS = frozenset({"param_names", "name", "group_name"})
_MOMENTS = frozenset({"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"})

_FLAGS = ("amsgrad", "maximize", "decoupled_weight_decay")

_BITSANDBYTES = "__bnb_optimizer_quant_state__"
_BITSANDBYTES_GROUP = frozenset(
    {"lr", "betas", "eps", "weight_decay", "params", "alpha", "t_alpha", "t_beta3"}
)

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
    ("Muon", frozenset({"ns_steps"})),
    ("SGD", frozenset({"dampening"})),
    ("a schedule-free optimizer", frozenset({"weight_sum"})),
    ("Adafactor", frozenset({"exp_avg_sq_row"})),
    ("Adafactor", frozenset({"beta2_decay"})),
    ("Adagrad", frozenset({"lr_decay"})),
    ("Adadelta", frozenset({"rho"})),
    ("RMSprop", frozenset({"square_avg"})),
    ("transformers' former AdamW or a variant of it", frozenset({"correct_bias"})),
)
"""Keys of groups or entries by which an optimizer is known, the most telling ones first."""

_PACKAGES = {
    "galore_torch": "GaLore",
    "apollo_torch": "APOLLO",
    "torchao": "a low-bit optimizer of torchao",
    "bitsandbytes": "an optimizer of bitsandbytes",
}


def adamw_entries(saved: Mapping[str, Any], where: str) -> dict[Any, dict[str, Any]]:
    """The state of AdamW by parameter number, with torch's names for what bitsandbytes names otherwise.

    Args:
        saved: ``state_dict()`` of the optimizer.
        where: what to name in an error.

    Raises:
        CheckpointError: it is the state of another optimizer, which is named where its keys tell.

    Pinned by ``tests/policy/test_optimizer_class.py`` on real optimizers. The GPU kernel of bitsandbytes
    decays after the update instead of before it, which differs by lr x weight_decay of the step.
    """
    _check_form(saved, where)
    entries = {number: _flat(entry) for number, entry in saved["state"].items()}
    keys = {str(key) for part in (*saved["param_groups"], *entries.values()) for key in part}
    for number, entry in entries.items():
        for key, value in entry.items():
            if isinstance(value, Tensor) and type(value) is not Tensor:
                raise _other(where, f"{key} of parameter {number} is torchao's {type(value).__name__}")
    if "state1" in keys:
        return _bitsandbytes(saved, entries, keys, where)
    grouped = {str(key) for group in saved["param_groups"] for key in group}
    unknown = (grouped - _ADAMW - _SCHEDULES - _LABELS) | (keys - grouped - _MOMENTS)
    lacking = _NEEDED - grouped
    if unknown or lacking:
        name = _name(keys, lacking)
        raise _other(where, f"the state is that of {name} ({_difference(unknown, lacking)})")
    return _complete(entries, where)


def made_by_torch(group: Mapping[str, Any]) -> bool:
    """Whether a group of a state that counts as AdamW's is torch's, not bitsandbytes'."""
    return set(group) >= _NEEDED


def named_by(classes: list[str]) -> str:
    """The optimizer whose state holds objects of these classes (``module.name``), for an error."""
    names = [c for c in classes if c.replace(".", "").replace("_", "").isalnum()][:3]
    known = next((_PACKAGES[p] for c in names if (p := c.partition(".")[0]) in _PACKAGES), "")
    return f"it holds {', '.join(n[:80] for n in names)}" + (f", it is that of {known}" if known else "")


def _check_form(saved: Mapping[str, Any], where: str) -> None:
    """Raise where it is not what ``state_dict()`` gives: groups with numbers of parameters, and states."""
    groups, state = saved["param_groups"], saved["state"]
    sound = isinstance(groups, list) and isinstance(state, Mapping)
    sound = sound and all(isinstance(g, Mapping) and isinstance(g.get("params"), list) for g in groups)
    sound = sound and all(isinstance(number, int) for g in groups for number in g["params"])
    sound = sound and all(isinstance(g.get(flag, False), bool) for g in groups for flag in _FLAGS)
    for kernels in ([g.get("foreach"), g.get("fused")] for g in groups if sound):
        sound = all(flag is None or isinstance(flag, bool) for flag in kernels) and not all(kernels)
    if not sound or not all(isinstance(entry, Mapping) for entry in state.values()):
        raise CheckpointError(
            f"{where}: param_groups and state are not laid out as torch.optim.AdamW.state_dict() gives them; "
            "copy the file again"
        )


def _complete(entries: dict[Any, dict[str, Any]], where: str) -> dict[Any, dict[str, Any]]:
    for number, entry in entries.items():
        absent = {"step", "exp_avg", "exp_avg_sq"} - set(entry)
        odd = [k for k, v in entry.items() if k != "step" and not isinstance(v, Tensor)]
        if absent or odd:
            raise CheckpointError(
                f"{where}: the state of parameter {number} lacks {', '.join(sorted(absent) or odd)} as "
                "tensors, expected AdamW's step and moments; copy the file again"
            )
    return entries


def _flat(entry: Mapping[str, Any]) -> dict[str, Any]:
    inner = entry.get(_BITSANDBYTES)
    rest = {key: value for key, value in entry.items() if key != _BITSANDBYTES}
    return rest | dict(inner) if isinstance(inner, Mapping) else rest


def _bitsandbytes(
    saved: Mapping[str, Any], entries: dict[Any, dict[str, Any]], keys: set[str], where: str
) -> dict[Any, dict[str, Any]]:
    """States with two moments of bitsandbytes; AdamW's has 32 bits and no further numbers in its groups."""
    kinds = {getattr(e.get(key), "dtype", None) for e in entries.values() for key in ("state1", "state2")}
    if kinds - {torch.float32, None}:
        raise _other(where, "the moments are bitsandbytes' in 8 bits")
    plain = all(
        _BITSANDBYTES_GROUP - {"alpha", "t_alpha", "t_beta3"} <= set(group)
        and set(group) <= _BITSANDBYTES_GROUP | _SCHEDULES | _LABELS
        and not group.get("alpha")
        and len(group.get("betas", ())) == 2
        for group in saved["param_groups"]
    )
    if not plain or not all({"step", "state1", "state2"} == set(entry) for entry in entries.values()):
        name = _name(keys, frozenset()) if "unorm_vec" in keys else "an optimizer of bitsandbytes, not AdamW"
        raise _other(where, f"the state is that of {name}")
    renamed = {
        number: {"step": e["step"], "exp_avg": e["state1"], "exp_avg_sq": e["state2"]}
        for number, e in entries.items()
    }
    return _complete(renamed, where)


def _name(keys: set[str], lacking: frozenset[str]) -> str:
    for name, marks in _MARKS:
        if marks <= keys:
            return name
    if lacking == {"amsgrad"} and {"exp_avg", "exp_avg_sq"} <= keys:
        return "RAdam or another relative of Adam"
    if lacking == {"maximize"}:
        return "torchao's AdamW or one like it"
    if "exp_avg" in keys and "exp_avg_sq" not in keys:
        return "Lion or another optimizer without second moments"
    return "another optimizer than AdamW"


def _difference(unknown: set[str], lacking: frozenset[str]) -> str:
    parts = [f"its keys {', '.join(sorted(k[:40] for k in unknown)[:4])} are not AdamW's"] * bool(unknown)
    parts += [f"it has no {', '.join(sorted(lacking))}"] * bool(lacking)
    return " and ".join(parts)


def _other(where: str, what: str) -> CheckpointError:
    return CheckpointError(f"{where}: {what}; {MEASURABLE}")
