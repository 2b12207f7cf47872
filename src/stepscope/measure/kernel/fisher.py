"""The Fisher kernel: how strongly a push on one response's log-prob moves another's.

K(i, j) = grad S_i . P . grad S_j with S_i = sum_k l_ik, P = 1 (raw) or the optimizer's preconditioner (once,
in the middle: an Adam step on S_j moves S_i by P grad S_j . grad S_i). It couples the sequences of an update
with one another and with the probe batch. The step itself pushes sequence i by its contribution
c_i = sum_k w_ik grad l_ik: c_i . P . c_j is how far j's part of the step lowers, to first order, i's part of
the loss, and the sum of all entries is |sum_i c_i|^2 in the metric P.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
from torch import Tensor

from stepscope.errors import BatchError, MeasurementError
from stepscope.measure.kernel.structure import (
    cosine_between,
    cosine_form,
    kernel_structure,
    token_signs,
)
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy.gradients.derivatives import Objective, response_logprob
from stepscope.policy.gradients.gram import Grams, grams
from stepscope.policy.gradients.projection import Sketch, sketches
from stepscope.policy.gradients.store import Metrics
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import Brief, FloatArray, IntArray, Rollouts
from stepscope.results.frames import labelled
from stepscope.results.kernel import KernelReport, KernelStructure
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Estimate

if TYPE_CHECKING:
    import pandas as pd

MOST_TOKENS = 4096
"""Largest number of tokens for which a kernel between tokens is made."""

CONTRIBUTIONS = "contributions"
"""Name of the kernel between what the sequences contribute to the step."""

PROJECTION_CHECK = 64
"""Sequences whose exact kernel measures the error of a random projection."""


_UNITS = {CONTRIBUTIONS: "loss/lr", "raw": "nats^2", "preconditioned": "nats^2/lr"}


@dataclass(frozen=True, repr=False)
class FisherKernel(Plotted, Brief):
    """Kernels of an update batch with itself and with a probe batch.

    Attributes:
        update: name to (update seq, update seq): ``contributions`` where the token weights are given,
            ``raw`` and, given P, ``preconditioned``.
        null: the same names to the kernels of the same gradients with random signs on their tokens.
        probe: metric to (probe seq, update seq); empty without a probe batch.
        probe_norms: metric to (probe seq,) K(e, e).
        update_rollouts: the sequences of the update batch.
        probe_rollouts: those of the probe batch, or None.
        num_params: trainable parameters.
        projection_error: root-mean-square error of cosines if they come from a random projection, measured
            against exact ones; None for exact kernels.
        tokens: metric to (update tok, update tok) kernel between single tokens, in the order of
            ``token_index``; empty unless asked for.
        token_index: (update tok, 2) sequence and position of each token of ``tokens``.
    """

    update: Mapping[str, FloatArray]
    null: Mapping[str, FloatArray]
    probe: Mapping[str, FloatArray]
    probe_norms: Mapping[str, FloatArray]
    update_rollouts: Rollouts
    probe_rollouts: Rollouts | None
    num_params: int
    projection_error: Estimate | None
    tokens: Mapping[str, FloatArray]
    token_index: IntArray

    def __post_init__(self) -> None:
        """Refuse a kernel with an entry that is not finite.

        Raises:
            MeasurementError: naming the matrix and its row.
        """
        for kind, matrices in (
            ("update", self.update),
            ("null", self.null),
            ("probe", self.probe),
            ("tokens", self.tokens),
        ):
            for metric, K in matrices.items():
                if not np.isfinite(K).all():
                    row = int(np.argwhere(~np.isfinite(K))[0][0])
                    raise MeasurementError(
                        f"kernel {kind}_{metric}: row {row} is not finite, so a gradient overflows; measure "
                        "with --precision float64"
                    )

    def cosine(self, metric: str) -> FloatArray:
        """(update seq, update seq) K(i, j) / sqrt(K(i, i) K(j, j))."""
        return cosine_form(self.update[metric])

    def probe_cosine(self, metric: str) -> FloatArray:
        """(probe seq, update seq) K(e, i) / sqrt(K(e, e) K(i, i))."""
        return cosine_between(self.probe[metric], self.probe_norms[metric], np.diag(self.update[metric]))

    def structure(self, metric: str, *, cosine: bool = False) -> KernelStructure:
        """The structure report of the update kernel in one metric, as it is or in cosine form."""
        return kernel_structure(
            self.update[metric],
            self.null[metric],
            self.update_rollouts,
            unit="cosine" if cosine else _UNITS[metric],
            cosine=cosine,
            contributions=metric == CONTRIBUTIONS,
        )

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of the update batch's kernels, contributions first, the optimizer's metric last."""
        return tuple(self.update)

    @property
    def effective_rank(self) -> Estimate:
        """Of the update's cosine kernel, preconditioned where P is known."""
        return self.structure(self.metrics[-1], cosine=True).effective_rank

    def to_pandas(self, metric: str = "", *, cosine: bool = False, probe: bool = False) -> pd.DataFrame:
        """(update seq, update seq) or (probe seq, update seq): a kernel with prompts and numbers as labels.

        Args:
            metric: one of :attr:`metrics`; the last by default.
            cosine: in cosine form.
            probe: between probe and update batch.

        Raises:
            MeasurementError: there is no such kernel.
        """
        metric = metric or self.metrics[-1]
        known = self.probe if probe else self.update
        if metric not in known:
            raise MeasurementError(f"no kernel {metric!r}; there are {', '.join(known) or 'none'}")
        update, rows = self.update_rollouts.prompt_ids, self.update_rollouts.prompt_ids
        if probe:
            assert self.probe_rollouts is not None
            rows = self.probe_rollouts.prompt_ids
            matrix = self.probe_cosine(metric) if cosine else self.probe[metric]
            return labelled(matrix, rows, update, of=("probe", "update"))
        return labelled(self.cosine(metric) if cosine else self.update[metric], rows, update)

    def _viewed(self) -> Parts:
        return Parts("Fisher kernel", {"kernel": self.report(), "matrices": self.matrices()})

    def matrices(self) -> dict[str, FloatArray]:
        """Everything that is stored, by name."""
        named: dict[str, FloatArray] = {}
        for metric in self.metrics:
            named[f"update_{metric}"] = self.update[metric]
            named[f"update_{metric}_cosine"] = self.cosine(metric)
            named[f"null_{metric}"] = self.null[metric]
            if metric in self.probe:
                named[f"probe_{metric}"] = self.probe[metric]
                named[f"probe_{metric}_cosine"] = self.probe_cosine(metric)
            if metric in self.tokens:
                named[f"tokens_{metric}"] = self.tokens[metric]
        return named

    def arrays(self) -> dict[str, FloatArray | IntArray]:
        """Content of ``kernel.safetensors``: the matrices and the sequence ids of their rows and columns."""
        found: dict[str, FloatArray | IntArray] = dict(self.matrices())
        found["update_sequence_id"] = np.arange(len(self.update_rollouts), dtype=np.int64)
        if self.probe_rollouts is not None:
            found["probe_sequence_id"] = np.arange(len(self.probe_rollouts), dtype=np.int64)
        if self.tokens:
            found["token_index"] = self.token_index
        return found

    def report(self) -> KernelReport:
        """What the matrices are, and the structure of each."""
        update, probe = self.update_rollouts, self.probe_rollouts
        return KernelReport(
            matrices={name: K.shape for name, K in self.matrices().items()},
            rows={
                "update": "update sequence_id",
                "null": "update sequence_id",
                "probe": "probe sequence_id",
                "tokens": "token_index (sequence_id, position)",
            },
            update_prompt_ids=update.prompt_ids,
            probe_prompt_ids=() if probe is None else probe.prompt_ids,
            num_params=self.num_params,
            projection_error=self.projection_error,
            structure={
                f"{metric}{'_cosine' if cosine else ''}": self.structure(metric, cosine=cosine)
                for metric in self.metrics
                for cosine in (False, True)
            },
        )


