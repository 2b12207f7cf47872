"""A record on disk gives back what the optimizer did, bit for bit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cases
from stepscope.errors import RunFolderError
from stepscope.policy import vectors
from stepscope.policy.recorded import RecordedTraining, TrainingState
from stepscope.reading.recording import find_record
from stepscope.results.recording import (
    FIGURES,
    GRADIENT,
    RECORD,
    SEQUENCES,
    START,
    STATE,
    TOKENS,
    RecordedGroup,
    RunRecord,
    StepFigures,
    step_folder,
)

LRS = ((1e-3, 3e-3), (2e-3, 6e-3), (1e-3, 0.0), (3e-3, 1e-3), (1e-3, 2e-3))


def state_of(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> TrainingState:
    parameters = dict(model.named_parameters())
    entries = {n: optimizer.state.get(p, {}) for n, p in parameters.items()}
    zero = {n: torch.zeros_like(p) for n, p in parameters.items()}
    return TrainingState(
        {n: p.detach().clone() for n, p in parameters.items()},
        {n: e.get("exp_avg", zero[n]).clone() for n, e in entries.items()},
        {n: e.get("exp_avg_sq", zero[n]).clone() for n, e in entries.items()},
        {n: int(e.get("step", 0)) for n, e in entries.items()},
    )


def recorded(folder: Path, *, fused: bool, dtype: torch.dtype) -> list[TrainingState]:
    """Five steps of two groups, one parameter without gradient in the third, whole states at 2 and 4."""
    policy = cases.policy(dtype=dtype)
    named = dict(policy.model.named_parameters())
    decayed = [n for n, p in named.items() if p.ndim == 2]
    groups = (
        RecordedGroup(tuple(decayed), (0.9, 0.99), 1e-8, 0.1, fused=fused),
        RecordedGroup(tuple(n for n in named if n not in decayed), (0.8, 0.95), 1e-6, 0.0, fused=fused),
    )
    optimizer = torch.optim.AdamW(
        [
            {"params": [named[n] for n in g.names], "betas": g.betas, "eps": g.eps,
             "weight_decay": g.weight_decay, "fused": g.fused}
            for g in groups
        ]
    )  # fmt: skip
    RunRecord(
        groups=groups,
        first_step=1,
        planned_steps=5,
        state_every=2,
        max_grad_norm=0.0,
        temperature=1.0,
        max_response_tokens=6,
        num_iterations=1,
        loss_type="dr_grpo",
        beta=0.0,
        device="cpu",
        torch=str(torch.__version__),
        complete=True,
    ).write(folder / RECORD)
    states = [state_of(policy.model, optimizer)]
    states[0].save(folder / START)
    torch.manual_seed(0)
    for index, lrs in enumerate(LRS, 1):
        gradient = {n: torch.randn_like(p) for n, p in named.items() if index != 3 or n != groups[1].names[0]}
        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        for name, parameter in named.items():
            parameter.grad = gradient[name].clone() if name in gradient else None
        step = step_folder(folder, index)
        step.mkdir(parents=True)
        vectors.save(gradient, step / GRADIENT)
        optimizer.step()
        states.append(state_of(policy.model, optimizer))
        if index % 2 == 0:
            states[-1].save(step / STATE)
        batch = cases.batch(policy, seed=index)
        batch = replace(batch, rewards=np.full(len(batch), np.nan))
        names = [["t"] * n for n in batch.num_tokens]
        weights = [float(index) * np.arange(n) for n in batch.num_tokens]
        batch.to_parquet(step / SEQUENCES, step / TOKENS, tokens=names, token_weights=weights)
        StepFigures(index, lrs, 2.0, 0.5, float("nan")).write(step / FIGURES)
    return states


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_replay_is_bitwise_in_any_order(tmp_path: Path, fused: bool, dtype: torch.dtype) -> None:
    states = recorded(tmp_path, fused=fused, dtype=dtype)
    training = RecordedTraining.load(tmp_path)
    for index in (1, 2, 3, 4, 5, 5, 3, 1, 4):
        step = training.step(index)
        assert step.before.same(states[index - 1])
        assert step.after.same(states[index])
        assert [g.lr for g in step.groups] == list(LRS[index - 1])
    assert training.verify()
    assert training.exact


def test_a_step_has_its_batch_and_the_state_that_adamw_steps_from(tmp_path: Path) -> None:
    states = recorded(tmp_path, fused=False, dtype=torch.float64)
    step = RecordedTraining.load(tmp_path).step(3)
    assert np.isnan(step.rollouts.rewards).all()
    assert all((w == 3 * np.arange(len(w))).all() for w in step.token_weights)
    ascent = {n: -g for n, g in step.gradient.items()}
    made = step.optimizer.update(step.before.parameters, ascent, clip=1.0, lr=1.0)
    moved = vectors.add(*made.parts.values(), made.made_of(ascent))
    for name, direction in moved.items():
        expected = states[3].parameters[name] - states[2].parameters[name]
        torch.testing.assert_close(direction, expected, rtol=0, atol=1e-12)
    assert len(moved) == len(step.before.parameters) - 1


def test_damage_between_two_kept_states_is_found(tmp_path: Path) -> None:
    recorded(tmp_path, fused=False, dtype=torch.float32)
    path = step_folder(tmp_path, 4) / GRADIENT
    gradient = vectors.load(path)
    vectors.save({n: 0 * t for n, t in gradient.items()}, path)
    with pytest.raises(RunFolderError, match=r"the replay of step 4 is .* away from the state that is kept"):
        RecordedTraining.load(tmp_path).verify()


def test_a_gap_and_what_is_not_there_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match=r"was not recorded; train with `rl.record`"):
        find_record(tmp_path)
    recorded(tmp_path, fused=False, dtype=torch.float32)
    step_folder(tmp_path, 5).rename(tmp_path / "steps" / "000005.partial")
    folder = find_record(tmp_path)
    assert folder.steps == range(1, 5)
    with pytest.raises(RunFolderError, match="step 5 is not recorded, steps 1 to 4 are"):
        RecordedTraining(folder).step(5)
    step_folder(tmp_path, 2).rename(tmp_path / "elsewhere")
    with pytest.raises(RunFolderError, match="step 2 is missing, and 4 is there"):
        _ = find_record(tmp_path).steps
