"""The second-order kernel: what pairs of sequences of the step do together to a quantity F.

The step is a sum of elements v: P c_i of every sequence of the update batch, c_i = sum_k w_ik grad l_ik, and
its other parts (momentum, decay, terms of the loss). To second order in the learning rate it moves F by

    lr^2/2 sum_ij M2(i, j),      M2(i, j) = v_i' (Hess F) v_j

over all pairs of elements, which is the second-order change that ``measure.change`` measures along the whole
step. M2 is estimated on the probe batch from the same estimator as that one (the Hessian of the
importance-weighted value, ``measure.quantity.curved``), by one Hessian-vector product for each row and an
inner product of it with every sequence's gradient. With more sequences than rows are wanted, rows are random
signs of the sequences (sketches), or none: sums over prompts and over all are exact all the same, since the
prompts have rows of their own, and what is on the diagonal is Hutchinson's estimate, whose error is given.

Part of Hess F is a product of first-order kernels ("K1 squared", RL studies 2.3): for the entropy

    Hess F = -E[grad S grad S'] - E[(S - E S) (Hess pi)/pi],      S = log pi(y)

so M2(i, j) = -E_y[K1(i, y) K1(y, j)] + rest, K1(i, y) = v_i . grad S(y). For the log-prob of given text it
is the same with the text in place of y; for the KL divergence and the policy's own log-prob the sign is +;
reward and length have no such part.

Errors come from folds of whole probe prompts, by the delta method. The update batch is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stepscope.errors import MeasurementError
from stepscope.measure.influence.probe_gradient import prompt_groups
from stepscope.measure.quantity.base import Quantity, readings_of
from stepscope.measure.quantity.curved import curved_functions
from stepscope.measure.quantity.estimators import ProbeValues
from stepscope.measure.quantity.estimators import value as quantity_value
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.hessian import hessian_products
from stepscope.policy.gradients.products import compute_dtype, per_sequence_dots, weighted_gradients
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget, track
from stepscope.policy.state import Policy
from stepscope.results import Brief, FloatArray, IntArray, Rollouts
from stepscope.results.views import Plotted

if TYPE_CHECKING:
    import pandas as pd

    from stepscope.results.curvature import PairReport

NUM_FOLDS = 16
"""Pools of probe prompts whose Hessians are kept apart, for errors and noise."""


@dataclass(frozen=True)
class Folded:
    """Rows of a kernel, estimated on folds of a probe batch.

    Attributes:
        value: (row, element) the estimate.
        sums: (fold, row, element) what each fold adds to its error; zero over the folds.
    """

    value: FloatArray
    sums: FloatArray

    def less(self, other: Folded) -> Folded:
        """The difference, errors paired fold by fold."""
        return Folded(self.value - other.value, self.sums - other.sums)


@dataclass(frozen=True)
class Rows:
    """Which combinations of the step's elements have a row of their own.

    Elements are the sequences of the update batch, then the other parts of the step.

    Attributes:
        weights: (row, element).
        prompts: rows that are sums over the sequences of a prompt, in the order of the prompts.
        single: rows that are single sequences, in their order; empty where ``signs`` stand for them.
        signs: rows that are random signs of the sequences.
        parts: rows that are the other parts of the step.
    """

    weights: FloatArray
    prompts: slice
    single: slice
    signs: slice
    parts: slice


@dataclass(frozen=True, repr=False)
class PairKernel(Plotted, Brief):
    """The second-order kernel of one quantity, some rows of it or all.

    Attributes:
        quantity: name.
        normalisation: ``per_token`` or ``per_seq``.
        version: ``on_policy`` or ``fixed_prefix``.
        unit: of F.
        rows: what the rows are.
        whole: u_r' (Hess F) v_e.
        fisher: the part of it that is a product of first-order kernels; None where the quantity has none.
        slopes: (element,) grad F . v_e.
        slope_sums: (fold, element) what each fold adds to their errors.
        prompts: (seq,) prompt of each sequence of the update batch, from 0.
        parts: names of the other parts of the step.
        enumerated: whether the probe lists all responses, so that nothing is sampled.
    """

    quantity: str
    normalisation: str
    version: str
    unit: str
    rows: Rows
    whole: Folded
    fisher: Folded | None
    slopes: FloatArray
    slope_sums: FloatArray
    prompts: IntArray
    parts: tuple[str, ...]
    enumerated: bool

    def to_pandas(self) -> pd.DataFrame:
        """(row, element) the kernel as it is estimated, with names on both axes.

        A row is a prompt's sequences together, a sequence, random signs of them, or another part of the step.
        """
        import pandas as pd

        kinds = {"prompt": self.rows.prompts, "sequence": self.rows.single, "signs": self.rows.signs}
        names = dict.fromkeys(range(len(self.rows.weights)), "")
        for kind, own in kinds.items():
            names |= {place: f"{kind} {k}" for k, place in enumerate(range(own.start, own.stop))}
        names |= dict(zip(range(self.rows.parts.start, self.rows.parts.stop), self.parts, strict=True))
        columns = [*(f"sequence {k}" for k in range(len(self.prompts))), *self.parts]
        return pd.DataFrame(self.whole.value, index=list(names.values()), columns=columns)

    def _viewed(self) -> PairReport:
        from stepscope.measure.curvature.structure import pair_report  # which is made of kernels

        return pair_report(self)

    @property
    def exact(self) -> bool:
        """Whether every sequence has a row of its own."""
        return _has(self.rows.single)

    @property
    def num_signs(self) -> int:
        """Random signs that stand for the sequences."""
        return int(self.rows.signs.stop - self.rows.signs.start)


@dataclass(frozen=True)
class PairOptions:
    """How a second-order kernel is taken.

    Attributes:
        sketches: random signs of the sequences in place of each of them, where there are more sequences than
            that; 0 for rows of whole prompts alone, None for every sequence.
        num_folds: most folds of probe prompts.
        seed: of the signs.
    """

    sketches: int | None = None
    num_folds: int = NUM_FOLDS
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuse what gives no error.

        Raises:
            MeasurementError: one random sign, or a single fold.
        """
        odd = self.sketches is not None and (self.sketches < 0 or self.sketches == 1)
        if odd or self.num_folds < 2:
            raise MeasurementError(
                f"second-order kernel: {self.sketches} sketches and {self.num_folds} folds; give 0 sketches "
                "(prompts alone), at least 2, or None (a row for every sequence), and at least 2 folds"
            )


