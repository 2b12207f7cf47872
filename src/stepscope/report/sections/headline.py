# ruff: noqa: RUF001 (typographic signs are meant)
"""The headline figures: of one measurement, of all checkpoints of a run, of two measurements side by side."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import (
    Cell,
    Table,
    Value,
    difference_of,
    interval_cell,
    linked,
    table,
    trust_cell,
)
from stepscope.results.kinship import KINS
from stepscope.stats import Estimate


class Label(NamedTuple):
    """What a figure is called on the page, and the glossary's entry for it."""

    name: str
    anchor: str


HEADLINES: Mapping[str, Label] = {
    "entropy_per_token": Label("Entropy of the policy, per token", "def-entropy"),
    "entropy_per_seq": Label("Entropy of the policy, per response", "def-entropy"),
    "mean_reward": Label("Mean reward", "def-reward"),
    "mean_reward_update": Label("Mean reward of the update batch", "def-reward"),
    "mean_length": Label("Mean length of a response", "def-batches"),
    "truncated_rate": Label("Truncated responses", "def-batches"),
    "update_logprob_difference": Label("Logged log-probs against this policy's", "def-update-file"),
    "update_logprob_far": Label("Tokens whose logged log-prob is another one", "def-update-file"),
    "update_old_logprob_difference": Label("Log-probs before the batch against now", "def-update-file"),
    "update_old_logprob_far": Label("Tokens whose log-prob has moved since", "def-update-file"),
    "update_advantage_difference": Label("Logged advantages against those of the rewards", "def-update-file"),
    "update_length_difference": Label(
        "Length of the texts' tokens against the logged one", "def-update-file"
    ),
    **{
        f"{prefix}sampler_{key}": Label(f"{name}{of}", "def-sampler")
        for prefix, of in (("", ""), ("update_", ", update batch"))
        for key, name in {
            "difference": "Sampler’s log-probs against the policy’s",
            "difference_q99": "99 % quantile of that distance",
            "kl_per_token": "KL of sampler to policy per token (k1)",
            "kl_k3_per_token": "The same by k3",
            "kl_per_seq": "KL of sampler to policy per response (k1)",
            "effective_share": "Effective sample size of the sampler’s responses",
            "mass_lost": "−log of the probability that truncation keeps",
            "positions_cut": "Positions where truncation cuts over 1 %",
            "bias_entropy_per_token": "What the sampler does to the mean entropy",
            "bias_reward": "What the sampler does to the mean reward",
        }.items()
    },
    "linearity_slope": Label("Slope of |true change| against learning rate, log-log", "def-linearity"),
    "linearity_r2": Label("R² of that fit", "def-linearity"),
    "share_momentum": Label("Share of the step from momentum", "def-share"),
    "share_decay": Label("Share of the step from weight decay", "def-share"),
    "share_bonus": Label("Share of the step from the entropy bonus", "def-share"),
    "share_divergence": Label("Share of the step from the KL divergence at given prefixes", "def-share"),
    "share_router": Label("Share of the step from the router loss", "def-share"),
    "share_sequences": Label("Share of the step from this batch", "def-share"),
    "rank_reliability_tokens": Label("Reliability of the order of tokens", "def-reliability"),
    "rank_reliability_sequences": Label("Reliability of the order of sequences", "def-reliability"),
    "probe_needed_tokens": Label("Probe prompts for a sure order of tokens", "def-reliability"),
    "probe_needed_sequences": Label("Probe prompts for a sure order of sequences", "def-reliability"),
    "shrinkage_gain": Label("Probe prompts that shrinkage saves", "def-shrunk"),
    "rounding_share_moved": Label("Share of the weights that move at all", "def-rounding"),
    "rounding_cosine": Label("Cosine of the rounded step and the step before rounding", "def-rounding"),
    "rounding_norm_ratio": Label("Length of the rounded step over that before rounding", "def-rounding"),
    "storage_error": Label("What 8 bits made of the step, of its norm", "def-storage"),
    "storage_error_worst": Label("The most that 8 bits can have made of it", "def-storage"),
    "routing_share_choices": Label("Choices of experts that the step flips", "def-routing"),
    "routing_share_tokens": Label("Tokens that go to other experts after it", "def-routing"),
    "gradient_share_largest": Label("Largest share of one sequence in the gradient", "def-gradient-share"),
    "gradient_sequences_effective": Label("Sequences that make the gradient", "def-gradient-share"),
    "influence_sequences_own_prompts": Label(
        "Influence of this batch on its own prompts, answered afresh", "def-influence"
    ),
    "share_sequences_relative": Label("That share, in units of white noise's", "def-lifetime"),
    "effect_after_10_steps": Label("Effect of this batch after 10 steps, in its own step's", "def-lifetime"),
    "effect_after_40_steps": Label("Effect of this batch after 40 steps, in its own step's", "def-lifetime"),
    "noise_scale": Label("Gradient noise scale", "def-noise-scale"),
    "effective_rank": Label("Effective rank of the kernel", "def-effective-rank"),
    "second_order_batch": Label("Second-order change by pairs of this batch", "def-second-kernel"),
    "second_order_diagonal": Label("Of that by each sequence alone", "def-second-kernel"),
    "second_order_noise": Label(
        "Noise of the probe in the second-order kernel's squares", "def-second-kernel"
    ),
    **{
        f"kinship_{kin}": Label(f"Share of what the tokens do that is at {words}", "def-kinship")
        for kin, words in KINS.items()
    },
    "wall_seconds": Label("Wall time of the measurement", "def-wall-time"),
}

