"""Did a resume keep the moments? The optimizer's states of a run's checkpoints, one against the next."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stepscope.policy.check.findings import Finding
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.formats.plain import Plain
from stepscope.policy.checkpoint.formats.registry import format_of_state
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.checkpoint.optimizer_state import OPTIMIZER_FILE, read_optimizer
from stepscope.policy.loss.settings import UNKNOWN
from stepscope.policy.numerics.finiteness import real_number, whole_number
from stepscope.policy.optim.registry import recognised

SECOND = "exp_avg_sq"
"""The running mean of squared gradients."""

HIGHEST = "max_exp_avg_sq"
"""AMSGrad's highest one."""

ROUND_OFF = 0.05
"""Share of a norm that types of 8 and 16 bits may lose."""

JUMP = 10.0
"""Factor between the norms of two checkpoints that is named; its square for second moments."""


@dataclass(frozen=True)
class Moments:
    """What is compared of an optimizer's state.

    Attributes:
        label: the optimizer.
        tensors: number of parameters that have a state.
        steps: the counts of steps that there are among parameters, ascending; empty where none are kept.
        norms: of each kept tensor over all parameters, by key.
        beta: the lowest decay of second moments in a step; None where the optimizer has no such.
        rates: the groups' learning rates, in their order.
    """

    label: str
    tensors: int
    steps: tuple[int, ...]
    norms: Mapping[str, float]
    beta: float | None
    rates: tuple[float, ...]

    @property
    def taken(self) -> int | None:
        """Steps taken, by the parameter that took most."""
        return self.steps[-1] if self.steps else None

    def typical(self, key: str) -> float:
        """A norm without the bias of a second moment's first steps, v / (1 - beta^t)."""
        norm = self.norms[key]
        if key != SECOND or self.beta is None or not self.taken:
            return norm
        return norm / (1 - self.beta**self.taken)


@reads_foreign
def read_moments(folder: Path) -> Moments | None:
    """The state of a checkpoint; None where it has none.

    ``optimizer.pt`` is read without a model, unless it holds codes of 8 bits; for all else the checkpoint is
    loaded.

    Raises:
        CheckpointError: it is damaged, of another optimizer, or not to be read.
    """
    known = format_of_state(folder)
    if "optimizer" not in known.holds(folder):
        return None
    return (_saved(folder / OPTIMIZER_FILE) if isinstance(known, Plain) else None) or _loaded(folder)


def _saved(file: Path) -> Moments | None:
    """By running number; None where tensors are codes."""
    saved = read_optimizer(file, lazily=True)
    where = str(file)
    kind, entries = recognised(saved, where)
    tensors: dict[str, list[Tensor]] = {}
    for entry in entries.values():
        for key, value in entry.items():
            if key != "step" and isinstance(value, Tensor):
                tensors.setdefault(key, []).append(value)
    if not all(t.is_floating_point() for each in tensors.values() for t in each):
        return None
    groups = saved["param_groups"]
    counts = {whole_number(e["step"], "step", where) for e in entries.values() if "step" in e}
    return Moments(
        label=kind.label,
        tensors=len(entries),
        steps=tuple(sorted(counts)),
        norms={key: _norm(each) for key, each in tensors.items()},
        beta=_beta(groups),
        rates=tuple(real_number(g["lr"], "lr of a parameter group", where) for g in groups),
    )


def _loaded(folder: Path) -> Moments:
    state = load_checkpoint(folder, settings=UNKNOWN).optimizer
    assert state is not None
    return Moments(
        label=state.label,
        tensors=len(state.names),
        steps=tuple(sorted(set(state.steps.values()))),
        norms={key: _norm(each.values()) for key, each in state.tensors().items() if each},
        beta=_beta([vars(group) for group in state.groups]),
        rates=tuple(g.lr if g.saved_lr is None else g.saved_lr for g in state.groups),
    )


def _norm(tensors: Iterable[Tensor]) -> float:
    return math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors))


def _beta(groups: Iterable[Mapping[str, Any]]) -> float | None:
    betas = [group.get("betas") for group in groups]
    if not betas or not all(isinstance(b, list | tuple) and len(b) == 2 for b in betas):
        return None
    lowest = min(real_number(b[1], "betas", "a parameter group") for b in betas if b)
    return lowest if 0 <= lowest < 1 else None


