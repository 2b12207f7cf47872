"""Objectives in real TRL trainings of seconds, and their measurement."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from digits import DigitTask, digit_config, log_of, reinforced
from safetensors.torch import load_file
from trl import GRPOTrainer

import cases
import stepscope
from stepscope.errors import ConfigError
from stepscope.measure.frontier.effects import before_step
from stepscope.measure.influence.token_influence import token_influences
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.rollouts import sample_influence_probe, score_rollouts
from stepscope.rules import UNCLIPPED, EntropyBonus, KlCov, Tokens, TopEntropy, token_advantages
from stepscope.training.rl import OnPolicyTrainer, step_settings

TASK = DigitTask(num_dead=0)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "clip_cov": {"name": "clip_cov", "fraction": 0.5, "low": 0.0, "high": 9.0},
    "clip_cov of micro-batches": {
        "name": "clip_cov",
        "fraction": 0.5,
        "low": 0.0,
        "high": 9.0,
        "scope": "micro_batch",
    },
    "kl_cov": {"name": "kl_cov", "fraction": 0.5},
    "top_entropy": {"name": "top_entropy"},
    "reweighting": {"name": "reweighting", "alpha": 1.0},
    "steer": {"name": "steer"},
    "released steer": {"name": "steer", "form": "released"},
    "discriminator": {"name": "discriminator", "threshold": 0.0},
    "discriminator of the batch": {"name": "discriminator", "form": "batch", "threshold": 0.0},
    "influence": {"name": "influence", "fraction": 0.3, "num_prompts": 4},
    "influence at a price": {
        "name": "influence",
        "fraction": 0.3,
        "price": 0.5,
        "weight": 0.5,
        "num_prompts": 4,
    },
    "frontier": {"name": "frontier", "num_prompts": 8, "folds": 4, "caution": 0.0},
    "entropy_bonus": {"name": "entropy_bonus", "coefficient": 0.1},
    "adaptive entropy_bonus": {"name": "entropy_bonus", "coefficient": 0.1, "target": 9.0},
}


def weights(checkpoint: Path) -> torch.Tensor:
    return torch.cat([t.flatten() for t in load_file(checkpoint / "model.safetensors").values()])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two updates on one batch, with the loss as it is."""
    return reinforced(digit_config(num_iterations=2), tmp_path_factory.mktemp("plain"), TASK)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_objective_changes_the_training(name: str, plain: Path, tmp_path: Path) -> None:
    objective = OBJECTIVES[name]
    last = reinforced(digit_config(num_iterations=2, objective=objective), tmp_path, TASK)
    found, usual = weights(last), weights(plain)
    assert torch.isfinite(found).all()
    assert float((found - usual).abs().max()) > 1e-5
    first, second = log_of(last)
    assert first["reward"] == log_of(plain)[0]["reward"]
    assert np.isfinite([first["grad_norm"], second["grad_norm"]]).all()
    if objective["name"] == "entropy_bonus":
        assert "objective_changed" not in first
    else:
        assert (first["objective_changed"] == 0) == (name == "kl_cov")
        assert 0 < second["objective_changed"] <= 1


def test_clip_higher_acts_from_the_second_update_on(plain: Path, tmp_path: Path) -> None:
    tight = reinforced(
        digit_config(num_iterations=2, epsilon_low=1e-6, epsilon_high=1e-6), tmp_path / "a", TASK
    )
    higher = reinforced(
        digit_config(num_iterations=2, epsilon_low=1e-6, epsilon_high=0.5), tmp_path / "b", TASK
    )
    assert log_of(tight)[0]["clip_ratio/region_mean"] == 0.0
    assert log_of(tight)[1]["clip_ratio/high_mean"] > 0.1
    assert log_of(higher)[1]["clip_ratio/high_mean"] == 0.0
    assert float((weights(higher) - weights(tight)).abs().max()) > 1e-5


def recorded(monkeypatch: pytest.MonkeyPatch, seen: list[dict[str, torch.Tensor]]) -> None:
    """Keep the sequences, with their own advantages, of every micro-batch of the last step."""
    usual: Callable[..., Any] = OnPolicyTrainer._prepare_inputs

    def recording(self: OnPolicyTrainer, batch: Any) -> Any:
        found = usual(self, batch)
        if self.state.global_step == 1:
            place = self._step % self.args.steps_per_generation
            seen.append(found | {"advantages": self._buffered_inputs[place]["advantages"]})
        return found

    monkeypatch.setattr(OnPolicyTrainer, "_prepare_inputs", recording)


