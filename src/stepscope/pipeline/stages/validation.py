"""Stage ``validation``: influence held against re-made steps."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.influence.validation import RemovalOptions, compare, remake_steps
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.results.validation import Validation, Validations


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("validation.json",),
    config=("validation", "quantities", "baseline", "task", "reference", "batch_size"),
)
def validation(session: Session) -> Figures:
    """Influence on the primary quantity, both ways, against steps re-made with other weights."""
    config = session.config
    ways = session.influences[0]
    artifact: dict[str, Validation] = {}
    figures: Figures = {}
    for removal in config.validation.removals:
        remade = remake_steps(
            session.policy,
            session.step,
            session.probe,
            ways[0],
            quantity=session.quantities[0],
            options=RemovalOptions(
                removal=removal,
                lr=session.stored_step.lr,
                num_subsets=config.validation.num_subsets,
                subset_share=config.validation.subset_share,
                num_single=config.validation.num_single,
                seed=config.validation.seed,
            ),
            budget=session.budget,
        )
        for way in ways:
            checked = compare(remade, way)
            name = removal if way.through == "fixed" else f"{removal}_{way.through}"
            artifact[name] = checked
            figures[f"lds_{name}"] = checked.lds
            figures[f"leave_one_out_{name}"] = checked.leave_one_out
            figures[f"lds_across_{name}"] = checked.lds_across
            figures[f"leave_one_out_across_{name}"] = checked.leave_one_out_across
    runs.write_record(
        session.run.file("validation.json"),
        Validations(artifact).doubted(session.doubt("step"), session.doubt("sampler")),
    )
    return session.doubted(figures, "step", "sampler")
