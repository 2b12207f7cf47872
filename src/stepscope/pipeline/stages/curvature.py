"""Stage ``curvature``: what pairs of sequences do together, to second order."""

from __future__ import annotations

import numpy as np

from stepscope import runs
from stepscope.console import say
from stepscope.measure.curvature.best_step import best_step
from stepscope.measure.curvature.best_step import doubted as best_doubted
from stepscope.measure.curvature.pairs import PairKernel
from stepscope.measure.curvature.structure import doubted, pair_report, row_sums
from stepscope.measure.noise.units import noise_units
from stepscope.pipeline.stages.plan import PROBE, STEP, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.loss.surrogate import adds_component, sums_over_vocabulary
from stepscope.results import FloatArray, Rollouts, write_arrays
from stepscope.results.curvature import CurvatureReport


@stage(
    reads=(*UPDATE, *PROBE, *STEP),
    writes=("curvature.json", "curvature.safetensors"),
    config=("curvature", "quantities", "baseline", "task", "reference", "batch_size"),
)
def curvature(session: Session) -> Figures:
    """Second-order kernel of the update batch on each quantity of the probe batch, and best steps by it."""
    kernels = [session.pair_kernel(quantity) for quantity in session.quantities]
    arrays: dict[str, FloatArray] = {}
    for kernel in kernels:
        name = f"{kernel.quantity}_{kernel.normalisation}"
        arrays |= {f"{name}_{what}": values for what, values in _matrices(kernel).items()}
    write_arrays(arrays, session.run.file("curvature.safetensors"))
    reasons = [session.doubt(kind) for kind in ("step", "derivatives", "sampler")]
    reports = tuple(doubted(pair_report(kernel), *reasons) for kernel in kernels)
    lr, run_prompts = session.stored_step.lr, session.policy.settings.prompts_per_step
    if without := no_best_step(session.update, session.policy.settings):
        say(f"curvature: no best step, {without}")
    best = tuple(
        best_doubted(best_step(kernel, lr=lr, run_prompts=run_prompts), *reasons)
        for kernel in kernels
        if not without
    )
    runs.write_record(session.run.file("curvature.json"), CurvatureReport(lr, reports, best))
    first = reports[0]
    half = session.stored_step.lr**2 / 2
    return session.doubted(
        {
            "second_order_batch": first.whole.batch.scaled(half, unit=first.unit),
            "second_order_diagonal": first.whole.diagonal.scaled(half, unit=first.unit),
            "second_order_noise": first.noise,
        },
        "own_lr",
    )


def no_best_step(update: Rollouts, settings: StepSettings) -> str:
    """Why learning rates and batch sizes cannot be told; empty where they can.

    What differs from one prompt to another must be the noise of the whole gradient.
    """
    if update.num_prompts < 2:
        return "the update batch has one prompt"
    if int(noise_units(update, settings)[0].max()) + 1 < update.num_prompts:
        return "the batch has pairs of some prompts and samples of others, and the noise is of both together"
    what = sums_over_vocabulary(settings) and adds_component(settings)
    return f"the loss has {what}, which belongs to no prompt" if what else ""


def _matrices(kernel: PairKernel) -> dict[str, FloatArray]:
    """What is stored of a kernel, by the end of its name."""
    rows, count = kernel.rows, len(kernel.prompts)
    sums, errors = row_sums(kernel)
    found = {
        "by_prompt": kernel.whole.value[rows.prompts],
        "row_sums": sums,
        "row_sums_stderr": errors,
        "slopes": kernel.slopes,
    }
    if kernel.exact:
        found["pairs"] = kernel.whole.value[rows.single][:, :count]
        if kernel.fisher is not None:
            found["pairs_fisher"] = kernel.fisher.value[rows.single][:, :count]
    return {name: np.ascontiguousarray(values) for name, values in found.items()}
