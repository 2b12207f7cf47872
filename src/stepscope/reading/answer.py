"""What one step did to the quantity, taken apart: its components, the batch by class, the largest tokens.

Everything is a change of the quantity by the step: influences per unit of learning rate, times the step's own
rate. Nothing is measured here; all of it is sums of what the artifacts of a measurement hold.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from stepscope.reading.measurement import Measurement
from stepscope.results import Rollouts
from stepscope.rules.token_classes import by_quadrant, kinds, ordered, token_names
from stepscope.stats import Estimate, estimate_from_sums

if TYPE_CHECKING:
    import pandas as pd

RANKED_BY = ("optimizer", "fixed")
"""The influence that ranks tokens, the first there is: it predicts best what leaving out does."""

CONTEXT = 8
"""Tokens shown on either side of one."""

_FOLD = "fold "

_PREFERENCES = "next_batch/"
"""What ids of groups begin with in a batch that a training from preferences left beside its checkpoint."""

ROLES = ("chosen", "rejected", "sampled")
"""Of responses in a training from preferences."""

_FOLDS = 8
"""Folds of the probe behind an influence's error, where ``reliability.json`` does not say."""

_COMPONENTS: Mapping[str, str] = {
    "momentum": "momentum",
    "decay": "weight decay",
    "bonus": "entropy bonus",
    "divergence": "KL divergence",
    "router": "router loss",
}


@dataclass(frozen=True)
class Part:
    """One part of the change.

    Attributes:
        name: in words; a class of tokens by its label.
        value: the change of the quantity that it makes, with its error.
        tokens: how many tokens of the batch are in it; 0 of what is no class of tokens.
        size: sum of the absolute changes of those tokens.
    """

    name: str
    value: Estimate
    tokens: int = 0
    size: float = 0.0


@dataclass(frozen=True)
class Waterfall:
    """The change by a step and what it is made of; the parts add up to ``change``.

    Attributes:
        parts: components without the batch, classes of the batch's tokens, and the rest.
        change: the true change, by the step as the training takes it.
        before: the quantity before the step.
    """

    parts: Sequence[Part]
    change: Estimate
    before: Estimate


@dataclass(frozen=True)
class TopToken:
    """A token that stands once or more often after the same prompt and prefix.

    Attributes:
        token: its text.
        before: texts of the eight tokens before it.
        after: of those after it, where it stands first.
        places: sequence and position of each time that it stands in the batch.
        value: the change that all of them make together, with its error.
        share: of the summed size of all tokens' changes.
    """

    token: str
    before: str
    after: str
    places: Sequence[tuple[int, int]]
    value: Estimate
    share: float


def waterfall(measurement: Measurement) -> Waterfall | None:
    """The change at the step's own learning rate and its parts; None where one of them was not measured.

    The rest is the true change less all other parts: second order and beyond, and how far the influence of
    tokens is from the batch's part. Its error is that of the true change less the first order, paired, beside
    the whole gap to first order. The errors of classes are over folds of the probe.
    """
    change, found = measurement.change, measurement.summary
    tokens = influential_tokens(measurement)
    if change is None or not change.lr > 0 or tokens is None:
        return None
    point = next((p for p in change.points if math.isclose(p.lr, change.lr, rel_tol=1e-6)), None)
    if point is None or not {"influence_momentum", "influence_decay"} <= set(found):
        return None
    lr = change.lr
    parts = [
        Part(words, found[f"influence_{name}"].scaled(lr, unit=point.true.unit))
        for name, words in _COMPONENTS.items()
        if f"influence_{name}" in found
    ]
    parts += token_classes(measurement, "quadrant")
    true = change.taken.true if change.taken else point.true
    rest = true.value - sum(part.value.value for part in parts)
    gap = point.linear.value - sum(part.value.value for part in parts)
    error = math.hypot(point.excess.stderr, change.taken.difference.stderr if change.taken else 0.0, gap)
    parts.append(
        Part("rest", Estimate(rest, error, point.excess.n, true.unit, "true change less all other parts"))
    )
    return Waterfall(parts, true, change.value)


