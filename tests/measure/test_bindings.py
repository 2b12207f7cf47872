"""Quantities of a probe batch are evaluated once, whoever asks, and are then what they would be anew."""

from __future__ import annotations

import numpy as np
import pytest

import cases
from stepscope.errors import MeasurementError
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.probe import Bindings, bind_quantity
from stepscope.policy.profiler import Profiler, profiled_stage, profiling
from stepscope.policy.vectors import shifted


def test_each_quantity_passes_once_whatever_its_version_and_is_the_same_as_alone() -> None:
    policy = cases.policy()
    step = cases.step(policy)
    probe = cases.batch(policy, seed=7)
    asked = [
        (make_quantity("entropy", probe, version=version), baseline)
        for baseline in ("best", "position")
        for version in ("on_policy", "fixed_prefix")
    ] + [("reward", "best")]
    bindings = Bindings(policy, probe, step.direction)
    profiler = Profiler()
    with profiling(profiler), profiled_stage("here"):
        for _ in range(2):
            found = [bindings.bind(quantity, baseline) for quantity, baseline in asked]
            with shifted(policy.parameters, step.direction, 1e-3):
                pass  # there and back
    passes = {row.work: row.passes for row in profiler.profile().rows if row.passes}
    assert passes == {"values._reader": 2, "values.derivatives": 2, "values.hidden_states": 2}
    for own, (quantity, baseline) in zip(found, asked, strict=True):
        alone = bind_quantity(policy, probe, quantity, direction=step.direction, baseline=baseline)
        np.testing.assert_array_equal(own.values.prefix, alone.values.prefix)
        np.testing.assert_array_equal(own.values.token, alone.values.token)
        np.testing.assert_array_equal(own.baseline.values, alone.baseline.values)
        assert own.baseline.kind == alone.baseline.kind


def test_bindings_of_another_batch_are_refused() -> None:
    policy = cases.policy()
    step = cases.step(policy)
    probe, other = (cases.batch(policy, seed=seed) for seed in (7, 8))
    bindings = Bindings(policy, other, step.direction)
    with pytest.raises(MeasurementError, match="another policy or probe batch"):
        influence(policy, step, step.update, probe, options=InfluenceOptions(bindings=bindings))
