"""The stages of a measurement: each reads from the session, writes its files and returns headline figures."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np

from stepscope import runs
from stepscope.config import Stage
from stepscope.errors import MeasurementError
from stepscope.intervals import student
from stepscope.measure.change.estimate import doubted
from stepscope.measure.change.measured import measure_changes
from stepscope.measure.change.options import ChangeOptions
from stepscope.measure.change.uncertainty import estimate_ratio
from stepscope.measure.criteria.leaderboard import Leaderboard, rank_criteria
from stepscope.measure.criteria.pareto import drop_rules, resteps
from stepscope.measure.criteria.regression import property_study
from stepscope.measure.influence.attribution import InfluenceOptions, influence, neglected_share
from stepscope.measure.influence.reliability import reliabilities
from stepscope.measure.influence.shrinkage import Shrunk, shrunk_influence
from stepscope.measure.influence.validation import RemovalOptions, compare, remake_steps
from stepscope.measure.kernel.fisher import fisher_kernel
from stepscope.measure.noise.scale import effect_noise_scale, noise_scale
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.step.lifetime import lifetime, lifetime_figures
from stepscope.measure.step.reconstruct import step_components
from stepscope.measure.step.rounding import RoundedStep
from stepscope.pipeline.session import Line, Session
from stepscope.policy import vectors
from stepscope.report import write_report
from stepscope.results import FloatArray, Rollouts, write_arrays
from stepscope.results.change import Changes
from stepscope.results.criteria import Pareto
from stepscope.results.influence import InfluenceSequences, InfluenceTokens, Reliabilities
from stepscope.results.step import StepReport
from stepscope.results.summary import Summary
from stepscope.results.validation import Validation, Validations
from stepscope.runs import RunFolder
from stepscope.stats import NOT_FINITE, Estimate, LogLogFit, clustered_mean

Figures = dict[str, Estimate]

PAGE = "report.html"
"""The page of a measurement."""


@dataclass(frozen=True)
class StagePlan:
    """One stage.

    Attributes:
        work: does it, writes the files, returns figures for ``summary.json``.
        files: what it leaves.
        needs: stages whose files it reads.
        needs_policy: whether the model is needed, too.
    """

    work: Callable[[Session], Figures]
    files: tuple[str, ...]
    needs: tuple[Stage, ...]
    needs_policy: bool = True


def sample_batches(session: Session) -> Figures:
    """Sample update and probe batch; nothing is written before both are known to be fit for use."""
    update = session.update = session.sample_update()
    probe = session.probe = session.sample_probe(update)
    weights = session.step.token_weights
    for name, rollouts, token_weights in (("update", update, weights), ("probe", probe, None)):
        rollouts.to_parquet(
            session.run.file(f"{name}.parquet"),
            session.run.file(f"{name}_tokens.parquet"),
            tokens=session.token_texts(rollouts),
            token_weights=token_weights,
        )
    return batch_figures(update, probe, session.config.errors)


def batch_figures(update: Rollouts, probe: Rollouts, errors: str) -> Figures:
    """Entropy, reward and length of the policy, from the probe batch; mean reward of the update batch."""
    prompts = probe.prompt_index
    how = "mean over probe responses, error clustered by prompt"
    return {
        "entropy_per_token": estimate_ratio(
            probe.entropy_per_seq,
            probe.num_tokens,
            prompts,
            errors=errors,
            unit="nats/token",
            method="ratio of sums over probe responses",
        ),
        "entropy_per_seq": clustered_mean(probe.entropy_per_seq, prompts, unit="nats/sequence", method=how),
        "mean_reward": clustered_mean(probe.rewards, prompts, unit="reward", method=how),
        "mean_length": clustered_mean(probe.num_tokens, prompts, unit="tokens", method=how),
        "truncated_rate": clustered_mean(probe.truncated, prompts, unit="share of responses", method=how),
        "mean_reward_update": clustered_mean(
            update.rewards,
            update.prompt_index,
            unit="reward",
            method="mean over update responses, error clustered by prompt",
        ),
    }


def rebuild_step(session: Session) -> Figures:
    """Rebuild the optimizer step and store its direction."""
    step = session.step
    total = vectors.norm(step.direction)
    report = StepReport(
        lr=step.lr,
        grad_norm=step.grad_norm,
        clip_coefficient=step.clip_coefficient,
        norm_direction=total,
        norm_displacement=step.lr * total,
        num_parameters=sum(t.numel() for t in step.direction.values()),
        num_sequences=len(step.update),
        num_prompts=step.update.num_prompts,
        num_tokens=int(step.update.num_tokens.sum()),
        components=step_components(step),
        initial_lr=session.initial_lr() if step.lr == 0 else None,
        stored_dtypes=session.policy.stored_dtypes,
        doubt=session.step_doubt,
        rounding=session.taken.report() if session.taken else None,
        lifetime=lifetime(session.policy, step),
    )
    vectors.save(step.direction, session.run.file("direction.safetensors"))
    runs.write_record(session.run.file("step.json"), report)
    count = session.update.num_prompts
    shares = {
        f"share_{name}": Estimate(
            value=part.share,
            stderr=float("nan"),
            n=count,
            unit="share of the step",
            method=f"<{name}, direction>/|direction|^2, exact for this update batch",
        )
        for name, part in report.components.items()
    }
    found = shares | lifetime_figures(report.lifetime, count)
    doubted = {name: figure.doubted(session.step_doubt) for name, figure in found.items()}
    return doubted | _rounding_figures(session.taken, count)


def _rounding_figures(taken: RoundedStep | None, count: int) -> Figures:
    """How the step as taken in a half type differs from that before rounding; nothing where it does not."""
    if taken is None:
        return {}
    how = f"torch's AdamW in {taken.kept_in}, {taken.kernel}, at lr {taken.lr:g}; exact for this update batch"
    none = "" if taken.share_moved else "no coordinate moves"
    return {
        name: Estimate(value, float("nan"), count, unit, how, not doubt, doubt)
        for name, value, unit, doubt in (
            ("rounding_share_moved", taken.share_moved, "share of coordinates", ""),
            ("rounding_cosine", taken.cosine, "1", none),
            ("rounding_norm_ratio", taken.norm_ratio, "1", ""),
        )
    }


def measure_sweep(session: Session) -> Figures:
    """Change of every quantity over the learning rates: true, linear, second order."""
    config = session.config
    found = measure_changes(
        session.policy,
        session.line,
        session.probe,
        quantities=[variant for quantity in session.quantities for variant in quantity.variants()],
        lrs=config.lrs,
        options=ChangeOptions(
            baseline=config.baseline,
            estimator=config.estimator,
            errors=config.errors,
            second_order=config.second_order,
            antithetic=config.antithetic,
        ),
        taken=session.taken,
        budget=session.budget,
    )
    primary, *others = found = tuple(doubted(s, session.step_doubt, true=True) for s in found)
    runs.write_record(session.run.file("change.json"), Changes(**vars(primary), others=tuple(others)))
    figures: Figures = {}
    for series in found:
        if series.version != "on_policy" or not session.line.lr > 0:
            continue
        point = series.at(session.line.lr)
        kind = "" if series.quantity == primary.quantity else f"{series.quantity}_"
        figures[f"change_linear_{kind}{series.normalisation}"] = _at_own_lr(session.line, point.linear)
        true = {"change_true": point.true}
        if series.taken is not None:
            true = {
                "change_true": series.taken.true,
                "change_unrounded": series.taken.unrounded,
                "change_rounding": series.taken.difference,
            }
            if series.taken.ratio is not None:
                true["change_kept"] = series.taken.ratio
        figures |= {
            f"{name}_{kind}{series.normalisation}": _at_own_lr(session.line, figure)
            for name, figure in true.items()
        }
    fit = _line_figures(primary.fit, primary.points[0].true.n)
    return figures | {name: figure.doubted(session.step_doubt) for name, figure in fit.items()}


def _at_own_lr(line: Line, estimate: Estimate) -> Estimate:
    """The estimate, flagged where the step's own learning rate is 0 and another stands in for it."""
    if line.own_lr > 0:
        return estimate
    reason = (
        "the checkpoint's own learning rate is 0 (the end of its schedule); this is at the initial one, "
        f"{line.lr:g}"
    )
    return estimate.doubted(reason)


