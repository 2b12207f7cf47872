# ruff: noqa: RUF001 (typographic signs are meant)
"""Numbers and sentences as a reader of the page sees them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stepscope.stats import Estimate

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NOT_AVAILABLE = "–"


@dataclass(frozen=True)
class Label:
    """How a figure is called on the page.

    Attributes:
        name: a few words.
        anchor: id of its entry in the glossary.
    """

    name: str
    anchor: str


HEADLINES: Mapping[str, Label] = {
    "entropy_per_token": Label("Entropy of the policy, per token", "def-entropy"),
    "entropy_per_seq": Label("Entropy of the policy, per response", "def-entropy"),
    "mean_reward": Label("Mean reward", "def-reward"),
    "mean_reward_update": Label("Mean reward of the update batch", "def-reward"),
    "mean_length": Label("Mean length of a response", "def-batches"),
    "truncated_rate": Label("Truncated responses", "def-batches"),
    "linearity_slope": Label("Slope of |true change| against learning rate, log-log", "def-linearity"),
    "linearity_r2": Label("R² of that fit", "def-linearity"),
    "share_momentum": Label("Share of the step from momentum", "def-share"),
    "share_decay": Label("Share of the step from weight decay", "def-share"),
    "share_bonus": Label("Share of the step from the entropy bonus", "def-share"),
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
    "influence_sequences_own_prompts": Label(
        "Influence of this batch on its own prompts, answered afresh", "def-influence"
    ),
    "share_sequences_relative": Label("That share, in units of white noise's", "def-lifetime"),
    "effect_after_10_steps": Label("Effect of this batch after 10 steps, in its own step's", "def-lifetime"),
    "effect_after_40_steps": Label("Effect of this batch after 40 steps, in its own step's", "def-lifetime"),
    "noise_scale": Label("Gradient noise scale", "def-noise-scale"),
    "effective_rank": Label("Effective rank of the kernel", "def-effective-rank"),
    "wall_seconds": Label("Wall time of the measurement", "def-wall-time"),
}

QUANTITIES: Mapping[str, str] = {
    "reward": "expected reward",
    "kl": "KL divergence",
    "length": "response length",
}
NORMALISATIONS: Mapping[str, str] = {"per_token": "per token", "per_seq": "per response"}
VERSIONS: Mapping[str, str] = {"on_policy": "on-policy", "fixed_prefix": "fixed-prefix"}


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
        return Label(f"Absolute influence on the top {percent(float(match[1]))} of tokens", "def-influence")
    match = _CHANGE_KEY.fullmatch(key)
    if match is None:
        return Label(key.replace("_", " ").capitalize(), "def-estimate")
    order, quantity, normalisation = match.groups()
    name = QUANTITIES.get(quantity, quantity) if quantity else "entropy"
    start, anchor = _ORDERS[order]
    return Label(f"{start} of {name}, {NORMALISATIONS[normalisation]}", anchor)


def series_label(series: Mapping[str, Any]) -> str:
    """A change series in words, for example ``entropy per token, on-policy``."""
    quantity = QUANTITIES.get(series["quantity"], str(series["quantity"]))
    normalisation = NORMALISATIONS.get(series["normalisation"], str(series["normalisation"]))
    return f"{quantity} {normalisation}, {VERSIONS.get(series['version'], str(series['version']))}"


def number(value: float, digits: int = 3) -> str:
    """A number with ``digits`` significant digits, minus sign and power of ten typeset."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    if value == 0:
        return "0"
    exponent = math.floor(math.log10(abs(value)))
    if -4 <= exponent < 6:
        return _minus(f"{value:.{max(0, digits - 1 - exponent)}f}")
    return f"{_minus(f'{value / 10**exponent:.{digits - 1}f}')} × 10{_power(exponent)}"


def plus_minus(value: float, stderr: float) -> str:
    """``value ± stderr`` with two significant digits of the error and one power of ten for both."""
    if not math.isfinite(value):
        return NOT_AVAILABLE
    if not math.isfinite(stderr) or stderr <= 1e-9 * abs(value):
        return number(value, 4)
    exponent = math.floor(math.log10(max(abs(value), stderr)))
    scale = exponent if not -4 <= exponent < 6 else 0
    decimals = 1 - math.floor(math.log10(float(f"{stderr / 10.0**scale:.1e}")))
    body = " ± ".join(f"{round(x / 10.0**scale, decimals):.{max(0, decimals)}f}" for x in (value, stderr))
    return _minus(body) if scale == 0 else f"({_minus(body)}) × 10{_power(scale)}"


