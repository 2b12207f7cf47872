"""Stage ``noise``: how much the gradient, and its effect, differ from one update batch to another."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.noise.scale import noise_scale
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("noise.json",),
    config=("quantities", "baseline", "task", "reference", "batch_size"),
)
def noise(session: Session) -> Figures:
    """Gradient noise scale of the update batch; and of its effect on each quantity."""
    P = session.step.preconditioner
    found = noise_scale(
        session.policy,
        session.update,
        preconditioner=P,
        token_weights=session.step.token_weights,
        influences=() if P is None else tuple(fixed for fixed, *_ in session.influences),
        reference=session.reference,
        budget=session.budget,
    )
    runs.write_record(session.run.file("noise.json"), found)
    return {"noise_scale": found.noise_scale}