def _line_figures(fit: LogLogFit | None, count: int) -> Figures:
    """Slope and R^2 of true change against lr; nan, with the reason, where too few rates are reliable."""
    nan = float("nan")
    how = (
        "least squares of log|true change| on log lr over the reliable learning rates up to the step's own "
        "or to where second order is a tenth of linear, whichever is larger"
    )
    if fit is None or fit.n < 2:
        none = Estimate(nan, nan, count, "1", how, False, "fewer than two learning rates are reliable")
        return {"linearity_slope": none, "linearity_r2": none}
    how = f"{how}; {fit.n} of them"
    reach = student(fit.n - 1) * fit.slope_stderr  # two of the learning rates are spent on the line
    return {
        "linearity_slope": Estimate(
            fit.slope, fit.slope_stderr, count, "1", how, low=fit.slope - reach, high=fit.slope + reach
        ),
        "linearity_r2": Estimate(fit.r2, nan, count, "1", how),
    }


def attribute_change(session: Session) -> Figures:
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
    sure = {(w.quantity, w.through): reliabilities(w, session.probe.num_prompts) for w in every}
    runs.write_record(
        session.run.file("reliability.json"),
        Reliabilities(
            rankings=tuple(order for both in sure.values() for order in both),
            shrunk=tuple(own.shrinkage for own in shrunk.values()),
        ),
    )
    fixed, optimizer = found[0]
    tokens, sequences = sure[optimizer.quantity, optimizer.through]
    own = shrunk.get((optimizer.quantity, optimizer.through))
    asked = session.own_influence
    parts = {
        "influence_sequences": fixed.sum_of_sequences,
        "influence_sequences_optimizer": optimizer.sum_of_sequences,
        "influence_sequences_own_prompts": None if asked is None else asked.sum_of_sequences,
        "influence_neglected": neglected_share(fixed, optimizer),
        **{f"influence_{name}": part for name, part in fixed.components.items()},
        "influence_total": fixed.total,
    }
    doubts = (session.step_doubt, session.derivative_doubt)
    return {name: part.doubted(*doubts) for name, part in parts.items() if part is not None} | {
        "rank_reliability_tokens": tokens.whole,
        "rank_reliability_sequences": sequences.whole,
        "probe_needed_tokens": tokens.needed,
        "probe_needed_sequences": sequences.needed,
        **({} if own is None else {"shrinkage_gain": own.shrinkage.gain}),
    }


