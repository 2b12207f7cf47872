"""Stage ``influence``: what every sequence and token of the update batch has to do with the change."""

from __future__ import annotations

from stepscope import runs
from stepscope.measure.influence.attribution import neglected_share
from stepscope.measure.influence.reliability import reliabilities
from stepscope.measure.influence.shares import Influence
from stepscope.measure.influence.shrinkage import Shrunk, shrunk_influence
from stepscope.measure.step.nonlinear import neglected_part
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.rollouts import sample_responses
from stepscope.results.influence import (
    InfluenceSequences,
    InfluenceTokenFolds,
    InfluenceTokens,
    Reliabilities,
)
from stepscope.stats import Estimate

OWN_PROMPTS_SEED = 2**31
"""Added to the update batch's seed for fresh responses to its prompts, which must not be its own again."""

_SUMS = {"fixed": "influence_sequences", "optimizer": "influence_sequences_optimizer"}


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=(
        "influence_sequences.parquet",
        "influence_tokens.parquet",
        "influence_token_folds.parquet",
        "reliability.json",
    ),
    config=("quantities", "baseline", "own_prompts", "task", "reference", "batch_size"),
)
def influence(session: Session) -> Figures:
    """Influence of every sequence and token of the update batch on the change of each quantity."""
    found = session.influences
    every = [way for ways in found for way in ways]
    shrunk = _shrunk(session)
    beside = [s.tokens if (s := shrunk.get((w.quantity, w.through))) else None for w in every]
    runs.write_record(
        session.run.file("influence_sequences.parquet"),
        InfluenceSequences.joined([way.sequence_rows() for way in every]),
    )
    runs.write_record(
        session.run.file("influence_tokens.parquet"),
        InfluenceTokens.joined([way.token_rows(s) for way, s in zip(every, beside, strict=True)]),
    )
    runs.write_record(
        session.run.file("influence_token_folds.parquet"),
        InfluenceTokenFolds.joined([way.fold_rows() for way in every]),
    )
    sure = {(w.quantity, w.through): reliabilities(w, session.probe.num_prompts) for w in every}
    reliability = Reliabilities(
        rankings=tuple(order for both in sure.values() for order in both),
        shrunk=tuple(own.shrinkage for own in shrunk.values()),
    )
    doubts = session.doubt("step"), session.doubt("derivatives"), session.doubt("sampler")
    runs.write_record(session.run.file("reliability.json"), reliability.doubted(*doubts))
    primary = found[0]
    ranking = primary[-1]
    tokens, sequences = sure[ranking.quantity, ranking.through]
    own = shrunk.get((ranking.quantity, ranking.through))
    asked = own_influence(session)
    parts: dict[str, Estimate | None] = {
        **{_SUMS[way.through]: way.sum_of_sequences for way in primary},
        "influence_sequences_own_prompts": None if asked is None else asked.sum_of_sequences,
        "influence_neglected": neglected_share(*primary) if len(primary) == 2 else None,
        "influence_nonlinear": neglected_part(session.policy, session.step)
        if session.step.preconditioner is None
        else None,
        **{f"influence_{name}": part for name, part in primary[0].components.items()},
        "influence_total": primary[0].total,
        "rank_reliability_tokens": tokens.whole,
        "rank_reliability_sequences": sequences.whole,
        "probe_needed_tokens": tokens.needed,
        "probe_needed_sequences": sequences.needed,
        "shrinkage_gain": None if own is None else own.shrinkage.gain,
    }
    figures = {name: part for name, part in parts.items() if part is not None}
    return session.doubted(figures, "step", "derivatives", "sampler")


def _shrunk(session: Session) -> dict[tuple[str, str], Shrunk]:
    """The influence that ranks shrunk, by quantity and way, where there is something to shrink to.

    That is the one through the optimizer where there is one.
    """
    found = [
        shrunk_influence(
            session.policy,
            session.step,
            session.probe,
            ways[-1],
            quantity=quantity,
            bindings=session.bindings,
            budget=session.budget,
        )
        for quantity, ways in zip(session.quantities, session.influences, strict=True)
    ]
    return {(own.shrinkage.quantity, own.shrinkage.through): own for own in found if own is not None}


def own_influence(session: Session) -> Influence | None:
    """Fixed influence on the primary quantity, on fresh responses to the update batch's own prompts.

    None where the configuration does without, the quantity needs rewards, which nobody gives them, or there
    is no fixed influence.
    """
    primary = session.quantities[0]
    fixed = session.step.preconditioner is not None
    if not session.config.own_prompts or primary.needs_rewards or not fixed:
        return None
    fresh = sample_responses(
        session.policy,
        session.update.prompt_token_ids,
        seed=OWN_PROMPTS_SEED + session.config.update.seed,
        budget=session.budget,
    )
    quantity = session.quantity(primary.name, fresh)
    (found,) = session.influences_on(fresh, quantity, throughs=("fixed",), num_folds=1)
    return found