def second_order_kernel(
    policy: Policy,
    step: Step,
    rollouts: Rollouts,
    *,
    quantity: str | Quantity | ProbeValues = "entropy",
    baseline: str = "best",
    options: PairOptions = PairOptions(),
    budget: Budget = Budget(),
) -> PairKernel:
    """What pairs of the step's sequences do together to a quantity, on a probe batch.

    Costs, for each row (prompts and sketches, or the sequences with a part in the step; parts), a
    Hessian-vector product on the probe batch, about six forward passes for each of its functions (two for
    what is per token, on policy), many rows to one graph; and a gradient pass over the update batch for the
    rows that the budget's memory holds.

    Args:
        policy: its trainable parameters are differentiated.
        step: from a preconditioned optimizer.
        rollouts: the probe batch.
        quantity: a name, a quantity, or one with its values on the probe batch, from ``bind_quantity``.
        baseline: where it has no values yet, ``best`` or a rung of the ladder.
        options: how many sketches and folds.
        budget: what may be used at a time.

    Raises:
        MeasurementError: the optimizer's step is not linear in its gradient, the parameters are sharded, or a
            product is not finite.
    """
    P = step.metric()
    update = step.update
    probe = (
        quantity
        if isinstance(quantity, ProbeValues)
        else bind_quantity(
            policy, rollouts, quantity, direction=step.direction, baseline=baseline, budget=budget
        )
    )
    parts = {name: vector for name, vector in step.components.items() if name != "sequences"}
    rows = make_rows(update.prompt_index, len(parts), options.sketches, options.seed)
    shares = probe.sequence_weights
    if shares is None:
        shares = np.full(len(rollouts), 1 / len(rollouts))
    folds = prompt_groups(rollouts.prompt_index, options.num_folds)
    count = int(folds.max()) + 1
    functions, num_functions = curved_functions(probe)
    sequences = SequenceGradients(
        rollouts, response_logprob, as_trained=False, readings=partial(readings_of, [probe.quantity])
    )
    own = SequenceGradients(update, weighted_logprobs(step.token_weights))
    num_elements = rows.weights.shape[1]
    hessians = np.zeros((num_functions, count, len(rows.weights), num_elements))
    slopes = np.zeros((num_functions, count, num_elements))

    def against_elements(stack: Mapping[str, Tensor]) -> FloatArray:
        """(vector, element) inner products with P c_i and the other parts."""
        scaled = {n: t.to(compute_dtype(P[n])) * P[n] for n, t in stack.items()}
        found = [per_sequence_dots(policy, own, scaled, budget=budget)]
        found += [vectors.stack_dots(stack, part)[:, None] for part in parts.values()]
        return np.concatenate(found, axis=1)

    chunks = _chunks(step, rows, max(1, budget.memory_bytes // (6 * vectors.vector_bytes(policy.parameters))))
    tasks = [(k, f) for k in range(len(chunks)) for f in range(count)]
    stack: dict[str, Tensor] = {}
    held: list[dict[str, Tensor]] = []
    for k, fold in track(tasks, "second order", budget):
        chunk = chunks[k]
        if fold == 0:
            stack = _combined(policy, own, P, parts, rows.weights[chunk], budget)
        curved = hessian_products(
            policy,
            functions,
            sequences,
            stack,
            shares=np.where(folds == fold, shares, 0.0),
            num_functions=num_functions,
            budget=budget,
        )
        held += [
            {n: torch.cat([t, of.gradient[n].unsqueeze(0)]) for n, t in of.products.items()} for of in curved
        ]
        number = len(chunk) + 1
        room = budget.memory_bytes // (5 * vectors.vector_bytes(policy.parameters) * number)
        if fold + 1 < count and len(held) + num_functions <= room:
            continue
        products = against_elements({n: torch.cat([part[n] for part in held]) for n in P})
        some = slice(fold + 1 - len(held) // num_functions, fold + 1)
        held.clear()
        by_fold = products.reshape(-1, num_functions, number, num_elements).swapaxes(0, 1)
        hessians[:, some, chunk] = by_fold[:, :, :-1]
        if k == 0:
            slopes[:, some] = by_fold[:, :, -1]
    if _has(rows.single):
        hessians[:, :, rows.prompts] = rows.weights[rows.prompts] @ _by_element(rows, hessians)
    whole, slope = _estimated(probe, folds, shares, rows.weights, hessians, slopes)
    sign = probe.quantity.fisher_sign
    fisher = None
    if sign:
        pushes = _pushes(policy, own, sequences, P, parts, budget)
        fisher = _fisher(probe, folds, shares, rows.weights, sign, pushes)
    return PairKernel(
        quantity=probe.quantity.name,
        normalisation=probe.quantity.normalisation,
        version=probe.quantity.version,
        unit=probe.quantity.unit,
        rows=rows,
        whole=whole,
        fisher=fisher,
        slopes=slope.value[0],
        slope_sums=slope.sums[:, 0],
        prompts=update.prompt_index,
        parts=tuple(parts),
        enumerated=probe.sequence_weights is not None,
    )


def _chunks(step: Step, rows: Rows, size: int) -> list[IntArray]:
    """The rows that take Hessian-vector products, so many at a time; those of nothing but zeros take none.

    Random signs come in chunks of their own, so that the other rows are the same to the bit without them.
    """
    weighted = [bool(np.any(row)) for row in step.token_weights]
    live = np.ones(rows.weights.shape[1], dtype=bool)
    live[: len(weighted)] = weighted
    moving = (rows.weights[:, live] != 0).any(1)
    plain = np.r_[rows.single, rows.parts] if _has(rows.single) else np.r_[rows.prompts, rows.parts]
    kinds = [of[moving[of]] for of in (plain, np.r_[rows.signs])]
    return [of[start : start + size] for of in kinds for start in range(0, len(of), size)]


def _has(rows: slice) -> bool:
    return bool(rows.stop > rows.start)


def make_rows(prompts: IntArray, num_parts: int, sketches: int | None, seed: int) -> Rows:
    """The rows of a kernel: prompts, sequences or signs of them, parts."""
    count, num_prompts = len(prompts), int(prompts.max()) + 1
    whole = sketches is None or count <= sketches
    number = count if whole else int(sketches or 0)
    weights = np.zeros((num_prompts + number + num_parts, count + num_parts))
    weights[prompts, np.arange(count)] = 1.0
    middle = slice(num_prompts, num_prompts + number)
    weights[middle, :count] = (
        np.eye(count) if whole else np.random.default_rng([seed, 2]).choice([-1.0, 1.0], (number, count))
    )
    last = slice(middle.stop, middle.stop + num_parts)
    weights[last, count:] = np.eye(num_parts)
    none = slice(middle.stop, middle.stop)
    return Rows(weights, slice(0, num_prompts), middle if whole else none, none if whole else middle, last)


def _by_element(rows: Rows, found: FloatArray) -> FloatArray:
    """(..., element, element) out of rows that are elements."""
    return np.concatenate([found[..., rows.single, :], found[..., rows.parts, :]], axis=-2)


def _combined(
    policy: Policy,
    own: SequenceGradients,
    P: Mapping[str, Tensor],
    parts: Mapping[str, dict[str, Tensor]],
    weights: FloatArray,
    budget: Budget,
) -> dict[str, Tensor]:
    """Name to (row, ...) the combinations of elements: P sum_i w_i c_i and multiples of the other parts."""
    count = len(own)
    found = weighted_gradients(policy, own, weights[:, :count], budget=budget)
    found = {n: t * P[n] for n, t in found.items()}
    for column, part in zip(weights[:, count:].T, parts.values(), strict=True):
        if column.any():
            vectors.add_multiples(found, column, part)
    return found


def _pushes(
    policy: Policy,
    own: SequenceGradients,
    sequences: SequenceGradients,
    P: Mapping[str, Tensor],
    parts: Mapping[str, dict[str, Tensor]],
    budget: Budget,
) -> FloatArray:
    """(probe seq, element) v_e . grad S of each response of the probe."""
    plain = SequenceGradients(sequences.rollouts, response_logprob, as_trained=False)
    found = [grams(policy, own, metrics={"P": P}, other=plain, budget=budget).cross["P"].numpy()]
    if parts:
        stack = {n: torch.stack([part[n] for part in parts.values()]) for n in P}
        stack = {n: t.to(compute_dtype(t)) for n, t in stack.items()}
        found.append(per_sequence_dots(policy, plain, stack, budget=budget).T)
    return np.concatenate(found, axis=1)


def _estimated(
    probe: ProbeValues,
    folds: IntArray,
    shares: FloatArray,
    weights: FloatArray,
    hessians: FloatArray,
    slopes: FloatArray,
) -> tuple[Folded, Folded]:
    """Rows of the kernel of F, or of F/N, and the slopes, from what the folds say of f and of the length.

    With A, B the Hessians and a, b the gradients of E[f] and of N, f with the mean taken off,
    (F/N)''(u, v) = (A(u, v) - s(u) b(v) - b(u) s(v))/N, s = a/N; polarised from ``second_order.second``.
    """
    quantity, N = probe.quantity, probe.mean_length
    part = np.bincount(folds, weights=shares)
    length = np.bincount(folds, weights=shares * probe.lengths)
    A, a = hessians[0].sum(0), slopes[0].sum(0)
    lead = part[:, None, None]
    if not quantity.per_token:
        slope = Folded(a[None], (slopes[0] - part[:, None] * a)[:, None])
        return Folded(A, hessians[0] - lead * A), slope
    s = a / N
    if not quantity.on_policy:
        slope = Folded(s[None], ((slopes[0] - length[:, None] * s) / N)[:, None])
        return Folded(A / N, (hessians[0] - length[:, None, None] * (A / N)) / N), slope
    level = np.bincount(folds, weights=shares * quantity_value(probe).residuals)
    B, b = hessians[1].sum(0), slopes[1].sum(0)
    ds = (slopes[0] - length[:, None] * s - level[:, None] * b) / N
    db = slopes[1] - part[:, None] * b

    def both(x: FloatArray, y: FloatArray) -> FloatArray:
        """x(u) y(v) + y(u) x(v) for rows u and elements v."""
        of_rows = [z @ weights.T for z in (x, y)]
        return np.asarray(
            of_rows[0][..., :, None] * y[..., None, :] + of_rows[1][..., :, None] * x[..., None, :]
        )

    value = (A - both(s, b)) / N
    excess = (length - part * N)[:, None, None]
    sums = hessians[0] - lead * A - level[:, None, None] * B
    sums = (sums - both(ds, b[None]) - both(s[None], db) - value * excess) / N
    return Folded(value, sums), Folded(s[None], ds[:, None])


def _fisher(
    probe: ProbeValues,
    folds: IntArray,
    shares: FloatArray,
    weights: FloatArray,
    sign: int,
    pushes: FloatArray,
) -> Folded:
    """Sign E[K1(u, y) K1(y, v)], per token over the mean length."""
    count = int(folds.max()) + 1
    rows = pushes @ weights.T
    parts = np.stack(
        [sign * (rows[folds == f] * shares[folds == f, None]).T @ pushes[folds == f] for f in range(count)]
    )
    total = parts.sum(0)
    if not probe.quantity.per_token:
        part = np.bincount(folds, weights=shares)
        return Folded(total, parts - part[:, None, None] * total)
    length = np.bincount(folds, weights=shares * probe.lengths)
    value = total / probe.mean_length
    return Folded(value, (parts - length[:, None, None] * value) / probe.mean_length)
