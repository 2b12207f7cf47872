"""Stage ``kernel``: the Fisher kernel between sequences."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.kernel.fisher import fisher_kernel
from stepscope.pipeline.stages.plan import PROBE, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.gradients.projection import Sketch
from stepscope.results import write_arrays


@stage(
    reads=(*UPDATE, *PROBE),
    writes=("kernel.json", "kernel.safetensors"),
    config=("projection", "task", "reference", "batch_size"),
)
def kernel(session: Session) -> Figures:
    """Fisher kernel of the update batch with itself and with the probe batch."""
    config = session.config
    found = fisher_kernel(
        session.policy,
        session.update,
        session.probe,
        preconditioner=session.step.preconditioner,
        token_weights=session.step.token_weights,
        sketch=None if config.projection is None else Sketch(config.projection),
        budget=session.budget,
    )
    write_arrays(found.arrays(), session.run.file("kernel.safetensors"))
    runs.write_record(session.run.file("kernel.json"), found.report())
    return {"effective_rank": found.effective_rank}