def _shrunk(session: Session) -> dict[tuple[str, str], Shrunk]:
    """Influence through the optimizer shrunk, by quantity and way, where there is something to shrink to."""
    found = [
        shrunk_influence(
            session.policy,
            session.step,
            session.probe,
            optimizer,
            quantity=quantity,
            budget=session.budget,
        )
        for quantity, (_, optimizer) in zip(session.quantities, session.influences, strict=True)
    ]
    return {(own.shrinkage.quantity, own.shrinkage.through): own for own in found if own is not None}


def validate_shares(session: Session) -> Figures:
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
                lr=session.line.lr,
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
    runs.write_record(session.run.file("validation.json"), Validations(artifact))
    return figures


def couple_sequences(session: Session) -> Figures:
    """Fisher kernel of the update batch with itself and with the probe batch."""
    config = session.config
    kernel = fisher_kernel(
        session.policy,
        session.update,
        session.probe,
        preconditioner=session.step.preconditioner,
        token_weights=session.step.token_weights,
        projection=config.projection,
        budget=session.budget,
    )
    write_arrays(kernel.arrays(), session.run.file("kernel.safetensors"))
    runs.write_record(session.run.file("kernel.json"), kernel.report())
    return {"effective_rank": kernel.effective_rank}


def weigh_noise(session: Session) -> Figures:
    """Gradient noise scale of the update batch; also of its effect on each quantity, where that is known."""
    update = session.update
    found = noise_scale(
        session.policy,
        update,
        preconditioner=session.step.preconditioner,
        token_weights=session.step.token_weights,
        budget=session.budget,
    )
    effects = {}
    if session.run.is_done("influence"):
        table = runs.read_record(InfluenceSequences, session.run.file("influence_sequences.parquet"))
        table = table.where((table.component == "sequence") & (table.through == "fixed"))
        for quantity in session.quantities:
            effects[f"{quantity.name}_{quantity.normalisation}"] = effect_noise_scale(
                table.influence[table.quantity == quantity.name],
                update.prompt_index,
                unit=f"{quantity.unit}/lr",
            )
    runs.write_record(session.run.file("noise.json"), replace(found, effects=effects))
    return {"noise_scale": found.noise_scale}


