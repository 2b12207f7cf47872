"""What a second-order kernel looks like: sums over kinds of pairs, size, noise, spectrum. No model.

The folds of the probe are independent, so that <m_f, m_g> of two folds' kernels has the mean |M2|^2 without
the noise that |M2|^2 of the estimate has; the same holds of u_(f)' m_f u_(f) with an eigenvector u_(f) of all
other folds, which is what is left of an eigenvalue on prompts that did not choose its direction.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from stepscope.intervals import FEWEST
from stepscope.measure.curvature.pairs import Folded, PairKernel
from stepscope.results import FloatArray, IntArray
from stepscope.results.curvature import HeldOutSpectrum, PairReport, PairSums
from stepscope.stats import Estimate, errors_from_sums, estimate_from_sums, jackknife, leave_out

PROMPTS_ALONE = "prompts alone have rows; take 2 sketches or more, or None for a row of every sequence"
"""Why there is no sum over single sequences."""

Linear = Callable[[FloatArray], FloatArray]
"""A linear function of the rows of a kernel: (..., row, element) to (...)."""


def estimated(
    kernel: PairKernel, values: FloatArray, sums: FloatArray, *, unit: str, method: str, more: float = 0.0
) -> Estimate:
    """A number with its error over the folds of the probe, and another error independent of that."""
    value = float(values)
    if kernel.enumerated:
        return Estimate(value, more, len(sums), unit, f"exact expectation, {method}")
    how = f"{method}, delta method over {len(sums)} folds of probe prompts"
    count = len(sums)
    stderr = float(np.sqrt(count / (count - 1) * (sums**2).sum() + more**2)) if count > 1 else float("nan")
    return estimate_from_sums(value, sums, unit=unit, method=how, stderr=stderr)


def pair_sums(kernel: PairKernel, of: Folded) -> PairSums:
    """Sums over kinds of pairs of the step's elements; the diagonal from signs has their error, too."""
    rows, count = kernel.rows, len(kernel.prompts)
    whole, parts, prompts = rows.prompts, rows.parts, kernel.prompts
    members = rows.weights[whole, :count]
    unit = f"{kernel.unit}/lr^2"

    def estimate(function: Linear, method: str, more: float = 0.0) -> Estimate:
        return estimated(kernel, function(of.value), function(of.sums), unit=unit, method=method, more=more)

    def batch(found: FloatArray) -> FloatArray:
        return np.asarray(found[..., whole, :count].sum((-1, -2)))

    def blocks(found: FloatArray) -> FloatArray:
        return np.asarray((found[..., whole, :count] * members).sum((-1, -2)))

    def diagonal(found: FloatArray) -> FloatArray:
        if kernel.exact:
            return np.asarray(np.trace(found[..., rows.single, :count], axis1=-2, axis2=-1))
        return np.asarray(_quadratic(found).mean(-1))

    def _quadratic(found: FloatArray) -> FloatArray:
        return np.asarray((found[..., rows.signs, :count] * rows.weights[rows.signs, :count]).sum(-1))

    def by_sequence(function: Linear, method: str) -> Estimate:
        if kernel.exact or kernel.num_signs:
            return estimate(function, f"{method}{drawn}", more)
        return Estimate(nan, nan, len(of.sums), unit, method, False, PROMPTS_ALONE)

    more, drawn, nan = 0.0, "", float("nan")
    if kernel.num_signs:
        each = _quadratic(of.value)
        more = float(each.std(ddof=1) / np.sqrt(len(each)))
        drawn = f", Hutchinson's estimate from {len(each)} random signs, their error included"
    assert len(members) == int(prompts.max()) + 1
    return PairSums(
        diagonal=by_sequence(diagonal, "sum over the diagonal"),
        same_prompt=by_sequence(lambda m: blocks(m) - diagonal(m), "sum over pairs of one prompt"),
        different_prompts=estimate(lambda m: batch(m) - blocks(m), "sum over pairs of different prompts"),
        batch=estimate(batch, "sum over pairs of sequences"),
        batch_with_parts=estimate(
            lambda m: 2 * m[..., whole, count:].sum((-1, -2)), "twice the sum over sequences and other parts"
        ),
        parts=estimate(lambda m: m[..., parts, count:].sum((-1, -2)), "sum over pairs of other parts"),
        total=estimate(
            lambda m: m[..., whole, :].sum((-1, -2)) + m[..., parts, :].sum((-1, -2)),
            "sum over all pairs of the step's parts",
        ),
    )


def pair_report(kernel: PairKernel) -> PairReport:
    """The figures of a second-order kernel."""
    squares, noise = _squares(kernel)
    fisher = kernel.fisher
    return PairReport(
        quantity=kernel.quantity,
        normalisation=kernel.normalisation,
        version=kernel.version,
        unit=kernel.unit,
        num_sequences=len(kernel.prompts),
        num_prompts=int(kernel.prompts.max()) + 1,
        parts=kernel.parts,
        num_sketches=kernel.num_signs,
        whole=pair_sums(kernel, kernel.whole),
        fisher=None if fisher is None else pair_sums(kernel, fisher),
        rest=None if fisher is None else pair_sums(kernel, kernel.whole.less(fisher)),
        squares=squares,
        noise=noise,
        spectrum=held_out_spectrum(kernel),
    )


