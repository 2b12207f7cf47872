"""Stage ``step``: the optimizer step rebuilt, and the token weights it gives the update batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import numpy as np

from stepscope import runs
from stepscope.measure.step.lifetime import lifetime, lifetime_figures
from stepscope.measure.step.rounding import RoundedStep
from stepscope.measure.step.routing import routing_change, routing_figures
from stepscope.measure.step.sequence_shares import sequence_share_figures, sequence_shares
from stepscope.measure.step.storage import storage_figures, storage_loss
from stepscope.pipeline.stages.plan import STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy import vectors
from stepscope.policy.group import current
from stepscope.results import RolloutTokens
from stepscope.stats import Estimate, exact

T = TypeVar("T")


@stage(reads=UPDATE, writes=(*STEP, "update_tokens.parquet"), config=("task", "reference", "batch_size"))
def step(session: Session) -> Figures:
    """Rebuild the optimizer step, store its direction, and add the token weights to the update batch."""
    step = session.step
    path = session.run.file("update_tokens.parquet")
    weights = np.concatenate(step.token_weights).astype(np.float64, copy=False)
    tokens = current().from_main(lambda: runs.read_record(RolloutTokens, path))
    runs.write_record(path, replace(tokens, token_weight=weights))
    initial_lr = session.initial_lr() if step.lr == 0 else None
    routing = routing_change(
        session.policy,
        step,
        lr=step.lr or initial_lr or 0.0,
        taken=session.taken.parameters if session.taken else None,
        budget=session.budget,
    )
    report = replace(
        step.report(),
        initial_lr=initial_lr,
        stored_dtypes=session.policy.stored_dtypes,
        doubt=session.doubt("step"),
        rounding=session.taken.report() if session.taken else None,
        storage=storage_loss(session.policy, step),
        routing=routing,
        gradient=sequence_shares(session.policy, step, budget=session.budget),
        lifetime=lifetime(session.policy, step),
    )
    vectors.save(step.direction, session.run.file("direction.safetensors"))
    runs.write_record(session.run.file("step.json"), report)
    count = session.update.num_prompts
    shares = {
        f"share_{name}": exact(
            part.share,
            count,
            "share of the step",
            f"<{name}, direction>/|direction|^2, exact for this update batch",
        )
        for name, part in report.components.items()
    }
    found = (
        shares
        | _figures(report.lifetime, lifetime_figures, count)
        | _figures(report.storage, storage_figures, count)
    )
    own = _figures(report.routing, routing_figures, count)
    own |= _figures(report.gradient, sequence_share_figures, count)
    if session.taken is None:  # else these are of the step as taken, and of a gradient, which is not rounded
        own = session.doubted(own, "step")
    assert session.policy.optimizer is not None
    rounding = _rounding_figures(session.taken, session.policy.optimizer.label, count)
    return session.doubted(found, "step") | own | rounding


def _figures(found: T | None, figures: Callable[[T, int], dict[str, Estimate]], count: int) -> Figures:
    """The headline figures of what the step has; none of what it has not."""
    return {} if found is None else figures(found, count)


def _rounding_figures(taken: RoundedStep | None, optimizer: str, count: int) -> Figures:
    """How the step as taken in a half type differs from that before rounding; nothing where it does not."""
    if taken is None:
        return {}
    how = f"torch's {optimizer} in {taken.kept_in}, {taken.kernel}, at lr {taken.lr:g}"
    how += "; exact for this update batch"
    none = "" if taken.share_moved else "no coordinate moves"
    return {
        name: Estimate(value, float("nan"), count, unit, how, not doubt, doubt)
        for name, value, unit, doubt in (
            ("rounding_share_moved", taken.share_moved, "share of coordinates", ""),
            ("rounding_cosine", taken.cosine, "1", none),
            ("rounding_norm_ratio", taken.norm_ratio, "1", ""),
        )
    }
