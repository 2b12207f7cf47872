"""Models of the Fisher kernel: its entries for responses to prompts that the model has not seen.

K takes a gradient of every sequence. A model of it predicts from less: from entries of other prompts alone,
from the tokens of the responses, or from a forward pass. Judged across folds of prompts: the rows of a fold's
sequences are predicted by what was fitted to the entries among the other folds. A row's entry with itself,
with responses to its own prompt and with those to others are three kinds of pair, each with its own
coefficients and its own figures. Identical responses to a prompt are one.

The Gaussian process and the deep kernel machine (:mod:`stepscope.kernels`, with inducing points) predict
K(i, j) / sqrt(X(i, i) X(j, j)) from the cosines of all layers' kernels of the pair, shared tokens and kind of
pair, X the fitted sum of layers' kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import nnls
from scipy.stats import spearmanr

from stepscope.errors import MeasurementError
from stepscope.measure.kernel.machines import Machine, MachineOptions, regressed
from stepscope.measure.kernel.pairs import KINDS, Pairs
from stepscope.results import BoolArray, FloatArray, IntArray
from stepscope.results.models import KernelModel
from stepscope.stats import Estimate, jackknife, leave_out

Predict = Callable[["Task"], FloatArray]


@dataclass(frozen=True, kw_only=True)
class ModelOptions:
    """How models are fitted.

    Attributes:
        folds: of prompts.
        inducing: inducing points of the Gaussian process and of the machine.
        pairs: most pairs that these two are fitted to, drawn at random: every sequence with itself, then as
            many pairs of one prompt as of two.
        width: nu of the machine.
        steps: of Adam.
        seed: of folds, pairs and inducing points.
    """

    folds: int = 4
    inducing: int = 50
    pairs: int = 800
    width: float = 1000.0
    steps: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Task:
    """The entries of one fold to be predicted from those of the others.

    Attributes:
        K: (seq, seq) all entries; only those with ``known`` in row and column may be looked at.
        pairs: of the batch.
        metric: of K.
        known: (seq,) True on sequences of the other folds.
        options: how models are fitted.
    """

    K: FloatArray
    pairs: Pairs
    metric: str
    known: BoolArray
    options: ModelOptions

    def training(self, kind: str) -> tuple[IntArray, IntArray]:
        """Rows and columns of the known pairs of a kind, each once."""
        own = self.pairs.kinds[kind] & self.known[:, None] & self.known[None, :]
        rows, columns = np.nonzero(np.triu(own))
        return rows, columns

    def by_kind(self, fit: Callable[[str], FloatArray]) -> FloatArray:
        """(seq, seq) from the (seq, seq) that ``fit`` makes of each kind."""
        found = np.zeros_like(self.K)
        for kind, mask in self.pairs.kinds.items():
            found[mask] = fit(kind)[mask]
        return found


@dataclass(frozen=True)
class _Model:
    """A model: what it predicts, what it is, how many passes it takes and how many numbers it fits."""

    predict: Predict
    formula: str
    passes: int
    fitted: Callable[[Pairs], int] = field(default=lambda pairs: 0)


def _mean(task: Task) -> FloatArray:
    def fit(kind: str) -> FloatArray:
        at = task.training(kind)
        return np.full_like(task.K, task.K[at].mean() if len(at[0]) else 0.0)

    return task.by_kind(fit)


def _components(task: Task) -> FloatArray:
    """Mean plus the column's effect, shrunk by its share of the variance of column means."""
    found = _mean(task)
    apart = task.pairs.kinds["different_prompts"]
    known = np.flatnonzero(task.known)
    part, mask = task.K[np.ix_(known, known)], apart[np.ix_(known, known)]
    counts = mask.sum(0)
    if not (counts > 1).all():
        return found
    level = part[mask].mean()
    effects = (part * mask).sum(0) / counts - level
    noise = ((part - level - effects[None, :]) ** 2 * mask).sum(0) / (counts - 1) / counts
    signal = max(0.0, float(effects.var() - noise.mean()))
    shrunk = effects * signal / (signal + noise) if signal else np.zeros_like(effects)
    columns = np.zeros(len(task.K))
    columns[known] = shrunk
    return found + apart * columns[None, :]


