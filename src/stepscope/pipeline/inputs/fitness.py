"""What stands against measuring a checkpoint as a configuration asks: ``check`` shows it, ``measure`` stops.

Both verbs go through :func:`findings`, so that neither says yes to what the other refuses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import numpy as np

from stepscope.config import MeasureSettings, Stage
from stepscope.errors import MeasurementError
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.values import derivatives
from stepscope.policy.check.derivatives import random_direction
from stepscope.policy.check.examination import examine
from stepscope.policy.check.findings import Finding
from stepscope.policy.checkpoint.adapters import is_adapted
from stepscope.policy.checkpoint.first_pass import made_up_sequences
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.gradients.coverage import classify
from stepscope.policy.loss.registry import known_loss, loss_named
from stepscope.policy.loss.surrogate import adds_component, needs_reference
from stepscope.policy.optim.muon import MuonState
from stepscope.policy.sharding import sharded
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

DIFFERENTIATING: frozenset[Stage] = frozenset({"change", "influence", "validation", "criteria"})
"""Stages that need forward-mode derivatives of the model."""


@reads_foreign
def findings(policy: Policy, config: MeasureSettings, stages: list[Stage]) -> list[Finding]:
    """Everything known about a policy before it is measured.

    Args:
        policy: as loaded.
        config: the measurement asked for.
        stages: those that would run.
    """
    if sharded(policy.model) is not None and (against := unfit_for_parts(policy, config, stages)):
        return against
    found = [
        *examine(policy),
        *_loss(policy, config),
        *_remade_steps(policy, config, stages),
        *_shares(policy, stages),
    ]
    if DIFFERENTIATING.intersection(stages) and not any(f.level == "fail" for f in found):
        found.append(_derivatives(policy, config.second_order))
    return found


def left_out(policy: Policy, stages: Sequence[Stage]) -> dict[Stage, str]:
    """Stages that make no sense with a policy's optimizer, and why; the others are done without them."""
    state = policy.optimizer
    if state is None or "fixed" in state.throughs:
        return {}
    why: dict[Stage, str] = {
        "curvature": f"{state.nonlinear}, and no preconditioner makes a sum over sequences of it",
        "kinship": f"{state.nonlinear}, and no preconditioner makes a sum over tokens of it",
        "criteria": f"{state.nonlinear}, and no preconditioner tells tokens apart one by one",
        "frontier": f"{state.nonlinear}, and no preconditioner makes a sum over sequences of it",
    }
    return {stage: reason for stage, reason in why.items() if stage in stages}


def _shares(policy: Policy, stages: Sequence[Stage]) -> list[Finding]:
    """What a step that is not linear in its gradient leaves of what is said of sequences and tokens."""
    state = policy.optimizer
    if state is None or not state.nonlinear:
        return []
    found = []
    gone = left_out(policy, stages)
    for stage, why in gone.items():
        level: Literal["warn", "fail"] = "warn" if set(stages) - {*gone, "report"} else "fail"
        found.append(
            Finding(
                level,
                f"the stage {stage} is left out: {why}",
                "measure without it, or see re-made steps (--validate)",
            )
        )
    fixed = "fixed" in state.throughs
    shared = "are by each coordinate that the batch turns" if fixed else "are derivatives at the batch"
    found.append(
        Finding(
            "warn",
            f"{state.nonlinear}: shares of sequences and tokens {shared}, and not parts of the step",
            "hold them against re-made steps (--validate)",
        )
    )
    if not fixed and {"kernel", "noise"}.intersection(stages):
        what = f"{state.label} has no metric: kernel and noise scale are those of the plain gradient"
        found.append(Finding("warn", what, "read them so"))
    if not fixed and policy.settings.objective is not None and policy.settings.objective.measures:
        what = (
            "the loss changes advantages by their influence, which takes a preconditioner, and there is none"
        )
        found.append(Finding("fail", what, "measure a checkpoint of AdamW"))
    others = sum(not p.requires_grad for p in policy.model.parameters())
    if isinstance(state, MuonState) and policy.settings.max_grad_norm > 0 and others:
        what = f"the gradient is clipped by the norm of Muon's matrices, {others} other parameters left out"
        found.append(
            Finding("warn", what, "give loss.max_grad_norm if the run had gradients of the others too")
        )
    return found


