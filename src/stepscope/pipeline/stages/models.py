"""Stage ``models``: models of the kernel on unseen prompts, and its spectrum against its null."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.kernel.models import ModelOptions
from stepscope.measure.kernel.null import NullOptions
from stepscope.measure.kernel.unseen import kernel_models
from stepscope.pipeline.stages.plan import UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session


@stage(reads=UPDATE, writes=("models.json",), config=("models", "task", "reference", "batch_size"))
def models(session: Session) -> Figures:
    """What of the Fisher kernel can be predicted without its gradients, and whether it has structure."""
    chosen = session.config.models
    report = kernel_models(
        session.policy,
        session.update,
        preconditioner=session.step.preconditioner,
        options=ModelOptions(
            folds=chosen.folds,
            inducing=chosen.inducing,
            pairs=chosen.pairs,
            width=chosen.width,
            steps=chosen.steps,
            seed=chosen.seed,
        ),
        null=NullOptions(signs=chosen.signs, draws=chosen.draws, seed=chosen.seed),
        budget=session.budget,
    )
    runs.write_record(session.run.file("models.json"), report)
    return {}
