"""The kernel of a batch: what of it can be predicted without gradients, and whether it is more than noise."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from stepscope.measure.kernel.last_layer import tied_parts
from stepscope.measure.kernel.models import ModelOptions, judge
from stepscope.measure.kernel.null import NullOptions, spectrum_tests
from stepscope.measure.kernel.pairs import Pairs, pairs_of
from stepscope.measure.kernel.structure import first_copies
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.last_layer import LastLayer, UnknownHeadError
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, Rollouts
from stepscope.results.models import KernelModel, ModelsReport, NullTest


def kernel_models(
    policy: Policy,
    rollouts: Rollouts,
    *,
    preconditioner: ParameterVector | None = None,
    options: ModelOptions = ModelOptions(),
    null: NullOptions = NullOptions(),
    budget: Budget = Budget(),
) -> ModelsReport:
    """Models of the Fisher kernel judged on prompts they have not seen, and its spectrum against its null.

    Costs 2 + 2 ``null.signs`` gradient passes over the distinct responses, one more where the head is tied to
    the embedding, and two forward passes.

    Args:
        policy: its trainable parameters are differentiated.
        rollouts: the sequences.
        preconditioner: P, for example ``step.preconditioner``; adds the metric ``preconditioned``, in which
            the spectrum is then tested.
        options: how models are fitted.
        null: how the null is drawn; no tests with 0 signs.
        budget: what may be used at a time.

    Raises:
        MeasurementError: fewer prompts than folds, fewer than three folds, or a batch too large for the null.
    """
    metrics: dict[str, ParameterVector | None] = {"raw": None}
    if preconditioner is not None:
        metrics["preconditioned"] = preconditioner
    distinct = rollouts.select(np.flatnonzero(first_copies(rollouts) == np.arange(len(rollouts))))
    found = grams(policy, SequenceGradients(distinct, response_logprob), metrics=metrics, budget=budget)
    kernels = {name: np.asarray(K.numpy(), dtype=np.float64) for name, K in found.square.items()}
    kept = np.flatnonzero(np.min([np.diag(K) for K in kernels.values()], 0) > 0)
    distinct = distinct.select(kept)
    kernels = {name: K[np.ix_(kept, kept)] for name, K in kernels.items()}
    models: list[KernelModel] = []
    shares: dict[str, float] = {}
    left_out: dict[str, str] = {}
    try:
        pairs, layer = pairs_of(policy, distinct, metrics, budget=budget)
    except UnknownHeadError as error:
        left_out["models"] = str(error)
    else:
        for name, K in kernels.items():
            own = pairs if name in pairs.last else _without_head(pairs, name)
            models += judge(K, own, name, options)
        shares = _shares(policy, distinct, layer, kernels["raw"], budget)
    tests: tuple[NullTest, ...] = ()
    if null.signs:
        metric = list(metrics)[-1]
        tests = spectrum_tests(
            policy, distinct, metric=metrics[metric], name=metric, options=null, budget=budget
        )
    return ModelsReport(len(distinct), options.folds, tuple(models), tests, shares, left_out)


def _without_head(pairs: Pairs, metric: str) -> Pairs:
    """Pairs in a metric that the head is not in: its kernel is that of the plain gradient."""
    return replace(pairs, last=pairs.last | {metric: pairs.last["raw"]})


def _shares(
    policy: Policy, rollouts: Rollouts, layer: LastLayer, K: FloatArray, budget: Budget
) -> dict[str, float]:
    """Shares of the trace of K, P = 1; empty where the head is not trained."""
    if not layer.parameter:
        return {}
    parts = tied_parts(policy, rollouts, layer, budget=budget)
    return {name: float(values.sum() / np.trace(K)) for name, values in parts.items()}