def judge_criteria(session: Session) -> Figures:
    """Leaderboard of the criteria against the measured effects, and what kind of token carries influence."""
    config = session.config
    board = rank_criteria(
        session.policy,
        session.step,
        session.probe,
        baseline=config.baseline,
        max_diagonal=config.criteria.diagonal_tokens,
        micro_batch_size=config.criteria.micro_batch_size,
        num_resamples=config.criteria.resamples,
        seed=config.criteria.seed,
        budget=session.budget,
    )
    column = board.truth("column", "adamw", "on_policy")
    studies = property_study(
        board.facts, column.values, kernel_norm=_kernel_norms(session.run), unit="nats/token/lr"
    )
    runs.write_record(session.run.file("criteria.json"), board.report(studies))
    runs.write_record(session.run.file("criteria_tokens.parquet"), board.tokens())
    runs.write_record(session.run.file("pareto.json"), _drop_tokens(session, board))
    return {f"influence_top_{share}": figure for share, figure in board.concentration(column).items()}


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
            options=InfluenceOptions(baseline=config.baseline, groups=half, num_folds=2),
            budget=session.budget,
        )
        rules = drop_rules(board, reward_influence=reward.fold_tokens, seed=config.criteria.seed)
    return resteps(
        session.policy,
        session.step,
        session.probe,
        rules,
        probe_half=half,
        shares=config.criteria.drop_shares,
        lr=session.line.lr,
        baseline=config.baseline,
        budget=session.budget,
    )


def _kernel_norms(run: RunFolder) -> FloatArray | None:
    """(seq,) sqrt K(i, i) of the update batch in the optimizer's metric, where the kernel is measured."""
    if not run.is_done("kernel"):
        return None
    kernel = vectors.load(runs.verified(run.file("kernel.safetensors")))["update_preconditioned"]
    return np.asarray(np.sqrt(kernel.diagonal().numpy()), dtype=np.float64)


def write_page(session: Session) -> Figures:
    """The page, from what the other stages left."""
    write_report(session.run.path)
    return {}


def write_summary(run: RunFolder, figures: Mapping[str, Estimate]) -> None:
    """Add figures to ``summary.json``, and bring its ``wall_seconds`` up to date.

    Raises:
        MeasurementError: a figure is not finite, and none of the known reasons explains it.
    """
    for name, figure in figures.items():
        if NOT_FINITE in figure.reason:
            raise MeasurementError(
                f"{name} is {figure.value} +- {figure.stderr} {figure.unit}, expected finite numbers "
                f"({figure.method}); measure with --precision float64, other seeds or an earlier checkpoint"
            )
    path = run.file("summary.json")
    summary = dict(runs.read_record(Summary, path).figures) if path.exists() else {}
    seconds = float(run.provenance()["wall_seconds"])
    clock = Estimate(seconds, float("nan"), 1, "s", "sum over the finished stages")
    summary.pop("wall_seconds", None)
    run.write_sealed("summary.json", Summary({**summary, **figures, "wall_seconds": clock}))


PLANS: dict[Stage, StagePlan] = {
    "rollouts": StagePlan(
        sample_batches,
        ("update.parquet", "update_tokens.parquet", "probe.parquet", "probe_tokens.parquet"),
        (),
    ),
    "step": StagePlan(rebuild_step, ("step.json", "direction.safetensors"), ("rollouts",)),
    "change": StagePlan(measure_sweep, ("change.json",), ("rollouts", "step")),
    "influence": StagePlan(
        attribute_change,
        ("influence_sequences.parquet", "influence_tokens.parquet", "reliability.json"),
        ("rollouts", "step"),
    ),
    "validation": StagePlan(validate_shares, ("validation.json",), ("rollouts", "step", "influence")),
    "kernel": StagePlan(couple_sequences, ("kernel.json", "kernel.safetensors"), ("rollouts", "step")),
    "noise": StagePlan(weigh_noise, ("noise.json",), ("rollouts", "step")),
    "criteria": StagePlan(
        judge_criteria, ("criteria.json", "criteria_tokens.parquet", "pareto.json"), ("rollouts", "step")
    ),
    "report": StagePlan(write_page, (PAGE,), ("rollouts",), needs_policy=False),
}
"""What each stage does, leaves and needs."""