def estimate(value: Estimate, *, unit: bool = True) -> str:
    """An estimate with its error and, if wanted, unit."""
    words = f" {value.unit}" if unit and value.unit not in ("", "1") else ""
    return plus_minus(value.value, value.stderr) + words


def interval(value: Estimate) -> str:
    """``low to high`` of the 95 % interval; one end alone where the other is open, nothing where both are."""
    low, high = math.isfinite(value.low), math.isfinite(value.high)
    if low and high:
        return f"{number(value.low)} to {number(value.high)}"
    return (
        f"at least {number(value.low)}" if low else f"at most {number(value.high)}" if high else NOT_AVAILABLE
    )


def percent(share: float, digits: int = 2) -> str:
    """A share as a percentage with ``digits`` significant digits, at most whole percents above 100."""
    if not math.isfinite(share):
        return NOT_AVAILABLE
    value = 100 * share
    if value == 0:
        return "0 %"
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return _minus(f"{value:.{decimals}f}") + " %"


def plotly_text(value: str) -> str:
    """Text of a run made safe for Plotly's hover labels, which read a few HTML tags."""
    return html.escape(value, quote=False)


def lr_text(lr: float) -> str:
    """A learning rate, for example ``1 × 10⁻⁴`` written as ``1e-4``."""
    mantissa, exponent = f"{lr:.3e}".split("e")
    return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"


def change_sentence(quantity: str, lr: float, true: Estimate, linear: Estimate) -> str:
    """The headline: what the step does at its own learning rate, truly and to first order, with errors."""
    verb = "lowers" if true.value < 0 else "raises"
    name = QUANTITIES.get(quantity, quantity)
    size = plus_minus(abs(true.value), true.stderr)
    if true.resolved:
        start = (
            f"At its own learning rate {lr_text(lr)} this step {verb} the policy's {name} by {size} "
            f"{true.unit}"
        )
    else:
        start = (
            f"At its own learning rate {lr_text(lr)} this step changes the policy's {name} by "
            f"{estimate(true)}, not resolved from zero"
        )
    end = f" (first order: {estimate(linear)})."
    doubts = [
        f" The {word} change failed its diagnostics: {value.reason}."
        for word, value in (("true", true), ("first-order", linear))
        if not value.reliable
    ]
    return start + end + "".join(doubts)


def rounding_sentence(rounding: Mapping[str, Any]) -> str:
    """What rounding does to the step of a training in a half type, from ``step.json``."""
    cosine = rounding["cosine"]
    shape = (
        f"the rounded step has cosine {number(cosine)} to the step before rounding and "
        f"{number(rounding['norm_ratio'])} times its length"
        if cosine is not None
        else "so that the step changes nothing"
    )
    return (
        f"The training keeps its weights in {rounding['kept_in']}, and AdamW's result is rounded to that: at "
        f"learning rate {lr_text(rounding['lr'])}, {percent(rounding['share_moved'])} of the weights move at "
        f"all; {shape}."
    )


def rounded_change_sentence(quantity: str, taken: Mapping[str, Any]) -> str:
    """The change by the rounded step beside that by the step before rounding, from ``change.json``."""
    name = QUANTITIES.get(quantity, quantity)
    ratio = taken["ratio"]
    share = f"; {plus_minus(ratio.value, ratio.stderr)} of it is left" if ratio and ratio.reliable else ""
    return (
        f"It changes the policy's {name} by {estimate(taken['true'])}; without rounding it would be "
        f"{estimate(taken['unrounded'])}{share}."
    )


def lifetime_sentence(found: Mapping[str, Any]) -> str:
    """In words: what momentum's share says, and what a batch does after its own step.

    Args:
        found: ``lifetime`` of ``step.json``.
    """
    shares = (found["share"], found["white_noise_share"], found["constant_share"])
    share, white, constant = (percent(float(value)) for value in shares)
    effects = " and ".join(
        f"{number(float(value), 2)} times after {n} steps" for n, value in found["effect"].items() if n != "1"
    )
    return (
        f"This batch is {share} of its step. At step {found['step']} beta1 alone would make it {white} were "
        f"gradients white noise and {constant} were they all the same, so that most of a step is momentum is "
        f"arithmetic; this batch's share is {number(float(found['relative_share']), 2)} times white noise's. "
        "What it does not do in this step it does later, through the first moment: with later gradients, "
        f"preconditioner and learning rate held, its effect grows to {effects}, its own the first."
    )


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _power(exponent: int) -> str:
    return str(exponent).translate(_SUPERSCRIPTS)
