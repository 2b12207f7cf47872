"""Stage ``criteria``: published criteria against the measured influence."""

from __future__ import annotations

import numpy as np

from stepscope import runs
from stepscope.measure.criteria.leaderboard import Leaderboard, RankingOptions, rank_criteria
from stepscope.measure.criteria.pareto import AblationOptions, drop_rules, drop_tokens
from stepscope.measure.criteria.regression import property_study
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.quantity.base import make_quantity
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.products import paired_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.results import FloatArray
from stepscope.results.criteria import Pareto


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("criteria.json", "criteria_tokens.parquet", "pareto.json"),
    config=("criteria", "baseline", "task", "reference", "batch_size"),
)
def criteria(session: Session) -> Figures:
    """Leaderboard of the criteria against the measured effects, and what kind of token carries influence."""
    config = session.config
    board = rank_criteria(
        session.policy,
        session.step,
        session.probe,
        options=RankingOptions(
            baseline=config.baseline,
            max_diagonal=config.criteria.diagonal_tokens,
            micro_batch_size=config.criteria.micro_batch_size,
            seed=config.criteria.seed,
            learned=config.criteria.learned,
        ),
        bindings=session.bindings,
        budget=session.budget,
    )
    column = board.truth("column", "adamw", "on_policy")
    studies = property_study(
        board.facts, column.values, kernel_norm=_kernel_norms(session), unit="nats/token/lr"
    )
    doubts = session.doubt("step"), session.doubt("derivatives"), session.doubt("sampler")
    runs.write_record(session.run.file("criteria.json"), board.report(studies).doubted(*doubts))
    runs.write_record(session.run.file("criteria_tokens.parquet"), board.tokens())
    pareto = _drop_tokens(session, board).doubted(session.doubt("step"), session.doubt("sampler"))
    runs.write_record(session.run.file("pareto.json"), pareto)
    figures = {f"influence_top_{share}": figure for share, figure in board.concentration(column).items()}
    return session.doubted(figures, "step", "derivatives", "sampler")


def _drop_tokens(session: Session, board: Leaderboard) -> Pareto:
    """Steps taken again without the tokens that the exact influence or a criterion would drop."""
    config = session.config
    rules = {}
    half = board.truth("column", "adamw", "on_policy").probe_half
    if config.criteria.drop_shares:
        # of a response; the stage influence measures the reward per token
        reward = influence(
            session.policy,
            session.step,
            session.update,
            session.probe,
            quantity=make_quantity("reward", session.probe, normalisation="per_seq"),
            options=InfluenceOptions(
                baseline=config.baseline, groups=half, num_folds=2, bindings=session.bindings
            ),
            budget=session.budget,
        )
        rules = drop_rules(board, reward_influence=reward.fold_tokens, seed=config.criteria.seed)
    return drop_tokens(
        session.policy,
        session.step,
        session.probe,
        rules,
        probe_half=half,
        options=AblationOptions(
            shares=tuple(config.criteria.drop_shares), lr=session.stored_step.lr, baseline=config.baseline
        ),
        bindings=session.bindings,
        budget=session.budget,
    )


def _kernel_norms(session: Session) -> FloatArray:
    """(seq,) sqrt K(i, i) of the update batch in the optimizer's metric, as in the stage ``kernel``."""
    own = SequenceGradients(session.update, response_logprob)
    metrics = {"preconditioned": session.step.metric()}
    squares = paired_dots(session.policy, own, own, metrics, budget=session.budget)
    return np.sqrt(squares["preconditioned"])
