"""The Python interface of DESIGN 5.4, on the checkpoint of a small training."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

import stepscope as ss

TASK = "arithmetic:terms=2,digits=2,ops=+"


def test_every_public_name_exists_and_is_listed():
    for name in ss.__all__:
        assert getattr(ss, name) is not None
    assert dir(ss) == sorted(ss.__all__)
    assert {"load_checkpoint", "measure_change", "load_measurement", "FisherKernel"} <= set(ss.__all__)
    assert ss.__version__
    with pytest.raises(AttributeError, match="measure_chnage"):
        _ = ss.measure_chnage  # type: ignore[attr-defined]


def test_a_measurement_in_python(checkpoint):
    policy = ss.load_checkpoint(checkpoint, precision="float64")
    task = ss.load_task(TASK, format_weight=0.1)
    update = ss.sample_rollouts(policy, task, num_prompts=6, group_size=4, seed=0)
    probe = ss.sample_rollouts(policy, task, num_prompts=24, group_size=1, seed=1, split="test")
    step = ss.reconstruct_step(policy, update)
    change = ss.measure_change(policy, step, probe, quantity="entropy", lrs=[1e-6, 1e-5])
    shares = ss.influence(policy, step, update, probe, quantity="entropy")
    kernel = ss.fisher_kernel(policy, update, probe, preconditioner=step.preconditioner)
    noise = ss.noise_scale(policy, update)

    assert [p.lr for p in change.points] == [1e-6, 1e-5, 1e-3], "the step's own rate is among them"
    first = change.points[0]
    assert first.true.value == pytest.approx(first.linear.value, rel=1e-2)
    assert shares.total.value * first.lr == pytest.approx(first.linear.value, rel=1e-8)
    np.testing.assert_allclose([t.sum() for t in shares.tokens], shares.sequences, rtol=1e-10)
    assert kernel.update["preconditioned"].shape == (24, 24)
    assert kernel.probe["preconditioned"].shape == (24, 24)
    assert noise.noise_scale.unit == "prompts"
    for record in (policy, policy.optimizer, update, step, change, shares, kernel, noise):
        assert type(record).__name__ in repr(record)
        assert len(repr(record)) < 2500
    assert "sequences=<24>" in repr(shares)


def test_the_example_of_the_readme_runs(checkpoint, capsys):
    """As printed, on a smaller policy and fewer prompts."""
    text = (Path(__file__).parents[1] / "README.md").read_text()
    example = re.search(r"```python\n(import stepscope as ss.*?)```", text, re.DOTALL)
    assert example is not None
    code = example[1]
    for old, new in (
        ('"runs/demo/checkpoints/step-40"', repr(str(checkpoint))),
        ('load_task("arithmetic")', f"load_task({TASK!r}, format_weight=0.1)"),
        ("num_prompts=256", "num_prompts=24"),
    ):
        assert old in code, f"the example no longer says {old}"
        code = code.replace(old, new)
    names: dict[str, object] = {}
    exec(compile(code, "README.md", "exec"), names)
    assert capsys.readouterr().out.count("nats/token") == 3
    assert {"update", "probe", "step", "change", "shares", "kernel", "noise"} <= set(names)
