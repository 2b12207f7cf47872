# ruff: noqa: RUF001 (typographic signs are meant)
"""Sampler against policy: how far what drew the batches is from what is measured."""

from __future__ import annotations

from collections.abc import Mapping

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, number_cell, table
from stepscope.results import RolloutTokens
from stepscope.results.mismatch import SamplerMismatch, SamplerReport

_FIGURES: Mapping[str, str] = {
    "difference": "Mean distance of log-probs, |log q − log π|",
    "difference_q50": "its median",
    "difference_q90": "its 90 % quantile",
    "difference_q99": "its 99 % quantile",
    "difference_q999": "its 99.9 % quantile",
    "difference_largest": "the largest",
    "k1_per_token": "KL(q | π) per token, k1",
    "k3_per_token": "KL(q | π) per token, k3",
    "k1_per_seq": "KL(q | π) per response, k1",
    "k3_per_seq": "KL(q | π) per response, k3",
    "ratio": "Mean ratio π/q of tokens",
    "effective_per_token": "Effective sample size of the ratios of tokens",
    "effective_per_seq": "Effective sample size of the ratios of responses",
    "engine_difference": "Part of the engine: distance from what its settings make of the policy",
    "engine_k1_per_token": "Part of the engine: KL per token, k1",
    "settings_k1_per_token": "Part of temperature and truncation: KL per token, k1",
    "mass": "S: probability that truncation keeps",
    "mass_lost": "−log S per token",
    "positions_cut": "Positions at which more than 1 % is cut",
    "bias_entropy_per_token": "What it does to the mean entropy per token",
    "bias_reward": "What it does to the mean reward",
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Divergence, weights and lost mass of the batches that the policy itself did not draw."""
    report = measurement.sampler
    if report is None or not report.batches:
        return None
    tokens = {"update": measurement.update_tokens, "probe": measurement.probe_tokens}
    return Section(
        "sampler",
        "Sampler against policy",
        sentences=[_sentence(name, found) for name, found in report.batches.items() if found.doubt],
        intro=f"Drawn by {_who(report)}. Log-probs and entropies on this page are the policy’s.",
        tables=[_figures(report)],
        more_title="Tokens whose two log-probs are farthest apart",
        more_tables=[_worst(name, found, tokens[name]) for name, found in report.batches.items()],
    )


def _who(report: SamplerReport) -> str:
    settings = {k: v for k, v in report.settings.items() if (k, v) not in _NEUTRAL}
    engine = settings.pop("engine", "")
    others = ", ".join(f"{name} {value}" for name, value in settings.items())
    return f"{engine} ({others})" if others else engine or "what stands in the file"


_NEUTRAL = {("top_p", "1.0"), ("top_k", "0"), ("min_p", "0.0")}


def _sentence(name: str, found: SamplerMismatch) -> str:
    rest = "what is measured on it is of the sampler’s responses" if name == "probe" else "the step is theirs"
    return f"The {name} batch is not one of the policy’s own: {found.doubt}; {rest}."


def _figures(report: SamplerReport) -> Table:
    return table(
        "sampler",
        "",
        "q is what drew the responses, π the policy that is measured, both at the tokens that were drawn. "
        "k1 = log q − log π and k3 = π/q − 1 − log(π/q) estimate the same divergence; where truncation cuts, "
        "k3 is smaller by 1 − S. ± one standard error, clustered by prompt.",
        [
            {"Figure": label}
            | {
                f"{name} batch": found.figures.get(key, text.NOT_AVAILABLE)
                for name, found in report.batches.items()
            }
            for key, label in _FIGURES.items()
            if any(key in found.figures for found in report.batches.values())
        ],
    )


def _worst(name: str, found: SamplerMismatch, tokens: RolloutTokens | None) -> Table:
    shown = {}
    if tokens is not None:
        places = zip(tokens.sequence_id.tolist(), tokens.position.tolist(), tokens.token, strict=True)
        shown = {(i, k): str(token) for i, k, token in places}
    return table(
        f"sampler-worst-{name}",
        f"{name} batch",
        "Log-probs of the sampled token by sampler and policy, in nats.",
        [
            {
                "Sequence": row.sequence_id,
                "Position": row.position,
                "Token": repr(shown.get((row.sequence_id, row.position), f"id {row.token_id}")),
                "log q": number_cell(row.sampler_logprob),
                "log π": number_cell(row.logprob),
            }
            for row in found.worst
        ],
    )