def fisher_kernel(
    policy: Policy,
    update: Rollouts,
    probe: Rollouts | None = None,
    *,
    preconditioner: ParameterVector | None = None,
    token_weights: Sequence[FloatArray] | None = None,
    tokens: bool = False,
    sketch: Sketch | None = None,
    budget: Budget = Budget(),
) -> FisherKernel:
    """Kernels between the sequences of an update batch, and between those and a probe batch.

    All metrics and both kernels come from one pass over each batch while the update's gradients fit
    the budget's memory; see ``policy.gradients.gram``. The null takes one more pass over the
    update batch; token weights that differ within a response take two. Exact unless ``sketch`` is given.

    Args:
        policy: its trainable parameters are differentiated.
        update: sequences i, j.
        probe: sequences e.
        preconditioner: P, for example ``step.preconditioner``; adds the metric ``preconditioned``.
        token_weights: w_ik of the step, for example ``step.token_weights``; adds the kernel
            ``contributions``, in the optimizer's metric where P is given.
        tokens: also make the kernel between single tokens of the update batch (small batches only: costs one
            pass over as many sequences as there are tokens).
        sketch: a random projection to use instead of the gradients themselves; its seed is also that of the
            null's signs.
        budget: what may be used at a time.

    Raises:
        MeasurementError: P does not fit the policy, or the budget does not hold one sequence.
        BatchError: too many tokens for a token kernel.
    """
    metrics: dict[str, ParameterVector | None] = {"raw": None}
    if preconditioner is not None:
        metrics["preconditioned"] = preconditioner
    seed = 0 if sketch is None else sketch.seed
    error = None

    def square(objective: Objective, chosen: Metrics) -> dict[str, FloatArray]:
        """The update batch's kernels of another objective."""
        gradients = SequenceGradients(update, objective)
        if sketch is None:
            exact = grams(policy, gradients, metrics=chosen, budget=budget).square
            return {m: k.numpy() for m, k in exact.items()}
        rows = sketches(policy, gradients, sketch, metrics=chosen, budget=budget)
        return {m: k.numpy() for m, k in _products(rows, rows).items()}

    if sketch is None:
        found = grams(
            policy,
            SequenceGradients(update, response_logprob),
            metrics=metrics,
            other=None if probe is None else SequenceGradients(probe, response_logprob),
            budget=budget,
        )
    else:
        found, error = _projected(policy, update, probe, metrics, sketch, budget)
    kernels = {m: k.numpy() for m, k in found.square.items()}
    signs = token_signs(update, seed=seed)
    null = square(weighted_logprobs(signs), metrics)
    if token_weights is not None:
        own, flipped = _contributions(token_weights, signs, kernels, null, metrics, square)
        kernels, null = {CONTRIBUTIONS: own, **kernels}, {CONTRIBUTIONS: flipped, **null}
    single = split_tokens(update)[0] if tokens else None
    index = split_tokens(update)[1] if tokens else np.zeros((0, 2), dtype=np.int64)
    by_token = (
        {}
        if single is None
        else grams(
            policy,
            SequenceGradients(single, response_logprob),
            metrics=metrics,
            budget=replace(budget, max_sequences=4 * budget.max_sequences),
        ).square
    )
    return FisherKernel(
        update=kernels,
        null=null,
        probe={m: k.numpy() for m, k in found.cross.items()},
        probe_norms={m: k.numpy() for m, k in found.other_norms.items()},
        update_rollouts=update,
        probe_rollouts=probe,
        num_params=sum(p.numel() for p in policy.parameters.values()),
        projection_error=error,
        tokens={m: k.numpy() for m, k in by_token.items()},
        token_index=index,
    )


