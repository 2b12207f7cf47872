"""Responses as shown: prompt, verdict, and tokens coloured by their influence."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stepscope.reading.answer import ROLES, preference_roles
from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Response, Room, Section, TokenSpan
from stepscope.results import Rollouts, RolloutTokens

END_MARK, PART_MARK = "⟨end⟩", "⟨part⟩"
"""Shown for tokens without a text of their own: the end of a response, bytes of a character still to come."""

_CONTEXT = "context, not written by the policy: no log-prob, entropy or influence"
_LEVELS = 5
_EACH = 3
_SHOWN = {
    "logprob": "log-prob",
    "entropy": "entropy",
    "token_weight": "token weight",
    "influence": "influence",
}
_SCORE = "score of "


def section(measurement: Measurement, room: Room) -> Section | None:
    """The first few correct and incorrect responses of the update (or else probe) batch, one per prompt.

    Of a training from preferences, where samples were not graded, the first of every role.
    """
    batch, tokens = measurement.update, measurement.update_tokens
    if batch is None:
        batch, tokens = measurement.probe, measurement.probe_tokens
    if batch is None:
        return None
    roles = preference_roles(batch)
    order = [role for role in ROLES if role in roles] if roles else ["correct", "incorrect"]
    kinds = np.array(roles or np.where(batch.correct, *order), dtype=object)
    chosen: list[int] = []
    for kind in order:
        first: dict[str, int] = {}
        for i in np.flatnonzero(kinds == kind).tolist():
            first.setdefault(batch.prompt_ids[i], i)
        chosen += list(first.values())[:_EACH]
    return Section(
        "responses",
        "Sampled responses",
        intro=f"The first {text.joined(order)} responses of the batch, one per prompt, not selected "
        "otherwise. Hover a token for its log-prob and entropy.",
        responses=shown_responses(
            batch, join_tokens(batch, tokens), chosen, 1.0, room.tokens(len(order) * _EACH)
        ),
    )


def join_tokens(
    batch: Rollouts | None,
    tokens: RolloutTokens | None,
    influence: Any = None,
    scores: Mapping[str, Any] | None = None,
) -> Any:
    """Tokens with verdicts, influence and scores, in the order of their file.

    Args:
        batch: the sequences.
        tokens: their response tokens.
        influence: rows of the influence of tokens on one quantity, or None.
        scores: name to (tok,) scores under criteria of the tokens that the policy wrote.

    Returns:
        The frame, None without tokens; an influence is nan where its file lacks the token, a score where the
        policy did not write it, which ``written`` says. A token without a text is called what it is: the
        end, or part of a later character.
    """
    if tokens is None:
        return None
    found = tokens.to_pandas()
    last = found.groupby("sequence_id").position.transform("max")
    ends = np.where(found.position == last, END_MARK, PART_MARK)
    written = np.ones(len(found), dtype=np.bool_) if tokens.response_mask is None else tokens.response_mask
    found = found.assign(token=found.token.where(found.token != "", ends), written=written)
    if batch is not None and not preference_roles(batch):
        found = found.assign(correct=batch.correct[found.sequence_id])
    if influence is not None:
        place = ["sequence_id", "position"]
        found = found.merge(influence[[*place, "influence", "stderr", "shrunk"]], how="left", on=place)
    for name, values in (scores or {}).items():
        found.loc[found.written, f"{_SCORE}{name}"] = values
    return found


def visible(token: str) -> str:
    """A token with its white space made visible."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "␣")


def shown_responses(
    batch: Rollouts, tokens: Any, chosen: Iterable[int], scale: float, most: int, unit: str = ""
) -> list[Response]:
    """Some responses with the first tokens of each.

    Args:
        batch: the sequences.
        tokens: by :func:`join_tokens`, or None.
        chosen: sequences to show.
        scale: influence of the strongest colour.
        most: tokens shown of each.
        unit: of the influences.
    """
    shown, ungraded = [], bool(preference_roles(batch))
    for i in map(int, chosen):
        own = None if tokens is None else tokens[tokens.sequence_id == i].sort_values("position")
        facts = [f"reward {text.number(batch.rewards[i])}"]
        if batch.advantages is not None:
            facts.append(f"advantage {text.number(batch.advantages[i])}")
        facts.append(f"{batch.num_policy_tokens[i]} tokens")
        if context := int(batch.num_tokens[i] - batch.num_policy_tokens[i]):
            facts.append(f"and {context} of tools or the environment")
        if batch.truncated[i]:
            facts.append("truncated")
        if own is not None and "influence" in own:
            facts.append(f"influence {text.number(float(own.influence.sum()))} {unit}")
        shown.append(
            Response(
                heading=f"Sequence {i}, {batch.prompt_ids[i]}",
                facts=", ".join(facts),
                correct=None if ungraded else bool(batch.correct[i]),
                prompt=batch.prompts[i],
                text=batch.responses[i],
                tokens=[] if own is None else _spans(own, scale, most),
            )
        )
    return shown


def _spans(tokens: Any, scale: float, most: int) -> list[TokenSpan]:
    names = {c: _SHOWN.get(c, c.removeprefix(_SCORE)) for c in tokens if c in _SHOWN or c.startswith(_SCORE)}
    shown = tokens[:most]
    values = [np.nan] * len(shown) if "influence" not in shown else shown.influence
    details = [
        ", ".join(f"{name} {text.number(value)}" for name, value in zip(names.values(), row, strict=True))
        for row in shown[list(names)].itertuples(index=False)
    ]
    spans = [
        TokenSpan(token, level_of(value, scale), f"{visible(token)}: {detail}")
        if written
        else TokenSpan(token, 0, f"{visible(token)}: {_CONTEXT}", context=True)
        for token, value, detail, written in zip(shown.token, values, details, shown.written, strict=True)
    ]
    further = len(tokens) - most
    return spans if further <= 0 else [*spans, TokenSpan(f" … {further} more tokens", 0, "not shown")]


def level_of(influence: float, scale: float) -> int:
    """Level of a token's colour, -5 to 5, on a square-root scale."""
    if not math.isfinite(influence):
        return 0
    return int(np.sign(influence)) * min(_LEVELS, round(_LEVELS * math.sqrt(abs(influence) / scale)))
