# ruff: noqa: RUF001
from __future__ import annotations

import math

import pytest

from stepscope.report import text
from stepscope.report.sections.change import change_sentence
from stepscope.report.sections.headline import headline_label
from stepscope.stats import Estimate


@pytest.mark.parametrize(
    ("value", "stderr", "shown"),
    [
        (-0.0031, 0.0004, "−0.00310 ± 0.00040"),
        (-3.1e-5, 2e-6, "(−3.10 ± 0.20) × 10⁻⁵"),
        (48213.2, 1234.0, "48200 ± 1200"),
        (1e8, 2e6, "(1.000 ± 0.020) × 10⁸"),
        (9.99, 0.0996, "9.99 ± 0.10"),
        (-1e-9, 3e-8, "(−0.1 ± 3.0) × 10⁻⁸"),
        (0.0, 0.1, "0.00 ± 0.10"),
        (0.703, math.nan, "0.7030"),
        (math.nan, 0.1, "–"),
    ],
)
def test_value_and_error_share_digits_and_power(value: float, stderr: float, shown: str) -> None:
    assert text.plus_minus(value, stderr) == shown


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.623, "62 %"), (0.00124, "0.12 %"), (-0.05, "−5.0 %"), (12.34, "1234 %"), (0.0, "0 %")],
)
def test_percent(share: float, shown: str) -> None:
    assert text.percent(share) == shown


def test_lr_text_keeps_the_mantissa() -> None:
    assert [text.lr_text(lr) for lr in (1e-4, 2.5e-6, 1.0)] == ["1e-4", "2.5e-6", "1e0"]


def _estimate(value: float, stderr: float, reason: str = "") -> Estimate:
    return Estimate(value, stderr, 64, "nats/token", "m", reliable=not reason, reason=reason)


def test_headline_says_direction_size_and_both_errors() -> None:
    sentence = change_sentence("entropy", 1e-4, _estimate(-0.0031, 4e-4), _estimate(-0.0030, 3e-4))
    assert sentence == (
        "At its own learning rate 1e-4 this step lowers the policy's entropy by 0.00310 ± 0.00040 nats/token "
        "(first order: −0.00300 ± 0.00030 nats/token)."
    )


def test_headline_does_not_claim_a_direction_within_the_noise() -> None:
    sentence = change_sentence("reward", 1e-6, _estimate(1e-4, 4e-4), _estimate(1e-4, 3e-4))
    assert "not resolved from zero" in sentence
    assert "raises" not in sentence
    assert "expected reward" in sentence


def test_headline_repeats_the_reason_of_an_unreliable_number() -> None:
    sentence = change_sentence("entropy", 1e-4, _estimate(-1.0, 0.1, "heavy tail"), _estimate(-1.0, 0.1))
    assert sentence.endswith("The true change failed its diagnostics: heavy tail.")


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("change_true_per_token", "True change of entropy, per token"),
        ("change_linear_reward_per_seq", "First-order change of expected reward, per response"),
        ("change_unrounded_per_seq", "True change without rounding of entropy, per response"),
        (
            "change_kept_length_per_seq",
            "Share of the change that rounding leaves of response length, per response",
        ),
        ("some_new_figure", "Some new figure"),
    ],
)
def test_labels_of_summary_keys(key: str, name: str) -> None:
    assert headline_label(key).name == name