@pytest.mark.parametrize(
    "objective",
    [
        {"name": "clip_cov", "fraction": 0.2, "low": 0.0, "high": 9.0},
        {"name": "discriminator", "threshold": 0.5},
        {"name": "top_entropy"},
        {"name": "influence", "fraction": 0.2, "num_prompts": 4},
        {"name": "frontier", "num_prompts": 8, "folds": 4},
        {"name": "entropy_bonus", "coefficient": 0.1},
    ],
    ids=lambda o: o["name"],
)
def test_the_measured_direction_is_the_next_step_that_trl_takes(
    objective: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Batch-wise statistics over two micro-batches, the random draw of clip_cov among them.

    TRL's bonus is a mean over a micro-batch, so it has the whole step in one.
    """
    size = 16 if objective["name"] == "entropy_bonus" else 8
    seen: list[dict[str, torch.Tensor]] = []
    recorded(monkeypatch, seen)
    config = digit_config(dtype="float64", save_every=1, micro_batch_size=size, objective=objective)
    after = reinforced(config, tmp_path, TASK)
    assert len(seen) == 16 // size
    policy = load_checkpoint(after.with_name("step-1"), precision="float64")
    assert policy.settings.objective is not None
    assert policy.settings.objective.name == objective["name"]
    update = cases.from_trl(seen)
    logprobs, entropies = score_rollouts(policy, update)
    update = replace(update, logprobs=logprobs, entropies=entropies)
    probe = sample_influence_probe(policy, TASK)
    if objective["name"] == "frontier":
        step = reconstruct_step(policy, update, program=before_step(policy, update, probe))
    else:
        influences = None if probe is None else token_influences(policy, update, probe)
        step = reconstruct_step(policy, update, influences=influences)
    moved = load_file(after / "model.safetensors")
    real = {n: (moved[n] - p.detach()) / step.lr for n, p in policy.parameters.items()}
    assert vectors.cosine(step.direction, real) >= 1 - 1e-7
    assert vectors.norm(step.direction) == pytest.approx(vectors.norm(real), rel=1e-5)
    assert ("bonus" in step.components) == (objective["name"] == "entropy_bonus")
    without = replace(policy, settings=replace(policy.settings, objective=None))
    assert vectors.cosine(reconstruct_step(without, update).direction, real) < 1 - 1e-4


def test_a_bonus_over_micro_batches_is_recorded_with_its_weight(tmp_path: Path) -> None:
    """Entropy is below the target, so that the weight grows by delta after each step."""
    objective = {"name": "entropy_bonus", "coefficient": 0.1, "target": 9.0, "delta": 0.01}
    last = reinforced(digit_config(objective=objective), tmp_path, TASK)
    bonus = StepSettings.load(last).objective
    assert isinstance(bonus, EntropyBonus)
    assert (bonus.coefficient, bonus.micro_batch_size) == (pytest.approx(0.12), 8)
    start = StepSettings.load(last.with_name("step-0")).objective
    assert start == EntropyBonus(coefficient=0.0, scope=8)


def test_top_entropy_of_micro_batches_is_trls_own_mask() -> None:
    generator = torch.Generator().manual_seed(0)
    entropies = torch.rand((3, 7), generator=generator, dtype=torch.float64)
    mask = torch.arange(7) < torch.tensor([[7], [4], [5]])
    tokens = Tokens(
        sequence=torch.nonzero(mask)[:, 0].numpy(),
        logprob=-entropies[mask].numpy(),
        old_logprob=-entropies[mask].numpy(),
        entropy=entropies[mask].numpy(),
        advantages=np.ones(3),
    )
    ours = token_advantages(TopEntropy(fraction=0.3, scope=3), tokens, seed=0, step=0)
    trainer: Any = SimpleNamespace(accelerator=Accelerator(cpu=True))
    theirs = GRPOTrainer.get_high_entropy_mask(trainer, entropies, mask.long(), 1 - 0.3)
    np.testing.assert_array_equal(ours, theirs.double()[mask])


@pytest.mark.slow
def test_two_processes_share_an_objective_and_a_curriculum(tmp_path: Path) -> None:
    here = Path(__file__).parent
    paths = [str(here), str(Path(stepscope.__file__).parents[1])]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"),
            *(str(here / "two_processes.py"), str(tmp_path)),
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
        | {"CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = json.loads((tmp_path / "seen.json").read_text())
    assert len(first) == 2
    for a, b in zip(first, second, strict=True):
        assert a["fits"]
        assert b["fits"]
        assert a["tokens"] == b["tokens"] == a["own"] + b["own"]
        assert (a["sum"], a["rates"]) == (b["sum"], b["rates"])
    assert first[1]["rates"] != first[0]["rates"]


def test_checkpoints_record_what_the_next_step_needs(tmp_path: Path) -> None:
    config = digit_config(num_iterations=2, objective={"name": "kl_cov", "scope": "micro_batch"})
    settings = step_settings(config)
    assert (settings.epsilon_low, settings.epsilon_high, settings.num_iterations) == (1.0, UNCLIPPED, 2)
    assert settings.objective == KlCov(scope=8)
    settings.save(tmp_path)
    stored = json.loads((tmp_path / "stepscope.json").read_text())["objective"]
    assert stored == {"name": "kl_cov", "fraction": 2e-3, "coefficient": 1.0, "micro_batch_size": 8}
    assert StepSettings.load(tmp_path) == settings


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"objective": {"name": "kl_cov"}}, "kl_cov does nothing on the first update"),
        ({"num_iterations": 2, "save_every": 3}, "save_every 3 is no multiple of num_iterations 2"),
        ({"num_iterations": 2, "steps": 5}, "steps 5 is no multiple of num_iterations 2"),
        (
            {"micro_batch_size": 1, "objective": {"name": "clip_cov", "scope": "micro_batch"}},
            "one sequence has one advantage",
        ),
        ({"objective": {"name": "clip_cov", "low": 2.0, "high": 1.0}}, "low 2.0 is not below high 1.0"),
        ({"objective": {"name": "entropy_bonus", "coefficient": 0.0}}, "coefficient 0 without a target"),
        ({"objective": {"name": "clip_cow"}}, r"rl.objective.name: expected 'clip_cov', .*, got 'clip_cow'"),
        ({"objective": {}}, "rl.objective.name: missing"),
        ({"objective": {"name": "steer", "frm": "theorem"}}, r"did you mean rl.objective.form\?"),
    ],
)
def test_what_makes_no_sense_is_refused(section: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        digit_config(**section)
