"""Stage ``noise``: how much the gradient, and its effect, differ from one update batch to another."""

from __future__ import annotations

from dataclasses import replace

from stepscope import runs
from stepscope.measure.noise.scale import effect_noise_scale, noise_scale
from stepscope.pipeline.stages.plan import UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.results.influence import InfluenceSequences


@stage(
    reads=(*UPDATE, "influence_sequences.parquet"),
    writes=("noise.json",),
    config=("quantities", "task", "reference", "batch_size"),
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
    table = runs.read_record(InfluenceSequences, session.run.file("influence_sequences.parquet"))
    table = table.where((table.component == "sequence") & (table.through == "fixed"))
    effects = {}
    for quantity in session.quantities:
        effects[f"{quantity.name}_{quantity.normalisation}"] = effect_noise_scale(
            table.influence[table.quantity == quantity.name],
            update.prompt_index,
            unit=f"{quantity.unit}/lr",
        )
    runs.write_record(session.run.file("noise.json"), replace(found, effects=effects))
    return {"noise_scale": found.noise_scale}
