"""Three ground truths about tokens and the entropy, which a criterion may or may not know.

With K[s, t] = w_t grad H_s . P . grad l_t, the effect of token t's part of the step on the entropy at s,

    column   sum over s: influence of token t on the policy's entropy, over a probe batch
    row      sum over t in the update batch: change of the entropy at position s
    diagonal K[t, t]: what token t does to the entropy at its own position

each with P = 1 (a plain gradient step, ``sgd``) and with the optimizer's P (``adamw``; momentum and decay are
not part of it). Columns come in both versions of the entropy; rows and diagonals are of given prefixes. All
are per unit of lr. Rows and columns are forward-mode derivatives, the diagonal a pair of gradients per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from stepscope.errors import BatchError
from stepscope.measure.influence.probe_gradient import probe_gradient
from stepscope.measure.kernel.fisher import split_tokens
from stepscope.measure.quantity.base import VERSIONS, make_quantity
from stepscope.measure.quantity.probe import bind_quantity
from stepscope.measure.step.reconstruct import Step, weighted_logprobs
from stepscope.policy import vectors
from stepscope.policy.forward import TokenBatch, TokenOutputs
from stepscope.policy.gradients.derivatives import Mode, directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.products import paired_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import FloatArray, IntArray, Rollouts

TRUTHS = ("column", "row", "diagonal")
PRECONDITIONERS = ("sgd", "adamw")


@dataclass(frozen=True, kw_only=True)
class GroundTruth:
    """One truth about the tokens of an update batch.

    Attributes:
        kind: ``column``, ``row`` or ``diagonal``.
        preconditioner: ``sgd`` or ``adamw``.
        version: ``on_policy`` or ``fixed_prefix``.
        values: (tok,) over the whole update batch; nan where it was not computed.
        chosen: tokens it ranks, counted over the batch: all positions for rows; for columns those with a
            token weight, since the others have no effect; for diagonals a random part of those.
        method: in words.
        halves: (2, tok) the same from each half of the probe prompts; None where no probe batch enters.
        probe_half: (probe seq,) which half of the probe prompts each probe sequence is in; None likewise.
    """

    kind: str
    preconditioner: str
    version: str
    values: FloatArray
    chosen: IntArray
    method: str
    halves: FloatArray | None = None
    probe_half: IntArray | None = None

    @property
    def name(self) -> str:
        """Column of ``criteria_tokens.parquet``."""
        version = f"_{self.version}" if self.kind == "column" else ""
        return f"{self.kind}_{self.preconditioner}{version}"


@dataclass(frozen=True, kw_only=True)
class GroundTruthOptions:
    """How ground truths are computed.

    Attributes:
        baseline: rung of the baseline ladder of the on-policy entropy's gradient.
        max_diagonal: most tokens whose diagonal is computed, drawn at random; at most 4096.
        seed: of that draw and of the halves of the probe prompts.
        mode: how token derivatives are taken, see ``directional_derivative``.
    """

    baseline: str = "best"
    max_diagonal: int = 512
    seed: int = 0
    mode: Mode = "auto"


def ground_truths(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    *,
    options: GroundTruthOptions = GroundTruthOptions(),
    budget: Budget = Budget(),
) -> tuple[GroundTruth, ...]:
    """All truths about the tokens of ``step.update``.

    Costs two gradient passes over the probe batch, ten forward-mode passes over the update batch, and two
    gradient passes over as many sequences as the diagonal has tokens.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        probe: samples of the policy that are not in the update batch; for the columns.
        options: baseline, diagonal, seed.
        budget: what may be used at a time.

    Raises:
        BatchError: the probe batch has one prompt only, or ``max_diagonal`` is above 4096.
        MeasurementError: the optimizer has no preconditioner.
    """
    if probe.num_prompts < 2:
        raise BatchError("probe batch: one prompt only, and truths are checked on halves; use 2 or more")
    columns = [c for v in VERSIONS for c in _columns(policy, step, probe, v, options, budget)]
    rows = _rows(policy, step, options.mode, budget)
    return (*columns, *rows, *_diagonals(policy, step, options, budget))


def _columns(
    policy: Policy, step: Step, probe: Rollouts, version: str, options: GroundTruthOptions, budget: Budget
) -> list[GroundTruth]:
    weights = step.update.flat(step.token_weights)
    pushed = np.flatnonzero(weights)
    parts, half = _halves(policy, step, probe, version, options, budget)
    sizes = np.bincount(half, minlength=2)
    found = []
    for name, metric in _metrics(step).items():
        slopes = [_slopes(policy, step.update, part, metric, options.mode, budget) for part in parts]
        halves = weights * np.stack(slopes)
        found.append(
            GroundTruth(
                kind="column",
                preconditioner=name,
                version=version,
                values=sizes / sizes.sum() @ halves,
                chosen=pushed,
                halves=halves,
                probe_half=half,
                method=f"influence of each token on the {version} entropy per token of {len(probe)} probe "
                f"responses, per unit of lr, {_METRIC[name]}; {len(pushed)} tokens with a weight",
            )
        )
    return found


def _rows(policy: Policy, step: Step, mode: Mode, budget: Budget) -> list[GroundTruth]:
    ascent = gradient(policy, step.update, weighted_logprobs(step.token_weights), budget=budget)
    found = []
    for name, direction in (("sgd", ascent), ("adamw", step.components["sequences"])):
        change = directional_derivative(
            policy, step.update, _entropies, direction, mode=mode, as_trained=False, budget=budget
        )
        values = step.update.flat([d.double().cpu().numpy() for d in change])
        found.append(
            GroundTruth(
                kind="row",
                preconditioner=name,
                version="fixed_prefix",
                values=values,
                chosen=np.arange(len(values)),
                method=f"change of the entropy at each position by the whole update batch, per unit of lr, "
                f"{_METRIC[name]}; {len(values)} positions",
            )
        )
    return found


def _diagonals(policy: Policy, step: Step, options: GroundTruthOptions, budget: Budget) -> list[GroundTruth]:
    weights = step.update.flat(step.token_weights)
    pushed = chosen = np.flatnonzero(weights)
    drawn = ""
    if len(pushed) > options.max_diagonal:
        random = np.random.default_rng(options.seed)
        chosen = np.sort(random.choice(pushed, options.max_diagonal, replace=False))
        drawn = f" drawn at random from {len(pushed)}"
    single, _ = split_tokens(step.update, chosen)
    own = paired_dots(
        policy,
        SequenceGradients(single, response_logprob),
        SequenceGradients(single, _entropies, as_trained=False),
        _metrics(step),
        budget=budget,
    )
    found = []
    for name, dots in own.items():
        values = np.full(len(weights), np.nan)
        values[chosen] = weights[chosen] * dots
        found.append(
            GroundTruth(
                kind="diagonal",
                preconditioner=name,
                version="fixed_prefix",
                values=values,
                chosen=chosen,
                method=f"effect of each token's own gradient on the entropy at its own position, per unit of "
                f"lr, {_METRIC[name]}; {len(chosen)} tokens{drawn}",
            )
        )
    return found


def _metrics(step: Step) -> dict[str, ParameterVector | None]:
    return {"sgd": None, "adamw": step.metric()}


_METRIC = {"sgd": "P = 1", "adamw": "the optimizer's P"}


def _entropies(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    return outputs.entropies


def _halves(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    version: str,
    options: GroundTruthOptions,
    budget: Budget,
) -> tuple[list[dict[str, Tensor]], IntArray]:
    """The entropy's gradient on each half of the probe prompts, and the half of each probe sequence."""
    entropy = make_quantity("entropy", probe, version=version)
    bound = bind_quantity(
        policy, probe, entropy, direction=step.direction, baseline=options.baseline, budget=budget
    )
    prompts = np.random.default_rng(options.seed).permutation(probe.num_prompts) % 2
    half = prompts[probe.prompt_index]
    slope = probe_gradient(policy, probe, bound, groups=half, errors=False, budget=budget)
    sizes = np.bincount(half, minlength=2)
    parts = [{n: t[h] / int(sizes[h]) for n, t in slope.parts.items()} for h in range(2)]
    return parts, half


def _slopes(
    policy: Policy,
    update: Rollouts,
    slope: ParameterVector,
    metric: Mapping[str, Tensor] | None,
    mode: Mode,
    budget: Budget,
) -> FloatArray:
    """(tok,) (P slope) . grad l_k."""
    u = slope if metric is None else vectors.multiply(metric, slope)
    found = directional_derivative(policy, update, response_logprob, u, mode=mode, budget=budget)
    return update.flat([d.double().cpu().numpy() for d in found])
