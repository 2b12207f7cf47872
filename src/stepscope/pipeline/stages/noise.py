"""Stage ``noise``: how much the gradient, and its effect, differ from one update batch to another."""

from __future__ import annotations

from dataclasses import replace

from stepscope import runs
from stepscope.measure.noise.scale import effect_noise_scale, noise_scale
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("noise.json",),
    config=("quantities", "baseline", "task", "reference", "batch_size"),
)
def noise(session: Session) -> Figures:
    """Gradient noise scale of the update batch; and of its effect on each quantity."""
    update = session.update
    found = noise_scale(
        session.policy,
        update,
        preconditioner=session.step.preconditioner,
        token_weights=session.step.token_weights,
        budget=session.budget,
    )
    effects = {}
    if session.step.preconditioner is not None:
        effects = {
            f"{quantity.name}_{quantity.normalisation}": effect_noise_scale(
                fixed.sequences, update.prompt_index, unit=f"{quantity.unit}/lr"
            )
            for quantity, (fixed, *_) in zip(session.quantities, session.influences, strict=True)
        }
    runs.write_record(session.run.file("noise.json"), replace(found, effects=effects))
    return {"noise_scale": found.noise_scale}
