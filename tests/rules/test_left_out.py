"""Rules about classes of tokens: what they say, and that a training and a table mean the same tokens."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd
import pytest

import cases
from stepscope.config import RlConfig, build_config
from stepscope.errors import ConfigError, MeasurementError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy.state import Policy
from stepscope.rules import TokenRule, Tokens, Without, intervention_from_record, token_advantages
from stepscope.rules.token_classes import IN_TRAINING, LABELS, WAYS


def table(**changes: Any) -> Tokens:
    made = Tokens(
        sequence=np.array([0, 0, 0, 1, 1]),
        position=np.array([0, 1, 2, 0, 1]),
        logprob=np.array([-1.0, -2, -3, -1, -3]),
        old_logprob=np.array([-1.0, -2, -3, -1, -3]),
        entropy=np.array([1.5, 1, 2, 0.1, 3.5]),
        advantages=np.array([1.0, -1]),
        token=np.array(["1", "+", "⟨end⟩", "a|b", "⟨end⟩"], dtype=object),
        kind=np.array(["digits", "operators", "end of sequence", "words", "end of sequence"], dtype=object),
    )
    return replace(made, **changes)


def shaped(rule: str, dose: float = 1.0) -> list[float]:
    made: list[float] = token_advantages(Without(rule=rule, dose=dose), table(), seed=0, step=0).tolist()
    return made


def test_tokens_of_a_rule_lose_their_dose() -> None:
    """log p + H = 0.5, -1, -1 | -0.9, 0.5."""
    assert shaped("quadrant=right, rare") == [1, 0, 0, -1, -1]
    assert shaped("quadrant=right, rare|wrong, likely", 0.25) == [1, 0.75, 0.75, -1, -0.75]
    assert shaped("position=0") == [0, 1, 1, 0, -1]
    assert shaped("kind=digits|operators") == [0, 0, 1, -1, -1]
    assert shaped("token=+") == [1, 0, 1, -1, -1]
    assert shaped("token=⟨end⟩", 0.5) == [1, 1, 0.5, -1, -0.5]
    assert shaped("rarity=0.1 to 0.5") == [0, 0, 1, 0, -1]
    assert shaped("kind=words", 0.0) == table().advantage.tolist()


def test_a_table_of_a_ledger_and_one_of_a_training_mean_the_same_tokens() -> None:
    """Every way that a training knows, on the same columns."""
    rng = np.random.default_rng(0)
    names = ("logprob", "entropy", "position", "token", "kind")
    made = table(logprob=-rng.exponential(1, 5), entropy=rng.exponential(1, 5))
    frame = pd.DataFrame({n: getattr(made, n) for n in names} | {"advantage": made.advantage})
    for way in IN_TRAINING:
        labels = dict.fromkeys(str(label) for label in WAYS[way](frame))
        for label in labels:
            rule = TokenRule(way, (label,))
            np.testing.assert_array_equal(rule.inside(made), rule.inside(frame))
            assert rule.inside(made).any()
            if "|" not in label:
                assert TokenRule.parse(str(rule)) == rule


@pytest.mark.parametrize("way", sorted(LABELS))
def test_every_fixed_class_can_be_named(way: str) -> None:
    for label in LABELS[way]:
        assert TokenRule.parse(f"{way}={label}").labels == (label,)


def test_rules_that_say_nothing_are_refused() -> None:
    for wrong, message in (
        ("digits", "expected WAY=CLASS, with a way among quadrant, kind"),
        ("colour=red", "expected WAY=CLASS"),
        ("kind=digit", "no class 'digit' of kind; expected one of digits; operators"),
        ("quadrant=wrong, rare|", "no class '' of quadrant"),
        ("token=", "no class '' of token; name a class after ="),
        ("kind=digits|digits", "named twice"),
        ("rarity=0.2 to 0.5", "no class '0.2 to 0.5' of rarity"),
    ):
        with pytest.raises(ConfigError, match=message.replace("|", r"\|")):
            TokenRule.parse(wrong)
    with pytest.raises(MeasurementError, match="no token of the training is of class '7'; there are ⟨end⟩"):
        TokenRule.parse("token=7").present(table())
    np.testing.assert_array_equal(
        TokenRule.parse("kind=digits").present(table()), [True, False, False, False, False]
    )
    assert TokenRule.parse("token=|").labels == ("|",)
    assert TokenRule.parse("token== | ").labels == ("= ", " ")
    with pytest.raises(MeasurementError, match="needs the kind of every token"):
        token_advantages(Without(rule="kind=digits"), table(kind=None), seed=0, step=0)


def test_a_configuration_refuses_what_a_training_cannot_do() -> None:
    def rl(**settings: Any) -> RlConfig:
        return build_config(RlConfig, settings)

    chosen = rl(objective={"name": "without", "rule": "kind=digits", "dose": 0.5}).objective
    assert chosen == Without(rule="kind=digits", dose=0.5)
    assert isinstance(chosen, Without)
    assert intervention_from_record(chosen.to_record()) == chosen
    for objective, message in (
        ({"rule": "pass_rate=0"}, "does not know the pass_rate of a token before the step"),
        ({"rule": "kind=digit"}, "no class 'digit' of kind"),
        ({"rule": "kind=digits", "dose": 1.5}, "less than or equal to 1"),
    ):
        with pytest.raises(ConfigError, match=message):
            rl(objective={"name": "without"} | objective)
    with pytest.raises(ConfigError, match="beta would leave them in the KL"):
        rl(objective={"name": "without", "rule": "kind=digits"}, beta=0.1)


def test_a_measured_step_leaves_the_same_tokens_out(tiny_policy: Policy) -> None:
    """Token weights of the step times (1 - dose), on the tokens that the texts say."""
    tokenizer = cases.tokenizer()
    plain = replace(tiny_policy, tokenizer=tokenizer)
    update = cases.scored(
        plain,
        cases.rollouts(
            [[2, 3], [4, 5]],
            [[6, 1], [3, 7, 1]],
            advantages=np.array([0.5, -0.5]),
        ),
    )
    whole = reconstruct_step(plain, update)
    rule = Without(rule="token=4", dose=0.75)
    policy = replace(plain, settings=replace(plain.settings, objective=rule))
    less = reconstruct_step(policy, update)
    assert tokenizer.convert_ids_to_tokens(6) == "4"
    np.testing.assert_allclose(less.token_weights[0], whole.token_weights[0] * [0.25, 1], rtol=1e-12)
    np.testing.assert_allclose(less.token_weights[1], whole.token_weights[1], rtol=1e-12)
