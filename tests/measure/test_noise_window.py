from __future__ import annotations

import numpy as np
import pytest

from stepscope.measure.noise.window import window_noise_scale
from stepscope.results import FloatArray

BETA = 0.9


def successive(*, steps: int, prompts: int, size: int, scatter: float, seed: int) -> FloatArray:
    """What a training of fixed true gradient (norm 1) gives, with Adam's first moment kept by hand."""
    random = np.random.default_rng(seed)
    truth = np.full(size, size**-0.5)
    moment = np.zeros(size)
    rows = []
    for t in range(steps):
        gradient = truth + scatter / np.sqrt(prompts * size) * random.normal(size=size)
        if t:
            rows.append((gradient @ moment / (1 - BETA**t), gradient @ gradient))
        moment = BETA * moment + (1 - BETA) * gradient
    return np.array(rows)


def test_it_finds_the_noise_scale_of_a_known_gradient() -> None:
    found = [
        window_noise_scale(
            successive(steps=200, prompts=16, size=400, scatter=8.0, seed=seed), prompts_per_step=16, block=10
        )
        for seed in range(40)
    ]
    assert all(f.reliable for f in found)
    values, errors = np.array([(f.value, f.stderr) for f in found]).T
    assert values.mean() == pytest.approx(64.0, rel=0.03)
    assert values.std() == pytest.approx(errors.mean(), rel=0.35)


def test_a_gradient_lost_in_noise_is_flagged() -> None:
    found = [
        window_noise_scale(
            successive(steps=60, prompts=4, size=400, scatter=400.0, seed=seed), prompts_per_step=4, block=10
        )
        for seed in range(40)
    ]
    lost = [f for f in found if not f.reliable]
    assert len(lost) >= 34
    assert all("a longer window is needed" in f.reason for f in lost)


def test_too_few_steps_give_a_value_without_an_error() -> None:
    products = successive(steps=20, prompts=16, size=400, scatter=1.0, seed=0)
    found = window_noise_scale(products, prompts_per_step=16, block=10)
    assert np.isfinite(found.value)
    assert np.isnan(found.stderr)
    assert "wait for more" in found.reason
    assert np.isnan(window_noise_scale(np.empty((0, 2)), prompts_per_step=16, block=10).value)
