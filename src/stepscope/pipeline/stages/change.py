"""Stage ``change``: how every quantity changes over the learning rates."""

from __future__ import annotations

from stepscope import runs
from stepscope.intervals import student
from stepscope.loglog import LogLogFit
from stepscope.measure.change.estimate import doubted
from stepscope.measure.change.measured import measure_changes
from stepscope.measure.change.options import ChangeOptions
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.results.change import Changes
from stepscope.stats import Estimate


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("change.json",),
    config=(
        *("quantities", "lrs", "baseline", "estimator", "errors", "second_order", "antithetic"),
        *("task", "reference", "batch_size"),
    ),
)
def change(session: Session) -> Figures:
    """Change of every quantity over the learning rates: true, linear, second order."""
    config = session.config
    found = measure_changes(
        session.policy,
        session.stored_step,
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
    found = tuple(doubted(s, session.doubt("step"), true=True) for s in found)
    primary, *others = found = tuple(s.doubted(session.doubt("sampler")) for s in found)
    runs.write_record(session.run.file("change.json"), Changes(**vars(primary), others=tuple(others)))
    figures: Figures = {}
    for series in found:
        if series.version != "on_policy" or not session.stored_step.lr > 0:
            continue
        point = series.at(session.stored_step.lr)
        kind = "" if series.quantity == primary.quantity else f"{series.quantity}_"
        own = {"change_linear": point.linear, "change_true": point.true}
        if series.taken is not None:
            own |= {
                "change_true": series.taken.true,
                "change_unrounded": series.taken.unrounded,
                "change_rounding": series.taken.difference,
            }
            if series.taken.ratio is not None:
                own["change_kept"] = series.taken.ratio
        figures |= {f"{name}_{kind}{series.normalisation}": figure for name, figure in own.items()}
    fit = _fit_figures(primary.fit, primary.points[0].true.n)
    return session.doubted(figures, "own_lr") | session.doubted(fit, "step", "sampler")


def _fit_figures(fit: LogLogFit | None, count: int) -> Figures:
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