def _contributions(
    token_weights: Sequence[FloatArray],
    signs: Sequence[FloatArray],
    kernels: Mapping[str, FloatArray],
    null: Mapping[str, FloatArray],
    metrics: Metrics,
    square: Callable[[Objective, Metrics], dict[str, FloatArray]],
) -> tuple[FloatArray, FloatArray]:
    """Kernel of c_i = sum_k w_ik grad l_ik and its null; no pass where w_ik is one number per response."""
    name = list(metrics)[-1]
    if all(np.ptp(w) == 0 for w in token_weights):
        scale = np.array([w[0] for w in token_weights])
        weights = np.outer(scale, scale)
        return weights * kernels[name], weights * null[name]
    chosen = {name: metrics[name]}
    own = square(weighted_logprobs(token_weights), chosen)[name]
    signed = [w * s for w, s in zip(token_weights, signs, strict=True)]
    return own, square(weighted_logprobs(signed), chosen)[name]


def split_tokens(rollouts: Rollouts, chosen: IntArray | None = None) -> tuple[Rollouts, IntArray]:
    """Tokens of the policy as responses of their own, after their prefixes; (sequence, position) of each.

    Args:
        rollouts: the sequences.
        chosen: which of the tokens that the policy wrote, counted over the whole batch; None for all.

    Raises:
        BatchError: more than 4096 tokens.
    """
    total = int(rollouts.num_policy_tokens.sum()) if chosen is None else len(chosen)
    if total > MOST_TOKENS:
        raise BatchError(
            f"{total} tokens one by one are too many, expected at most {MOST_TOKENS}; select fewer sequences"
        )
    owner, position = rollouts.places
    if chosen is not None:
        owner, position = owner[chosen], position[chosen]
    whole = rollouts.select(owner)
    pairs = list(zip(whole.prompt_token_ids, whole.response_token_ids, position.tolist(), strict=True))
    single = replace(
        whole,
        prompt_token_ids=tuple((*p, *r[:k]) for p, r, k in pairs),
        response_token_ids=tuple((r[k],) for _, r, k in pairs),
        logprobs=tuple(values[k : k + 1] for values, k in zip(whole.logprobs, position, strict=True)),
        entropies=tuple(values[k : k + 1] for values, k in zip(whole.entropies, position, strict=True)),
        response_masks=None,
        token_advantages=None,
        old_logprobs=None,
        sampler_logprobs=None,
    )
    return single, np.stack([owner, position], axis=1).astype(np.int64)


