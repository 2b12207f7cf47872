"""Stage ``frontier``: the most reward that other weights of the batch buy at a change of the entropy."""

from __future__ import annotations

import numpy as np

from stepscope import runs
from stepscope.errors import BatchError
from stepscope.measure.criteria.facts import token_facts
from stepscope.measure.curvature.pairs import PairKernel
from stepscope.measure.frontier.curve import FrontierOptions
from stepscope.measure.frontier.curve import frontier as make_frontier
from stepscope.measure.frontier.effects import QUANTITIES
from stepscope.measure.quantity.base import make_quantity
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.results import BoolArray
from stepscope.rules import ClipCov, KlCov

CLIP_COV = ClipCov(fraction=0.01, low=0.3)
KL_COV = KlCov(fraction=0.02)
"""Published fractions are for batches of millions of tokens; of a few thousand they are a token or two."""


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("frontier.json",),
    config=("frontier", "curvature", "baseline", "task", "reference", "batch_size"),
)
def frontier(session: Session) -> Figures:
    """The frontier of entropy and reward, predicted and realised, and published rules beside it."""
    config = session.config
    if not np.isfinite(session.probe.rewards).all():
        raise BatchError(
            "frontier: the probe batch has no rewards, which it weighs against entropy; grade it"
        )
    found = make_frontier(
        session.policy,
        session.step,
        session.probe,
        kernels=_kernels(session) if config.frontier.second_order else None,
        rules=_rules(session) if config.frontier.realise else None,
        options=FrontierOptions(
            levels=config.frontier.levels,
            most=config.frontier.most,
            caution=config.frontier.caution,
            num_folds=config.frontier.folds,
            lr=session.stored_step.lr,
            baseline=config.baseline,
            realise=config.frontier.realise,
            seed=config.frontier.seed,
        ),
        bindings=session.bindings,
        budget=session.budget,
    )
    predicted = session.doubt("step"), session.doubt("derivatives"), session.doubt("sampler")
    found = found.doubted_by(predicted, (predicted[0], predicted[2]))
    runs.write_record(session.run.file("frontier.json"), found)
    return {
        "reward_gain_at_same_entropy": found.point("same_entropy").predicted.reward_gain,
        "entropy_gain_at_same_reward": found.point("same_reward").predicted.entropy_gain,
    }


def _kernels(session: Session) -> list[PairKernel]:
    return [
        session.pair_kernel(make_quantity(name, session.probe, normalisation=normalisation), signs=False)
        for name, normalisation in QUANTITIES
    ]


def _rules(session: Session) -> dict[str, BoolArray]:
    """Tokens that two published rules act on.

    KL-Cov holds them to the policy that sampled, which says nothing of a batch's first update; left out, they
    are held altogether.
    """
    facts = token_facts(session.policy, session.update, budget=session.budget)
    random = np.random.default_rng([session.policy.settings.seed, session.policy.step])
    left = CLIP_COV.advantages(facts, random)
    return {"clip_cov": (left == 0) & (facts.advantage != 0), "kl_cov": KL_COV.penalised(facts)}
