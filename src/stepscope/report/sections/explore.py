"""The linked view: every token of the batch that made the step, with its response, classes and scores."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from stepscope.reading.answer import advantages, preference_roles
from stepscope.reading.measurement import Measurement
from stepscope.report import style
from stepscope.report.parts import Explorer, Room, Section
from stepscope.report.sections.criteria import best_of
from stepscope.report.sections.influence import ranked_tokens
from stepscope.report.sections.responses import END_MARK, PART_MARK, level_of
from stepscope.report.units import unit_of
from stepscope.results import Rollouts
from stepscope.rules.token_classes import by_quadrant, kinds, ordered

if TYPE_CHECKING:
    import pandas as pd

_TITLES = {"quadrant": "Verdict and probability", "kind": "Kind of token"}
_CONTEXT = "context, not written by the policy"
_FIRST_LEVEL = ord("f")
_STRONGEST = 0.995


def section(measurement: Measurement, room: Room) -> Section | None:
    """All tokens of the update batch in one linked view; None where tokens have no influence."""
    batch, tokens = measurement.update, ranked_tokens(measurement)
    if batch is None or tokens is None or "influence" not in tokens:
        return None
    tokens = tokens.sort_values(["sequence_id", "position"], kind="stable")
    tokens = _kept(tokens, room.explored)
    unit = unit_of(measurement.change)
    names = best_of(measurement, room.criteria(len(tokens)))
    caption = (
        f"Influence: what the token changes the {unit.quantity} by through this step, to first order, in "
        f"{unit.label}, ± one standard error over probe prompts. Likely: log p + H is not below 0, rare "
        "otherwise. Colours go by the square root of the size: blue lowers, orange raises the quantity; for "
        "anything else purple is below and green above zero."
    )
    count = tokens.sequence_id.nunique()
    if count < len(batch):
        caption += f" The responses with the largest summed |influence| are shown, {count} of {len(batch)}."
    spec = {"quantity": unit.quantity, "unit": unit.label, "by": unit.times, **_spec(tokens, batch)}
    scores = measurement.criteria_tokens.values if measurement.criteria_tokens else {}
    written = batch_places(batch)
    spec["levels"] = {
        name: _letters(_placed(tokens, written, np.asarray(scores[name]))) for name in names if name in scores
    }
    return Section("explore", "Explore the tokens", explorer=Explorer(caption, spec))


def _kept(tokens: pd.DataFrame, most: int) -> pd.DataFrame:
    """The tokens of as many whole responses as fit, the largest summed |influence| first."""
    if len(tokens) <= most:
        return tokens
    sizes = tokens.influence.abs().groupby(tokens.sequence_id).agg(["sum", "size"])
    sizes = sizes.sort_values("sum", ascending=False, kind="stable")
    chosen = sizes.index[sizes["size"].cumsum() <= most]
    found: pd.DataFrame = tokens[tokens.sequence_id.isin(chosen)]
    return found


def _spec(tokens: pd.DataFrame, batch: Rollouts) -> dict[str, Any]:
    sequence = tokens.sequence_id.to_numpy()
    frame = tokens.assign(advantage=advantages(tokens, batch))
    texts, influence = tokens.token.tolist(), tokens.influence.to_numpy()
    ungraded = bool(preference_roles(batch))
    ends = [*(np.flatnonzero(np.diff(sequence)) + 1).tolist(), len(sequence)]
    names: list[str] = []
    rows = []
    prompts: dict[str, int] = {}
    for start, end in itertools.pairwise([0, *ends]):
        i = int(sequence[start])
        bare = ["" if text in (END_MARK, PART_MARK) else text for text in texts[start:end]]
        names += kinds(bare, not batch.truncated[i])
        rows.append(
            {
                "id": i,
                "prompt": prompts.setdefault(batch.prompts[i] or batch.prompt_ids[i], len(prompts)),
                "length": end - start,
                "correct": None if ungraded else bool(batch.correct[i]),
                "reward": _number(batch.rewards[i]),
                "advantage": None if batch.advantages is None else _number(batch.advantages[i]),
                "influence": _number(float(np.nansum(influence[start:end]))),
                "truncated": bool(batch.truncated[i]),
            }
        )
    vocabulary: dict[str, int] = {}
    codes = [vocabulary.setdefault(text, len(vocabulary)) for text in texts]
    columns = {
        "influence": style.rounded(frame.influence, 3),
        "stderr": style.rounded(frame.stderr, 2),
        "logprob": style.rounded(frame.logprob, 3),
        "entropy": style.rounded(frame.entropy, 3),
    }
    if batch.token_advantages is not None:
        columns["advantage"] = style.rounded(frame.advantage, 3)
    quadrants = np.where(frame.written, np.array(by_quadrant(frame), dtype=object), _CONTEXT)
    ways: Mapping[str, Any] = {"quadrant": quadrants, "kind": names}
    return {
        "vocabulary": list(vocabulary),
        "text": codes,
        "columns": columns,
        "classes": {way: _classes(way, list(labels)) for way, labels in ways.items()},
        "sequences": rows,
        "prompts": list(prompts),
    }


def _classes(way: str, labels: list[Any]) -> Mapping[str, Any]:
    names = [str(label) for label in ordered(way, labels)]
    place = {name: number for number, name in enumerate(names)}
    return {"title": _TITLES[way], "labels": names, "codes": [place[str(label)] for label in labels]}


def _number(value: float) -> float | None:
    return style.rounded([value], 4)[0]


def batch_places(batch: Rollouts) -> dict[tuple[int, int], int]:
    """Place of each token that the policy wrote in the batch's flat order, by sequence and position."""
    sequence, position = batch.places
    return {place: k for k, place in enumerate(zip(sequence.tolist(), position.tolist(), strict=True))}


def _placed(tokens: pd.DataFrame, places: Mapping[tuple[int, int], int], values: Any) -> Any:
    """Values of the batch's flat order in that of the tokens; nan where the policy did not write."""
    found = [places.get(place, -1) for place in zip(tokens.sequence_id, tokens.position, strict=True)]
    return np.append(values, math.nan)[found]


def _letters(values: Any) -> str:
    """A level of colour for each, as a letter."""
    sizes = np.abs(values[np.isfinite(values)])
    scale = float(np.quantile(sizes, _STRONGEST)) if len(sizes) else 0.0
    scale = scale or (float(sizes.max()) if len(sizes) else 0.0) or 1.0
    return "".join(chr(_FIRST_LEVEL + level_of(float(value), scale)) for value in values)