_VALIDATION_KEY = re.compile(r"(lds|leave_one_out)(_across)?_(zeroed|recomputed)(_optimizer)?")
_TOP_KEY = re.compile(r"influence_top_(0\.\d+)")
_CHANGE_KEY = re.compile(r"change_(true|linear|unrounded|rounding|kept)_(?:(\w+)_)?(per_token|per_seq)")

_ORDERS: Mapping[str, tuple[str, str]] = {
    "true": ("True change", "def-true-change"),
    "linear": ("First-order change", "def-linear-change"),
    "unrounded": ("True change without rounding", "def-rounding"),
    "rounding": ("What rounding takes off the change", "def-rounding"),
    "kept": ("Share of the change that rounding leaves", "def-rounding"),
}


def headline_label(key: str) -> Label:
    """The label of a summary figure; an unknown key names itself."""
    if key in HEADLINES:
        return HEADLINES[key]
    if match := _VALIDATION_KEY.fullmatch(key):
        score = "Linear datamodelling score" if match[1] == "lds" else "Leave-one-out correlation"
        across = " across probes" if match[2] else ""
        through = ", through the optimizer" if match[4] else ""
        return Label(f"{score}{across}, {match[3]}{through}", "def-lds")
    if match := _TOP_KEY.fullmatch(key):
        share = text.percent(float(match[1]))
        return Label(f"Absolute influence on the top {share} of tokens", "def-influence")
    match = _CHANGE_KEY.fullmatch(key)
    if match is None:
        return Label(key.replace("_", " ").capitalize(), "def-estimate")
    order, quantity, normalisation = match.groups()
    name = text.quantity_name(quantity) if quantity else "entropy"
    start, anchor = _ORDERS[order]
    return Label(f"{start} of {name}, {text.NORMALISATIONS[normalisation]}", anchor)


def section(measurement: Measurement, room: Room) -> Section:
    """Every figure of ``summary.json`` with error, unit, n, trust and method."""
    found = table(
        "headline",
        "",
        "Value ± one standard error, clustered by prompt; n: independent units behind it; trust: whether "
        "its diagnostics passed. Changes are those at the step's own learning rate. Each name links to its "
        "definition.",
        [
            {
                "Figure": _name_cell(name),
                "Value ± standard error": value,
                "95 % interval": interval_cell(value),
                "Unit": _unit(value),
                "n": value.n,
                "Diagnostics": trust_cell(value),
                "Method": value.method,
            }
            for name, value in measurement.summary.items()
        ],
    )
    return Section("headline", "Headline figures", tables=[found])


def title(measurement: Measurement) -> str:
    """What to call a measurement on the page."""
    step = measurement.checkpoint_step
    return measurement.path.name if step is None else f"Step {step}"


def _name_cell(key: str) -> Cell:
    return linked(*headline_label(key))


def _unit(value: Estimate) -> str:
    return "–" if value.unit == "1" else value.unit


def comparison(names: tuple[str, str], pair: tuple[Measurement, Measurement]) -> Table | None:
    """Every headline figure that two measurements share, with difference and combined error; None if none."""
    first, second = (m.summary for m in pair)
    rows: list[Mapping[str, Value]] = []
    for key in (key for key in first if key in second):
        difference = difference_of(first[key], second[key])
        rows.append(
            {
                "Figure": _name_cell(key),
                f"A: {names[0]}": first[key],
                f"B: {names[1]}": second[key],
                "B − A": difference,
                "Unit": _unit(first[key]),
                "95 % of B − A": interval_cell(difference),
                "Diagnostics": trust_cell(difference),
            }
        )
    caption = (
        "Headline figures of both measurements, ± one standard error. The error of the difference treats "
        "the two measurements as independent; where they share prompts it is overstated."
    )
    return table("comparison", "Headline figures side by side", caption, rows) if rows else None


_OVER_CHECKPOINTS: Mapping[str, str] = {
    "entropy_per_token": "Entropy, nats/token",
    "mean_reward": "Mean reward",
    "change_true_per_token": "True change of entropy, nats/token",
    "change_linear_per_token": "First order, nats/token",
    "linearity_slope": "Slope, log-log",
    "share_sequences": "This batch's share of the step",
    "effective_rank": "Effective rank of the kernel",
    "noise_scale": "Noise scale, prompts",
}


def checkpoints(measurements: Sequence[Measurement]) -> Table | None:
    """The headline figures of several measurements, one row per checkpoint."""
    keys = [key for key in _OVER_CHECKPOINTS if all(key in m.summary for m in measurements)]
    if len(measurements) < 2 or not keys:
        return None
    return table(
        "checkpoints",
        "",
        "Headline figures of every measured checkpoint, ± one standard error; changes at the step's own "
        "learning rate; ⚠ marks unreliable ones.",
        [
            {"Checkpoint": title(m), **{_OVER_CHECKPOINTS[key]: m.summary[key] for key in keys}}
            for m in measurements
        ],
    )
