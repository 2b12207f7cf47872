"""Responses as shown: prompt, verdict, and tokens coloured by their influence."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stepscope.report import text
from stepscope.report.influence import TokenTable, join_tokens, visible
from stepscope.report.load import Measurement, Table

_LEVELS = 5


@dataclass(frozen=True)
class TokenSpan:
    """One token of a response: its text, its colour level (-5..5) and the line shown on hover."""

    shown: str
    level: int
    detail: str


@dataclass(frozen=True)
class Response:
    """One response as shown: heading, prompt and tokens (``text`` alone where there are no tokens)."""

    heading: str
    facts: str
    correct: bool | None
    prompt: str
    text: str
    tokens: Sequence[TokenSpan]


def influential_responses(
    measurement: Measurement, tokens: TokenTable, *, most: int, max_tokens: int
) -> list[Response]:
    """The responses with the largest summed |influence|, tokens coloured on one common scale."""
    if tokens.influence is None or measurement.update is None:
        return []
    values = np.nan_to_num(tokens.influence)
    scale = float(np.quantile(np.abs(values), 0.995)) or float(np.abs(values).max()) or 1.0
    weight: dict[int, float] = {}
    for sequence, value in zip(tokens.sequence_id.tolist(), np.abs(values).tolist(), strict=True):
        weight[sequence] = weight.get(sequence, 0.0) + value
    top = sorted(weight, key=lambda s: -weight[s])[:most]
    return _responses(measurement.update, tokens, top, scale, max_tokens)


def sampled_responses(measurement: Measurement, *, each: int, max_tokens: int) -> list[Response]:
    """The first few correct and incorrect responses of the update (or else probe) batch, one per prompt."""
    sequences = measurement.update if measurement.update is not None else measurement.probe
    if sequences is None:
        return []
    tokens = measurement.update_tokens if measurement.update is not None else measurement.probe_tokens
    verdicts = sequences.get("correct", [None] * len(sequences["sequence_id"]))
    chosen: list[int] = []
    for wanted in (True, False) if "correct" in sequences else (None,):
        prompts: set[str] = set()
        for sequence, prompt, verdict in zip(
            sequences["sequence_id"], sequences["prompt_id"], verdicts, strict=True
        ):
            if verdict is wanted and prompt not in prompts and len(prompts) < each:
                prompts.add(prompt)
                chosen.append(sequence)
    return _responses(sequences, join_tokens(sequences, tokens, None, ""), chosen, 1.0, max_tokens)


def _responses(
    sequences: Table, tokens: TokenTable | None, chosen: Sequence[int], scale: float, max_tokens: int
) -> list[Response]:
    row_of = {sequence: row for row, sequence in enumerate(sequences["sequence_id"])}
    responses = []
    for sequence in chosen:
        row = row_of[sequence]
        spans: list[TokenSpan] = []
        net = math.nan
        if tokens is not None:
            idx = np.flatnonzero(tokens.sequence_id == sequence)
            idx = idx[np.argsort(tokens.position[idx])]
            spans = [_span(tokens, int(i), scale) for i in idx[:max_tokens]]
            if len(idx) > max_tokens:
                spans.append(TokenSpan(f" … {len(idx) - max_tokens} more tokens", 0, "not shown"))
            net = math.nan if tokens.influence is None else float(np.nansum(tokens.influence[idx]))
        facts = [f"reward {text.number(float(sequences['reward'][row]))}"]
        if "advantage" in sequences and sequences["advantage"][row] is not None:
            facts.append(f"advantage {text.number(float(sequences['advantage'][row]))}")
        facts.append(f"{sequences['num_tokens'][row]} tokens")
        if sequences["truncated"][row]:
            facts.append("truncated")
        if math.isfinite(net):
            facts.append(f"influence {text.number(net)} per unit lr")
        responses.append(
            Response(
                heading=f"Sequence {sequence}, {sequences['prompt_id'][row]}",
                facts=", ".join(facts),
                correct=bool(sequences["correct"][row]) if "correct" in sequences else None,
                prompt=str(sequences["prompt"][row]),
                text=str(sequences["response"][row]),
                tokens=spans,
            )
        )
    return responses


def _span(tokens: TokenTable, i: int, scale: float) -> TokenSpan:
    parts = [
        f"log-prob {text.number(float(tokens.logprob[i]))}",
        f"entropy {text.number(float(tokens.entropy[i]))}",
    ]
    level = 0
    if tokens.weight is not None:
        parts.append(f"token weight {text.number(float(tokens.weight[i]))}")
    if tokens.influence is not None:
        value = float(tokens.influence[i])
        if math.isfinite(value):
            level = int(np.sign(value)) * min(_LEVELS, round(_LEVELS * math.sqrt(abs(value) / scale)))
        parts.append(f"influence {text.number(value)}")
    parts += [f"{name} {text.number(float(score[i]))}" for name, score in tokens.scores.items()]
    return TokenSpan(tokens.token[i], level, f"{visible(tokens.token[i])}: " + ", ".join(parts))