def token_classes(measurement: Measurement, way: str) -> list[Part]:
    """What the tokens of each class change together; classes that change nothing are left out.

    Args:
        measurement: with influences of tokens.
        way: ``quadrant`` (verdict and probability), ``kind``, or ``role`` (chosen, rejected, sampled), which
            only a batch has that a training from preferences left.
    """
    tokens, batch, change = influential_tokens(measurement), measurement.update, measurement.change
    if tokens is None or batch is None:
        return []
    lr = change.lr if change and change.lr > 0 else 1.0
    unit = change.points[0].linear.unit if change and change.points else ""
    if way == "role":
        of_sequence = preference_roles(batch)
        names = [of_sequence[i] for i in tokens.sequence_id] if of_sequence else []
    else:
        names = list(by_quadrant(tokens)) if way == "quadrant" else _kinds(measurement, tokens)
    if not len(names):
        return []
    labels = np.array(names, dtype=object)
    parts = []
    for name in ordered(way, list(labels)):
        own = tokens[labels == name]
        size = float(own.influence.abs().sum()) * lr
        if size > 0:
            value = _together(own, _folds(measurement), unit).scaled(lr)
            parts.append(Part(str(name), value, len(own), size))
    return parts


def _together(tokens: pd.DataFrame, folds: int, unit: str) -> Estimate:
    """The sum of the influences of some tokens.

    All are judged by one probe, so that its folds tell the error of the sum. Where a measurement kept no
    folds (one of before ``influence_token_folds.parquet``), it is at most the sum of the tokens' errors.

    Args:
        tokens: rows of :func:`influential_tokens`.
        folds: of the probe.
        unit: of the sum.
    """
    value, method = float(tokens.influence.sum()), f"sum over {len(tokens)} tokens, first order"
    away = tokens.filter(like=_FOLD).to_numpy().sum(0)
    if len(away):
        return estimate_from_sums(value, away, unit=unit, method=f"{method}, errors over folds of the probe")
    bound = float(tokens.stderr.sum())
    return Estimate(value, bound, folds, unit, f"{method}, its error at most the sum of theirs")


def _kinds(measurement: Measurement, tokens: pd.DataFrame) -> list[str]:
    """The kind of each token, which goes by the whole response."""
    batch, every = measurement.update, measurement.update_tokens
    assert batch is not None
    assert every is not None
    table = every.to_pandas().sort_values(["sequence_id", "position"])
    names: dict[tuple[int, int], str] = {}
    for i, own in table.groupby("sequence_id"):
        known = kinds(own.token.tolist(), not batch.truncated[int(i)])
        names |= {(int(i), int(k)): name for k, name in zip(own.position, known, strict=True)}
    return [names[place] for place in zip(tokens.sequence_id, tokens.position, strict=True)]


def preference_roles(batch: Rollouts) -> list[str]:
    """(seq,) roles of responses in a training from preferences; none of another batch."""
    if not all(name.startswith(_PREFERENCES) for name in batch.prompt_ids):
        return []
    chosen, rejected, sampled = ROLES
    drawn = [name.startswith(f"{_PREFERENCES}sample/") for name in batch.prompt_ids]
    told = zip(drawn, batch.rewards, strict=True)
    return [sampled if own else chosen if reward > 0 else rejected for own, reward in told]


def _folds(measurement: Measurement) -> int:
    known = measurement.reliability.rankings if measurement.reliability else ()
    return known[0].halves.n if known and known[0].halves.n > 1 else _FOLDS


