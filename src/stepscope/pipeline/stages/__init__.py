"""The stages of ``stepscope measure``, one module each; :data:`PLANS` has them in their order."""

from __future__ import annotations

from stepscope.config import Stage
from stepscope.pipeline.stages import (
    change,
    criteria,
    curvature,
    frontier,
    influence,
    kernel,
    kinship,
    models,
    noise,
    report,
    rollouts,
    step,
    validation,
)
from stepscope.pipeline.stages.plan import Plan

PLANS: dict[Stage, Plan] = {
    plan.name: plan
    for plan in (
        rollouts.rollouts,
        step.step,
        change.change,
        influence.influence,
        validation.validation,
        kernel.kernel,
        models.models,
        curvature.curvature,
        kinship.kinship,
        noise.noise,
        criteria.criteria,
        frontier.frontier,
        report.report,
    )
}
"""What each stage does, reads and leaves."""