def _least_squares(task: Task, features: FloatArray, *, positive: bool = False) -> FloatArray:
    """(seq, seq) sum of features with coefficients of each kind of pair, fitted to the known pairs."""

    def fit(kind: str) -> FloatArray:
        at = task.training(kind)
        x, y = features[:, at[0], at[1]].T, task.K[at]
        if len(y) < 2 * x.shape[1]:
            return np.full_like(task.K, y.mean() if len(y) else 0.0)
        scale = np.sqrt((x**2).mean(0))
        scale[scale == 0] = 1.0
        solved = nnls(x / scale, y) if positive else np.linalg.lstsq(x / scale, y, rcond=1e-8)
        found = solved[0]
        return np.asarray(np.tensordot(found / scale, features, 1), dtype=np.float64)

    return task.by_kind(fit)


def _layers(task: Task) -> FloatArray:
    return _least_squares(task, _parts(task), positive=True)


def _parts(task: Task) -> FloatArray:
    """(part, seq, seq) kernels of all layers, and of the last in the metric."""
    return np.concatenate([task.pairs.layers, task.pairs.last[task.metric][None]])


def _regression(task: Task, machine: Machine) -> FloatArray:
    """By a machine with inducing points; rows of the fold alone."""
    options = task.options
    own = np.diag(_layers(task)).copy()
    floor = own[own > 0].min() if (own > 0).any() else 1.0
    scale = np.sqrt(np.outer(np.maximum(own, floor), np.maximum(own, floor)))
    rows, columns = _drawn(task)
    inputs, target = task.pairs.inputs(), task.K / scale
    x, y = inputs[rows, columns], target[rows, columns]
    held = inputs[~task.known]
    machine_options = MachineOptions(
        inducing=options.inducing, width=options.width, steps=options.steps, seed=options.seed
    )
    made = regressed(machine, x, y, held.reshape(-1, held.shape[-1]), machine_options)
    found = np.zeros_like(task.K)
    found[~task.known] = made.reshape(held.shape[:-1]) * scale[~task.known]
    return found