def row_sums(kernel: PairKernel) -> tuple[FloatArray, FloatArray]:
    """(element,) v_e' (Hess F) direction, and its standard error over the folds.

    lr^2/2 times it is the element's part of the second-order change: the parts add up to the whole of it.
    """
    rows = [*range(kernel.rows.prompts.stop), *range(kernel.rows.parts.start, kernel.rows.parts.stop)]
    sums = kernel.whole.sums[:, rows].sum(1)
    return kernel.whole.value[rows].sum(0), errors_from_sums(sums)


def _squares(kernel: PairKernel) -> tuple[dict[str, Estimate], Estimate]:
    """Sums of squares over kinds of pairs without noise, and the share of noise in that over all.

    Where prompts alone have rows that share is of the kernel between prompts, and there are no sums.
    """
    rows, count, prompts = kernel.rows, len(kernel.prompts), kernel.prompts
    if not (kernel.exact or kernel.num_signs):
        each = kernel.whole.value + len(kernel.whole.sums) * kernel.whole.sums
        between = each[:, rows.prompts, :count] @ rows.weights[rows.prompts, :count].T
        return {}, _noise(kernel, _products(between.reshape(len(each), -1)))
    chosen = rows.single if kernel.exact else rows.signs
    folds = len(kernel.whole.sums)
    found = (kernel.whole.value + folds * kernel.whole.sums)[:, chosen, :count]
    same = prompts[:, None] == prompts[None, :]
    own = np.eye(count, dtype=bool)
    masks = {"all": np.ones((found.shape[1], count), dtype=bool)}
    if kernel.exact:
        masks |= {"diagonal": own, "same_prompt": same & ~own, "different_prompts": ~same}
    scale = 1.0 if kernel.exact else 1 / found.shape[1]
    unit = f"({kernel.unit}/lr^2)^2"
    by_kind = {name: _products(found[:, mask]) * scale for name, mask in masks.items()}
    squares = {name: _over_folds(kernel, products, _apart, unit, name) for name, products in by_kind.items()}
    return squares, _noise(kernel, by_kind["all"])


def _noise(kernel: PairKernel, products: FloatArray) -> Estimate:
    """Share of noise in the square of the kernel that the folds have together."""
    return _over_folds(
        kernel,
        products,
        lambda products: 1 - _apart(products) / float(products.mean()),
        "1",
        "noise in the squares of the estimate",
    )


def _products(found: FloatArray) -> FloatArray:
    """(fold, fold) inner products of the folds' kernels."""
    return np.asarray(found @ found.T, dtype=np.float64)


def _apart(products: FloatArray) -> float:
    """Mean inner product of two different folds."""
    count = len(products)
    return float((products.sum() - np.trace(products)) / (count * (count - 1))) if count > 1 else float("nan")


def _over_folds(
    kernel: PairKernel, products: FloatArray, statistic: Callable[[FloatArray], float], unit: str, what: str
) -> Estimate:
    count = len(products)
    if kernel.enumerated:
        exact = 0.0 if unit == "1" else float(products.mean())
        return Estimate(exact, 0.0, count, unit, f"exact expectation, {what}")

    def without(kept: IntArray) -> float:
        return statistic(products[np.ix_(kept, kept)])

    value = statistic(products)
    _, error = jackknife(leave_out(without, np.arange(count)))
    method = f"{what}: products of different folds, jackknife over {count} folds of probe prompts"
    if count < FEWEST or not np.isfinite(error):
        reason = f"{count} folds of the probe, where an interval needs at least {FEWEST}"
        return Estimate(value, error, count, unit, method, False, reason)
    return Estimate(value, error, count, unit, method)


def held_out_spectrum(kernel: PairKernel) -> HeldOutSpectrum:
    """Eigenvalues by size, and the same directions on the folds that did not choose them."""
    rows, count = kernel.rows, len(kernel.prompts)
    if kernel.exact:
        whole, sums = (m[..., rows.single, :count] for m in (kernel.whole.value, kernel.whole.sums))
    else:
        members = rows.weights[rows.prompts, :count]
        whole, sums = (
            m[..., rows.prompts, :count] @ members.T for m in (kernel.whole.value, kernel.whole.sums)
        )
    whole, sums = ((m + np.swapaxes(m, -1, -2)) / 2 for m in (whole, sums))
    found = np.linalg.eigvalsh(whole)
    values = np.asarray(found[np.argsort(-np.abs(found))], dtype=np.float64)
    folds = len(sums)
    level = "sequences" if kernel.exact else "prompts"
    if kernel.enumerated or folds < 2:
        nothing = np.full(len(values), np.nan)
        return HeldOutSpectrum(level, values, nothing, nothing)
    left = []
    for own in sums:
        size, directions = np.linalg.eigh(whole - folds / (folds - 1) * own)
        directions = directions[:, np.argsort(-np.abs(size))]
        left.append(np.einsum("ir,ij,jr->r", directions, whole + folds * own, directions))
    held = np.array(left)
    return HeldOutSpectrum(level, values, held.mean(0), held.std(0, ddof=1) / np.sqrt(folds))


def doubted(report: PairReport, *reasons: str) -> PairReport:
    """The report with reasons not to trust what it says."""

    def sums(of: PairSums | None) -> PairSums | None:
        if of is None:
            return None
        return PairSums(**{name: value.doubted(*reasons) for name, value in vars(of).items()})

    whole = sums(report.whole)
    assert whole is not None
    return replace(
        report,
        whole=whole,
        fisher=sums(report.fisher),
        rest=sums(report.rest),
        squares={name: value.doubted(*reasons) for name, value in report.squares.items()},
        noise=report.noise.doubted(*reasons),
    )
