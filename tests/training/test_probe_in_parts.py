"""A probe in a training under FSDP2: the figures of one process, and an undisturbed training."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from fsdp_training import (
    KINDS,
    SETTINGS,
    batches_kept,
    own_probe,
    run,
    save_model,
    seen,
    third_step,
    trainer,
    two_steps,
)
from torch import multiprocessing

import cases
from policy.test_group import free_port
from stepscope.measure.step.reconstruct import weighted_logprobs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.state import Policy
from stepscope.results import read_table

FIGURES = ("entropy", "momentum", "decay", "batch", "predicted", "realised", "noise_scale", "grad_norm")


def test_a_probe_under_fsdp2_is_that_of_one_process_and_disturbs_nothing(tmp_path: Path) -> None:
    """Two trainings and one of which the probe fails on one process, by TRL and accelerate; in float32.

    Beside them steps in float64 of either kind of model, where figures are equal to 1e-9.
    """
    save_model(tmp_path / "model")
    expected = {}
    for kind, make in KINDS.items():
        model = make().train()
        optimizer = two_steps(model)
        owner = Policy(model.eval(), cases.tokenizer(), SETTINGS)
        batches = cases.batch(owner), cases.batch(owner, num_prompts=5, group_size=1, seed=5)
        objective = weighted_logprobs(tuple(s.weights for s in seen(batches[0])))
        loss = {n: -t for n, t in gradient(owner, batches[0], objective).items()}
        expected[kind] = loss, batches, third_step(model.train(), optimizer, loss, batches, None)
    torch.save(expected, tmp_path / "alone.pt")
    told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": "2"}
    multiprocessing.spawn(run, (tmp_path, told), nprocs=2)
    assert (tmp_path / "done 0").exists()
    assert (tmp_path / "done 1").exists()

    with batches_kept(tmp_path, None):
        trainer(tmp_path, "alone", own_probe(), per_process=8).train()
    alone, parts, faulty = (
        read_table(tmp_path / out / "probes.parquet").to_pylist() for out in ("alone", "probed", "faulty")
    )
    assert [row["step"] for row in parts] == [1, 2]
    assert [row["step"] for row in faulty] == [1]
    for one, two in zip(alone, parts, strict=True):
        assert one["prompts"] == two["prompts"]
        assert not two["warning"]
        for name in FIGURES:
            size = abs(one["predicted"]) if name in ("momentum", "decay", "batch", "realised") else 0.0
            np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-3 * size, err_msg=name)
    tokens = [read_table(tmp_path / out / "probes_tokens.parquet").to_pylist() for out in ("alone", "probed")]
    assert [row["token"] for row in tokens[0]] == [row["token"] for row in tokens[1]]