def _drawn(task: Task) -> tuple[IntArray, IntArray]:
    """Rows and columns of the pairs that a regression is fitted to."""
    rng = np.random.default_rng([task.options.seed, 4])
    left, chosen = task.options.pairs, []
    for number, kind in enumerate(KINDS):
        rows, columns = task.training(kind)
        count = min(len(rows), left // (len(KINDS) - max(number, 1)))
        take = np.sort(rng.choice(len(rows), count, replace=False))
        chosen.append((rows[take], columns[take]))
        left -= count
    return np.concatenate([r for r, _ in chosen]), np.concatenate([c for _, c in chosen])


MODELS: Mapping[str, _Model] = {
    "mean": _Model(_mean, "mean of the kind of pair", 0, lambda p: 3),
    "components": _Model(
        _components, "the same plus the effect of the column, shrunk", 0, lambda p: 3 + len(p.prompts)
    ),
    "tokens": _Model(
        lambda task: _least_squares(task, task.pairs.texts),
        "least squares on lengths, shared prefix and shared tokens, by kind of pair",
        0,
        lambda p: 3 * len(p.texts),
    ),
    "last_layer": _Model(
        lambda task: task.pairs.last[task.metric],
        "(h . h')((e - pi) . (e' - pi')) summed over tokens, as it is",
        1,
    ),
    "last_layer_scaled": _Model(
        lambda task: _least_squares(task, task.pairs.last[task.metric][None]),
        "the same times a number for each kind of pair",
        1,
        lambda p: 3,
    ),
    "layers": _Model(
        _layers,
        "the same with the states of every layer, a positive coefficient for each layer and kind of pair",
        1,
        lambda p: 3 * (1 + len(p.layers)),
    ),
    "gaussian_process": _Model(
        lambda task: _regression(task, "gaussian_process"),
        "sparse Gaussian process on layers' cosines and tokens, times lengths by `layers`",
        1,
    ),
    "deep_kernel": _Model(
        lambda task: _regression(task, "deep_kernel"),
        "sparse deep kernel machine, two layers, on the same",
        1,
    ),
}


def predicted(
    K: FloatArray, pairs: Pairs, metric: str, model: str, options: ModelOptions = ModelOptions()
) -> FloatArray:
    """(seq, seq) predicted entries, every row by what was fitted to entries among other folds of prompts.

    Args:
        K: (seq, seq) kernel.
        pairs: of the same sequences.
        metric: of K, a key of ``pairs.last``.
        model: its name.
        options: how it is fitted.

    Raises:
        MeasurementError: fewer prompts than folds, or fewer than three folds.
    """
    found, folds = np.zeros_like(K), _folds(pairs.prompts, options)
    for fold in range(options.folds):
        held = folds == fold
        found[held] = MODELS[model].predict(Task(K, pairs, metric, ~held, options))[held]
    return found


def _folds(prompts: IntArray, options: ModelOptions) -> IntArray:
    """(seq,) fold of each sequence's prompt."""
    count = int(prompts.max()) + 1
    if not 3 <= options.folds <= count:
        raise MeasurementError(
            f"models of the kernel: {options.folds} folds of {count} prompts, expected at least 3 and at "
            "most one for each prompt; set models.folds, or take more prompts"
        )
    found = np.random.default_rng(options.seed).permutation(count) % options.folds
    return np.asarray(found[prompts], dtype=np.int64)


def judge(
    K: FloatArray, pairs: Pairs, metric: str, options: ModelOptions = ModelOptions()
) -> tuple[KernelModel, ...]:
    """Every model of K, cross-fitted over prompts; errors by leaving out prompts, given what was fitted.

    R^2 is over the entries of all folds. Ranks are of the entries within one, averaged over folds by their
    number: a fold's mean is fitted to all others and so is low where its own entries are high, which across
    folds would give a model that knows nothing a negative rank correlation.

    Args:
        K: (seq, seq) kernel of distinct responses.
        pairs: of the same.
        metric: of K.
        options: how models are fitted.

    Raises:
        MeasurementError: fewer prompts than folds, or fewer than three folds.
    """
    found, folds = [], _folds(pairs.prompts, options)
    for name, model in MODELS.items():
        guess = predicted(K, pairs, metric, name, options)
        r2, ranks = {}, {}
        for kind, mask in pairs.kinds.items():
            r2[kind], ranks[kind] = _figures(K, guess, mask, pairs.prompts, folds)
        found.append(KernelModel(name, metric, model.formula, model.passes, model.fitted(pairs), r2, ranks))
    return tuple(found)


def _figures(
    K: FloatArray, guess: FloatArray, mask: BoolArray, prompts: IntArray, folds: IntArray
) -> tuple[Estimate, Estimate]:
    """R^2 and rank correlation over one kind of pair."""

    def both(keep: IntArray) -> FloatArray:
        part = np.ix_(keep, keep)
        own = mask[part]
        true, told, fold = K[part][own], guess[part][own], folds[keep][np.nonzero(own)[0]]
        total = float(((true - true.mean()) ** 2).sum()) if len(true) else 0.0
        r2 = 1 - float(((true - told) ** 2).sum()) / total if total > 0 else math.nan
        return np.array([r2, _ranks(true, told, fold)])

    values = both(np.arange(len(prompts)))
    count = int(prompts.max()) + 1
    without = np.array(leave_out(both, prompts))
    made = []
    for place, (unit, of) in enumerate((("share of the variance", ""), ("correlation", "within folds, "))):
        _, error = jackknife(without[:, place])
        method = f"{of}cross-fitted over prompts; jackknife over prompts, given what was fitted"
        made.append(Estimate(float(values[place]), float(error), count, unit, method))
    return made[0], made[1]


def _ranks(true: FloatArray, told: FloatArray, folds: IntArray) -> float:
    """Rank correlation within folds, by their number of entries; of those in which something is ordered."""
    found, counts = [], []
    for fold in np.unique(folds):
        x, y = true[folds == fold], told[folds == fold]
        if len(x) > 2 and np.ptp(x) > 0 and np.ptp(y) > 1e-12 * np.abs(y).max():
            found.append(float(spearmanr(x, y).statistic))
            counts.append(len(x))
    return float(np.average(found, weights=counts)) if found else math.nan
