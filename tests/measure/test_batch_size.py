"""Noise at other batch sizes: the 1/m law on independent groups, and groups and losses that break it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

import cases
from stepscope.measure.noise.batch_size import batch_sizes, loss_scale
from stepscope.measure.noise.scale import from_products, group_products, noise_scale
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.surrogate import token_weights
from stepscope.results import FloatArray
from stepscope.results.noise import BatchSizes

DIM = 200


def sizes_of(g: FloatArray, *, run_prompts: int = 16) -> BatchSizes:
    """Of groups with gradients ``g`` (prompt, dim), one sequence each."""
    count = len(g)
    K, index = g @ g.T / count**2, np.arange(count)
    found = from_products(K, index, unit="", method="")
    return batch_sizes(
        group_products(K, index),
        noise=found.noise,
        noise_scale=found.prompts,
        group_size=1,
        run_prompts=run_prompts,
    )


def independent(rng: np.random.Generator, count: int) -> FloatArray:
    """Gradients with |G|^2 = 1 and tr S = 8."""
    return np.ones(DIM) / np.sqrt(DIM) + np.sqrt(8 / DIM) * rng.standard_normal((count, DIM))


def test_noise_of_independent_groups_falls_like_one_over_the_batch() -> None:
    rng = np.random.default_rng(0)
    found = [sizes_of(independent(rng, 64)) for _ in range(24)]
    slopes = np.array([f.slope.value for f in found])
    assert slopes.mean() == pytest.approx(-1, abs=4 * slopes.std() / np.sqrt(24))
    assert 0.6 < np.sqrt(np.mean([f.slope.stderr**2 for f in found])) / slopes.std() < 1.7
    assert [row.prompts for row in found[0].rows] == [1, 2, 4, 8, 16, 32, 64, 128, 256]
    for i, m in enumerate((1, 2, 4, 8, 16)):
        over = [f.rows[i].over_law for f in found]
        values = np.array([o.value for o in over if o is not None])
        assert values.mean() == pytest.approx(1, abs=4 * values.std() / np.sqrt(24) + 1e-9), m
        ratio = [f.rows[i].noise_to_signal.value for f in found]
        assert np.mean(ratio) == pytest.approx(8 / m, rel=0.1)


def test_noise_of_groups_that_resemble_their_neighbours_does_not() -> None:
    """Eight groups in a row share an effect: the noise falls slower until a batch holds many such rows."""
    rng = np.random.default_rng(1)
    shared = np.repeat(np.sqrt(6 / DIM) * rng.standard_normal((16, DIM)), 8, axis=0)
    found = sizes_of(independent(rng, 128) + shared)
    assert found.slope.value > -1 + 3 * found.slope.stderr
    over = found.rows[3].over_law
    assert found.rows[3].prompts == 8
    assert over is not None
    assert over.value > 1 + 3 * over.stderr


def test_learning_rates_admitted() -> None:
    found = sizes_of(independent(np.random.default_rng(2), 64), run_prompts=16)
    rows = {row.prompts: row for row in found.rows}
    B = rows[1].noise_to_signal.value
    assert rows[16].lr_sgd.value == rows[16].lr_adam.value == 1
    assert rows[64].lr_sgd.value == pytest.approx((1 + B / 16) / (1 + B / 64))
    assert rows[64].lr_adam.value == pytest.approx(rows[64].lr_sgd.value ** 0.5)
    step = 1e-6
    higher = (1 + (B + step) / 16) / (1 + (B + step) / 64)
    slope = (higher - rows[64].lr_sgd.value) / step
    assert rows[64].lr_sgd.stderr == pytest.approx(slope * rows[1].noise_to_signal.stderr, rel=1e-3)


def test_small_batches_say_that_they_are() -> None:
    found = sizes_of(independent(np.random.default_rng(3), 8))
    assert not found.slope.reliable
    assert "expected at least 16" in found.slope.reason
    rows = {row.prompts: row for row in found.rows}
    assert rows[4].noise is not None
    assert "2 batches" in rows[4].noise.reason
    assert rows[8].noise is None


def test_normalisation_of_the_loss(tiny_policy) -> None:
    """A loss over the number of tokens weights part of a batch by its own; a mean over groups does not."""
    update = cases.step(tiny_policy, num_prompts=4, group_size=3).update
    groups = np.array([0, 2])
    members = np.flatnonzero(np.isin(update.prompt_index, groups))
    tokens = update.num_tokens
    for loss_type, expected in (
        ("dr_grpo", 1.0),
        ("grpo", 1.0),
        ("dapo", tokens.sum() / tokens[members].sum() * 2 / 4),
    ):
        settings = replace(tiny_policy.settings, loss_type=loss_type, scale_rewards="none")
        raw = advantages(update.rewards, update.prompt_index, "none")
        whole = token_weights(replace(update, advantages=raw), settings)
        assert loss_scale(update, settings, whole)(groups) == pytest.approx(expected), loss_type


def test_noise_scale_carries_the_batch_sizes(tiny_policy) -> None:
    step = cases.step(tiny_policy, num_prompts=4, group_size=3)
    found = noise_scale(tiny_policy, step.update, preconditioner=step.preconditioner)
    assert set(found.batch_sizes) == {"sgd", "preconditioned"}
    rows = found.batch_sizes["sgd"].rows
    assert [row.prompts for row in rows] == [1, 2, 4, 8, 16]
    assert rows[0].noise.value == pytest.approx(found.sgd.noise.value)
    assert rows[1].sequences == 6
