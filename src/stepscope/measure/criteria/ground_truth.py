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

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from stepscope.errors import BatchError
from stepscope.measure.influence.attribution import NUM_FOLDS, token_products
from stepscope.measure.influence.probe_gradient import ProbeGradient, fitting_groups, probe_gradient
from stepscope.measure.kernel.fisher import split_tokens
from stepscope.measure.quantity.base import VERSIONS, make_quantity
from stepscope.measure.quantity.probe import Bindings, bindings_on
from stepscope.measure.step.reconstruct import Step, ascent_of_sequences
from stepscope.policy import vectors
from stepscope.policy.gradients.derivatives import (
    Mode,
    directional_derivatives,
    response_entropy,
    response_logprob,
)
from stepscope.policy.gradients.products import paired_dots
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import ParameterVector
from stepscope.results import BoolArray, FloatArray, IntArray, Rollouts

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
        folds: (fold, tok) the same from each of a few folds of the probe prompts, an even number; None where
            no probe batch enters.
        probe_fold: (probe seq,) fold of each probe sequence; None likewise.
    """

    kind: str
    preconditioner: str
    version: str
    values: FloatArray
    chosen: IntArray
    method: str
    folds: FloatArray | None = None
    probe_fold: IntArray | None = None

    @property
    def probe_half(self) -> IntArray | None:
        """(probe seq,) which half of the probe prompts each probe sequence is in: even or odd folds."""
        return None if self.probe_fold is None else self.probe_fold % 2

    @property
    def halves(self) -> FloatArray | None:
        """(2, tok) the truth from each half of the probe prompts."""
        return self._mixed(lambda fold, part: fold % 2 == part, 2)

    @property
    def without_folds(self) -> FloatArray | None:
        """(fold, tok) the truth from all the probe prompts but those of each fold."""
        return None if self.folds is None else self._mixed(lambda fold, part: fold != part, len(self.folds))

    @property
    def halves_without_folds(self) -> FloatArray | None:
        """(fold, 2, tok) the halves from all their prompts but those of each fold; None of fewer than 4."""
        if self.folds is None or len(self.folds) < 4:
            return None
        mixed = [
            self._mixed(lambda fold, part, f=f: (fold % 2 == part) & (fold != f), 2)  # type: ignore[misc]
            for f in range(len(self.folds))
        ]
        return np.stack([m for m in mixed if m is not None])

    def _mixed(self, chosen: Callable[[IntArray, IntArray], BoolArray], count: int) -> FloatArray | None:
        """(count, tok) the truth from the folds that are chosen for each part, weighted by their size."""
        if self.folds is None or self.probe_fold is None:
            return None
        parts, folds = np.arange(count)[:, None], np.arange(len(self.folds))
        weights = chosen(folds, parts) * np.bincount(self.probe_fold, minlength=len(self.folds))
        return np.asarray(weights / weights.sum(1, keepdims=True) @ self.folds, dtype=np.float64)

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
        num_folds: most folds of the probe prompts that columns are taken from one by one, which tells the
            part of the probe in every error; even. Fewer where there are fewer prompts, or where their
            gradients do not fit.
        seed: of that draw and of the folds of the probe prompts.
        mode: how token derivatives are taken, see ``directional_derivatives``.
    """

    baseline: str = "best"
    max_diagonal: int = 512
    num_folds: int = NUM_FOLDS
    seed: int = 0
    mode: Mode = "auto"


def ground_truths(
    policy: Policy,
    step: Step,
    probe: Rollouts,
    *,
    options: GroundTruthOptions = GroundTruthOptions(),
    bindings: Bindings | None = None,
    budget: Budget = Budget(),
) -> tuple[GroundTruth, ...]:
    """All truths about the tokens of ``step.update``.

    Costs three gradient passes over the probe batch, a forward-mode pass over the update batch for each fold
    of the probe, metric and version and two more (34 with 8 folds), and two gradient passes over as many
    sequences as the diagonal has tokens. Eight folds and not four: an error from four has three degrees of
    freedom, and intervals are a third longer for it.

    Args:
        policy: where the step starts; not changed.
        step: the step.
        probe: samples of the policy that are not in the update batch; for the columns.
        options: baseline, diagonal, seed.
        bindings: quantities of the probe batch that are known already, or will be asked for again.
        budget: what may be used at a time.

    Raises:
        BatchError: the probe batch has one prompt only, or ``max_diagonal`` is above 4096.
        MeasurementError: the optimizer has no preconditioner.
    """
    if probe.num_prompts < 2:
        raise BatchError("probe batch: one prompt only, and truths are checked on halves; use 2 or more")
    bindings = bindings_on(bindings, policy, probe, step.direction, budget)
    columns = [c for v in VERSIONS for c in _columns(step, bindings, v, options, budget)]
    rows = _rows(policy, step, options.mode, budget)
    return (*columns, *rows, *_diagonals(policy, step, options, budget))


def _columns(
    step: Step, bindings: Bindings, version: str, options: GroundTruthOptions, budget: Budget
) -> list[GroundTruth]:
    policy, probe = bindings.policy, bindings.rollouts
    pushed = np.flatnonzero(step.update.flat(step.token_weights))
    slope = _by_fold(bindings, version, options, budget)
    folds = slope.folds(slope.num_groups)
    found = []
    for name, metric in _metrics(step).items():
        pulled = slope.parts if metric is None else vectors.multiply(metric, slope.parts)
        by_fold = token_products(policy, step, pulled, folds.mixing, mode=options.mode, budget=budget)
        found.append(
            GroundTruth(
                kind="column",
                preconditioner=name,
                version=version,
                values=folds.shares @ by_fold,
                chosen=pushed,
                folds=by_fold,
                probe_fold=folds.labels,
                method=f"influence of each token on the {version} entropy per token of {len(probe)} probe "
                f"responses, per unit of lr, {_METRIC[name]}; {len(pushed)} tokens with a weight",
            )
        )
    return found


def _rows(policy: Policy, step: Step, mode: Mode, budget: Budget) -> list[GroundTruth]:
    ascent = ascent_of_sequences(policy, step, budget)
    found = []
    both = (ascent, step.components["sequences"])
    changes = directional_derivatives(
        policy, step.update, response_entropy, both, mode=mode, as_trained=False, budget=budget
    )
    for name, change in zip(("sgd", "adamw"), changes, strict=True):
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
        SequenceGradients(single, response_entropy, as_trained=False),
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


def _by_fold(bindings: Bindings, version: str, options: GroundTruthOptions, budget: Budget) -> ProbeGradient:
    """The entropy's gradient in folds of the probe prompts."""
    policy, probe = bindings.policy, bindings.rollouts
    entropy = make_quantity("entropy", probe, version=version)
    bound = bindings.bind(entropy, options.baseline)
    twice = replace(budget, memory_bytes=budget.memory_bytes // 2)  # the parts, and the parts times P
    count = min(options.num_folds, probe.num_prompts, fitting_groups(policy, twice))
    folds = np.random.default_rng(options.seed).permutation(probe.num_prompts) % max(2, count - count % 2)
    return probe_gradient(policy, probe, bound, groups=folds[probe.prompt_index], budget=budget)