def influential_tokens(measurement: Measurement) -> pd.DataFrame | None:
    """The batch's tokens that have an influence on the primary quantity, in their order; None without.

    Columns: those of ``update_tokens.parquet`` and ``influence_tokens.parquet``, ``advantage``, and
    ``fold K`` with the deviations of ``influence_token_folds.parquet``, where there are any.
    """
    batch, tokens, influences = measurement.update, measurement.update_tokens, measurement.influence_tokens
    if batch is None or tokens is None or influences is None or not len(influences.influence):
        return None
    quantity = measurement.quantity
    taken = set(influences.through)
    way = next((way for way in RANKED_BY if way in taken), RANKED_BY[0])
    rows = influences.to_pandas()
    rows = rows[(rows.quantity == quantity) & (rows.through == way)]
    if rows.empty:
        return None
    place = ["sequence_id", "position"]
    rows = rows[[*place, "influence", "stderr", "shrunk"]]
    if (folds := measurement.influence_token_folds) is not None and folds.folds:
        beside = folds.to_pandas()
        beside = beside[(beside.quantity == quantity) & (beside.through == way)]
        rows = rows.merge(beside.drop(columns=["quantity", "through"]).rename(columns=_fold_column), on=place)
    known = tokens.to_pandas().merge(rows, on=place)
    return known.assign(advantage=advantages(known, batch)).sort_values(place, ignore_index=True)


def _fold_column(name: str) -> str:
    return f"{_FOLD}{name}" if name.isdigit() else name


def advantages(tokens: pd.DataFrame, batch: Rollouts) -> Any:
    """(tok,) advantages by sequence and position; nan where the batch has none."""
    if batch.token_advantages is not None:
        pairs = zip(tokens.sequence_id, tokens.position, strict=True)
        return np.array([batch.token_advantages[i][k] for i, k in pairs], dtype=np.float64)
    if batch.advantages is not None:
        return batch.advantages[tokens.sequence_id.to_numpy()]
    return np.full(len(tokens), math.nan)


def top_tokens(measurement: Measurement, most: int, sign: int) -> list[TopToken]:
    """The tokens that lower (sign -1) or raise (1) the quantity most, merged over prompt, prefix and token.

    They come in the order of their values; the largest of many are overestimated.

    Args:
        measurement: with influences of tokens.
        most: how many.
        sign: -1 or 1.
    """
    batch, tokens = measurement.update, influential_tokens(measurement)
    if batch is None or tokens is None:
        return []
    lr = measurement.change.lr if measurement.change and measurement.change.lr > 0 else 1.0
    unit = (
        measurement.change.points[0].linear.unit if measurement.change and measurement.change.points else ""
    )
    keys = _contexts(tokens, batch)
    sums = tokens.groupby(keys, sort=False).influence.sum()
    chosen = sums[np.sign(sums) == sign]
    chosen = chosen.iloc[np.argsort(-sign * chosen.to_numpy(), kind="stable")[:most]]
    total, folds = float(tokens.influence.abs().sum()), _folds(measurement)
    texts = measurement.update_tokens.to_pandas() if measurement.update_tokens else tokens
    found = []
    for key, summed in chosen.items():
        own = tokens[keys == key]
        places = [(int(i), int(k)) for i, k in zip(own.sequence_id, own.position, strict=True)]
        response = texts[texts.sequence_id == places[0][0]].sort_values("position")
        token, before, after = _around(response, places[0][1])
        value = _together(own, folds, unit).scaled(lr)
        share = abs(float(summed)) / total if total else math.nan
        found.append(TopToken(token, before, after, places, value, share))
    return found


def _contexts(tokens: pd.DataFrame, batch: Rollouts) -> Any:
    """(tok,) a number for each prompt, prefix and token."""
    nodes: dict[Any, int] = {}
    of: dict[int, list[int]] = {}
    for i in dict.fromkeys(tokens.sequence_id.tolist()):
        node: Any = (-1, batch.prompt_keys[i])
        of[i] = []
        for token in batch.response_token_ids[i]:
            node = nodes.setdefault((node, int(token)), len(nodes))
            of[i].append(node)
    return np.array([of[i][k] for i, k in zip(tokens.sequence_id, tokens.position, strict=True)])


def _around(row: pd.DataFrame, position: int) -> tuple[str, str, str]:
    """A token, and the texts before and after it."""
    texts = row.token.tolist()
    named = token_names(texts, ended=True)
    at = row.position.tolist().index(position)
    return named[at], "".join(named[max(0, at - CONTEXT) : at]), "".join(named[at + 1 : at + 1 + CONTEXT])