def state_finding(name: str, step: int, moments: Moments | None) -> Finding:
    """One checkpoint's state by itself."""
    if moments is None:
        if step == 0:
            return Finding("ok", f"{name}: the start, before there is an optimizer's state")
        cure = "save with save_only_model=False; a resume from it starts with fresh moments"
        return Finding("warn", f"{name}: no optimizer's state", cure)
    counts = "/".join(map(str, moments.steps))
    norms = ", ".join(f"{key} {norm:.3g}" for key, norm in moments.norms.items()) or "none kept"
    what = f"{name}: {moments.label} state of {moments.tensors} tensors" + (
        f", steps taken: {counts}; norms: {norms}" if counts else f"; norms: {norms}"
    )
    if broken := [key for key, norm in moments.norms.items() if not math.isfinite(norm)]:
        cure = "the run has diverged: go back to the checkpoint before"
        return Finding("fail", f"{what}; {', '.join(broken)} not finite", cure)
    if not moments.tensors and step:
        cure = "a fresh optimizer was saved: its moments are not those of the run"
        return Finding("fail", f"{what} after {step} steps", cure)
    if len(moments.steps) > 1:
        return Finding("warn", what, "parameters that got no gradient in some steps explain it; else see why")
    return Finding("ok", what)


def first_finding(name: str, step: int, moments: Moments) -> list[Finding]:
    """The first state that there is: its count against the trainer's."""
    if moments.taken is None or moments.taken == step:
        return []
    what = f"{name}: the optimizer has taken {moments.taken} steps and the trainer {step}"
    cure = "moments were lost at a resume before, unless the scaler of float16 skipped steps"
    return [Finding("warn", what, cure)]


def pair_findings(
    names: tuple[str, str], steps: tuple[int, int], states: tuple[Moments, Moments]
) -> list[Finding]:
    """One state against the next.

    A second moment v' = beta v + (1 - beta) g^2 is nowhere below beta^d v after d steps, and so is its norm:
    what is less was not gone on from. A count that begins anew was not, either.

    Pinned by ``tests/policy/test_run_health.py`` on a real TRL run that was resumed without its state.
    """
    (before, after), passed = states, steps[1] - steps[0]
    between = f"between {names[0]} and {names[1]}"
    if before.label != after.label:
        cure = "point at the checkpoints of one run"
        return [Finding("fail", f"{before.label} became {after.label} {between}", cure)]
    signs = [*_restarted(before, after, steps), *_collapsed(before, after, passed)]
    if signs:
        what = f"moments were lost at a resume {between}: {', '.join(signs)}"
        cure = "resume with the optimizer's state (resume_from_checkpoint at a folder that has it)"
        return [Finding("fail", what, cure)]
    found = []
    if before.taken is not None and after.taken is not None and after.taken - before.taken != passed:
        what = f"{between} the optimizer took {after.taken - before.taken} steps and the trainer {passed}"
        found.append(Finding("warn", what, "skipped steps (float16) explain it; else a resume lost moments"))
    if before.tensors != after.tensors:
        what = f"{between} the optimizer went from {before.tensors} tensors to {after.tensors}"
        found.append(Finding("warn", what, "make sure that the same parameters are trained"))
    return found + _jumps(before, after, between)


def _restarted(before: Moments, after: Moments, steps: tuple[int, int]) -> list[str]:
    old, new, passed = before.taken, after.taken, steps[1] - steps[0]
    if not old or new is None or passed <= 0:
        return []
    if new <= old or (new == passed and old == steps[0]):
        return [f"the step counter went from {old} to {new} in {passed} steps"]
    return []


def _collapsed(before: Moments, after: Moments, passed: int) -> list[str]:
    signs = []
    for key, beta in ((SECOND, before.beta), (HIGHEST, 1.0)):
        if beta is None or passed < 0 or key not in before.norms or key not in after.norms:
            continue
        least = beta**passed * before.norms[key]
        if after.norms[key] < (1 - ROUND_OFF) * least:
            signs.append(
                f"the norm of {key} fell from {before.norms[key]:.3g} to {after.norms[key]:.3g}, where "
                f"{passed} steps leave at least {least:.3g}"
            )
    return signs


def _jumps(before: Moments, after: Moments, between: str) -> list[Finding]:
    found = []
    for key in before.norms.keys() & after.norms.keys():
        old, new = before.typical(key), after.typical(key)
        limit = JUMP**2 if key in (SECOND, HIGHEST) else JUMP
        if old > 0 and not 1 / limit <= new / old <= limit:
            what = f"{between} the norm of {key} jumped from {old:.3g} to {new:.3g} (over {limit:g} times)"
            found.append(Finding("warn", what, "look at gradient norms and learning rates of these steps"))
    return sorted(found, key=lambda finding: finding.what)
