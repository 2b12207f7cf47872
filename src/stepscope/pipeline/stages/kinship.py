"""Stage ``kinship``: what the tokens of the step act on."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.ledger.kin_step import kinship as kinship_of
from stepscope.measure.ledger.kinship import KinOptions
from stepscope.pipeline.stages.influence import OWN_PROMPTS_SEED
from stepscope.pipeline.stages.plan import STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.rollouts import sample_responses
from stepscope.results.kinship import BATCH, STEP_KINSHIP


@stage(
    reads=(*UPDATE, *STEP),
    writes=(STEP_KINSHIP,),
    config=("kinship", "update", "task", "reference", "batch_size"),
)
def kinship(session: Session) -> Figures:
    """What the step's tokens do to the entropy, by what they act on."""
    asked, update = session.config.kinship, session.update
    fresh = None
    if asked.fresh:
        seed = OWN_PROMPTS_SEED + session.config.update.seed
        fresh = sample_responses(session.policy, update.prompt_token_ids, seed=seed, budget=session.budget)
    found = kinship_of(
        session.policy,
        session.step,
        fresh=fresh,
        prompts=asked.prompts,
        options=KinOptions(tokens=asked.tokens, seed=asked.seed),
        budget=session.budget,
    )
    found = found.doubted(session.doubt("step"), session.doubt("derivatives"))
    runs.write_record(session.run.file(STEP_KINSHIP), found)
    return {f"kinship_{row.kin}": row.share for row in found.kin if row.look == BATCH}