def unfit_for_parts(policy: Policy, config: MeasureSettings, stages: list[Stage]) -> list[Finding]:
    """What cannot be done with parameters of which each process holds a part."""
    against = []
    if slow := classify(policy).slow:
        against.append(
            f"{slow[0]} has no gradient by sequence but by a pass for each ({len(slow)} such parameters)"
        )
    if config.projection is not None and "kernel" in stages:
        against.append("a random projection of gradients needs whole parameters")
    if "curvature" in stages:
        against.append("Hessian-vector products (stage curvature) need whole parameters")
    if "kinship" in stages:
        against.append("gradients of single tokens (stage kinship) need whole parameters")
    if "models" in stages:
        against.append("models of the kernel (stage models) need the head in one piece")
    if "frontier" in stages:
        against.append("weights of sequences (stage frontier) were not tried on parts of parameters")
    drawn = any(batch.file is None for batch in (config.update, config.probe))
    if config.sampler.engine != "transformers" and "rollouts" in stages and drawn:
        against.append(f"the sampler {config.sampler.engine} cannot run a model that is sharded")
    if policy.optimizer is not None and policy.optimizer.half_types:
        kinds = "/".join(policy.optimizer.half_types)
        against.append(f"the training kept weights in {kinds}, and the rounded step is taken on whole ones")
    return [Finding("fail", what, "measure without --shard") for what in against]


def _loss(policy: Policy, config: MeasureSettings) -> list[Finding]:
    """Divergences without a reference to take them to."""
    found = []
    if config.reference is None and not is_adapted(policy.model):
        cure = f"give reference={_start(policy)} (the model that the training started from)"
        settings = policy.settings
        if known_loss(settings.loss_type) and needs_reference(settings):
            what = f"the loss looks at a reference (beta = {settings.beta}), and a full model has no base"
            without = ", or loss.beta=0 for the step without it"
            found.append(Finding("fail", what, cure + without * (not loss_named(settings.loss_type).pairs)))
        if settings.kl_in_reward != 0.0:
            what = f"rewards have a KL penalty ({settings.kl_in_reward}), and a full model has no base"
            found.append(Finding("fail", what, cure + ", or loss.kl_in_reward=0 for the step without it"))
        if "kl" in config.quantities:
            found.append(
                Finding("fail", "kl needs a reference, and a full model has no base beside it", cure)
            )
    return found


def _start(policy: Policy) -> str:
    """The policy before the first step of the same run, where it lies beside the checkpoint."""
    start = None if policy.path is None else policy.path.parent / "step-0"
    return "MODEL" if start is None or not (start / "config.json").is_file() else str(start)


def _remade_steps(policy: Policy, config: MeasureSettings, stages: list[Stage]) -> list[Finding]:
    """Steps taken again without some sequences or tokens, where something in the loss belongs to none."""
    part = adds_component(policy.settings)
    if not part:
        return []
    what = f"the loss has {part}, which belongs to no sequence, and {{}} takes steps again without some"
    found = []
    if "validation" in stages:
        found.append(Finding("fail", what.format("validation"), "measure without --validate"))
    if "frontier" in stages:
        found.append(Finding("fail", what.format("the stage frontier"), "leave the stage frontier out"))
    if "criteria" in stages and config.criteria.drop_shares:
        cure = "give criteria.drop_shares=[], or leave the stage criteria out"
        found.append(Finding("fail", what.format("the stage criteria"), cure))
    return found


def _derivatives(policy: Policy, second_order: bool) -> Finding:
    """Whether torch can differentiate the model as the change needs it, tried on made-up sequences."""
    direction = random_direction(policy)
    rollouts = _made_up(policy)
    orders = (1, 2) if second_order else (1,)
    try:
        for order in orders:
            derivatives(policy, rollouts, [make_quantity("entropy", rollouts)], direction, order=order)
    except MeasurementError as error:
        return Finding.from_error(error)
    return Finding("ok", f"derivatives of order {orders[-1]} along a direction exist for every operation")


def _made_up(policy: Policy) -> Rollouts:
    prompts, responses = made_up_sequences(policy)
    count = len(prompts)
    zeros = tuple(np.zeros(len(r)) for r in responses)
    return Rollouts(
        prompt_ids=tuple(map(str, range(count))),
        prompts=("",) * count,
        responses=("",) * count,
        prompt_token_ids=tuple(map(tuple, prompts)),
        response_token_ids=tuple(map(tuple, responses)),
        rewards=np.zeros(count),
        correct=np.zeros(count, dtype=np.bool_),
        truncated=np.zeros(count, dtype=np.bool_),
        logprobs=zeros,
        entropies=zeros,
        temperature=policy.settings.temperature,
        max_response_tokens=policy.settings.max_response_tokens,
    )