def _projected(
    policy: Policy,
    update: Rollouts,
    probe: Rollouts | None,
    metrics: dict[str, ParameterVector | None],
    sketch: Sketch,
    budget: Budget,
) -> tuple[Grams, Estimate]:
    """Kernels from random projections, and the error of their cosines on a random part of the batch."""

    def sketched(rollouts: Rollouts) -> dict[str, Tensor]:
        gradients = SequenceGradients(rollouts, response_logprob)
        return sketches(policy, gradients, sketch, metrics=metrics, budget=budget)

    left = sketched(update)
    right = {} if probe is None else sketched(probe)
    square, cross = _products(left, left), _products(right, left)
    norms = {m: s.double().square().sum(1).cpu() for m, s in right.items()}
    count = min(PROJECTION_CHECK, len(update))
    chosen = np.sort(np.random.default_rng(sketch.seed).choice(len(update), count, replace=False))
    part = update.select(chosen)
    exact = grams(policy, SequenceGradients(part, response_logprob), metrics=metrics, budget=budget)
    off = ~np.eye(count, dtype=bool)
    misses = []
    for m in metrics:
        guess = cosine_form(square[m].numpy()[np.ix_(chosen, chosen)])
        misses.append((guess - cosine_form(exact.square[m].numpy()))[off])
    size = float(np.sqrt(np.mean(np.concatenate(misses) ** 2))) if off.any() else float("nan")
    return Grams(square, cross, norms, blocks=1), Estimate(
        value=size,
        stderr=float("nan"),
        n=count,
        unit="cosine",
        method=f"root-mean-square error of a count sketch of dimension {sketch.dim} against exact cosines of "
        f"{count} sequences; 1/sqrt(dim) = {sketch.dim**-0.5:.3g}",
    )


def _products(rows: Mapping[str, Tensor], columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Metric to (rows, columns) inner products of sketches, for the metrics of the rows."""
    return {m: (s.double() @ columns[m].double().T).cpu() for m, s in rows.items()}
