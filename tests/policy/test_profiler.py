"""Where the time goes: counts against what the model itself saw, a trace, and nothing at all when off."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.config import MeasureConfig
from stepscope.measure.step.reconstruct import reconstruct_step, weighted_logprobs
from stepscope.policy.gradients.derivatives import gradient
from stepscope.policy.passes import Budget, gather, lengths
from stepscope.policy.profiler import Profiler, profiled_stage, profiling, watched
from stepscope.policy.rollouts import score_rollouts
from stepscope.results.profile import REST, Profile
from stepscope.runs import PROFILE, TRACE, read_record

BUDGET = Budget(max_sequences=3)


def test_rows_are_what_the_model_saw_by_stage_kind_and_caller() -> None:
    policy = cases.policy()
    update = cases.batch(policy)
    step = reconstruct_step(policy, update)
    seen: list[int] = []
    handle = policy.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    profiler = Profiler()
    with profiling(profiler):
        with profiled_stage("one"):
            gradient(policy, update, weighted_logprobs(step.token_weights), budget=BUDGET)
            reconstruct_step(policy, update, budget=BUDGET)
        with profiled_stage("two"):
            score_rollouts(policy, update, budget=BUDGET)
            score_rollouts(policy, update, budget=BUDGET)
    handle.remove()
    profile = profiler.profile()
    by = {(r.stage, r.work, r.asked_by): r for r in profile.rows}
    one, two = by["one", "derivatives.gradient", ""], by["two", "rollouts._score", ""]
    asked = by["one", "derivatives.gradient", "reconstruct.reconstruct_step"]
    assert (one.passes, asked.passes, two.passes) == (1, 1, 2)
    micro_batches = -(-len(update) // BUDGET.max_sequences)
    assert (one.micro_batches, two.micro_batches) == (micro_batches, 2 * micro_batches)
    assert one.tokens == asked.tokens == sum(lengths(update)) == two.tokens // 2
    assert two.sequences == 2 * len(update)
    assert sum(row.padded for row in profile.rows) == sum(seen)
    rest = [by["one", REST, ""], by["two", REST, ""]]
    assert all(row.seconds > 0 for row in [one, asked, two])
    assert profile.seconds == pytest.approx(sum(row.seconds for row in profile.rows))
    assert all(row.passes == 0 for row in rest)
    assert len(profile.table().splitlines()) == 1 + len(profile.rows)


def test_the_rise_of_memory_is_that_of_one_micro_batch() -> None:
    policy = cases.policy()
    batch = cases.batch(policy)
    profiler = Profiler()
    held = []

    def run(rows):
        held.append(torch.ones(16 * 2**20))  # 64 MiB that stay
        held[-1].mul_(2)
        return rows

    with profiling(profiler), profiled_stage("one"):
        block = watched(run)
        for _ in range(2):
            block(gather(policy, batch, [0, 1]))
    (row,) = (r for r in profiler.profile().rows if r.work != REST)
    if np.isnan(row.rise):
        pytest.skip("this system does not tell what a process has resident")
    assert 63 * 2**20 < row.rise < 100 * 2**20


def test_without_a_profiler_functions_are_left_alone() -> None:
    assert watched(len) is len
    with profiled_stage("nothing"):
        pass


def test_measure_writes_table_and_trace_of_its_stages(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = ["measure", str(checkpoint), "--task", "arithmetic:terms=2,digits=2,ops=+", "--out", str(out)]
    asked += ["update.num_prompts=2", "update.group_size=4", "probe.num_prompts=8", "lrs=[1e-5]"]
    asked += ["second_order=false", "baseline=none", "batch_size=8", "--stages", "rollouts,step"]
    found = CliRunner().invoke(cli.app, [*asked, "--profile"])
    assert found.exit_code == 0, (found.output, found.exception)
    profile = read_record(Profile, out / PROFILE)
    assert profile.table() in found.stderr
    assert list(dict.fromkeys(row.stage for row in profile.rows)) == ["check", "rollouts", "step"]
    sampled = sum(row.sequences for row in profile.rows if row.work == "generate")
    assert sampled == 2 * 4 + 8
    events = json.loads((out / TRACE).read_text())["traceEvents"]
    assert {e["name"] for e in events if e["cat"] == "stage"} == {"check", "rollouts", "step"}
    assert sum(e["cat"] == "pass" for e in events) == sum(row.micro_batches for row in profile.rows)
    for event in (e for e in events if e["cat"] == "pass"):  # every pass stands within a stage
        within = [e for e in events if e["cat"] == "stage" and e["ts"] <= event["ts"] <= e["ts"] + e["dur"]]
        assert len(within) == 1
    again = CliRunner().invoke(cli.app, asked)
    assert again.exit_code == 0, again.output
    assert "outside passes" not in again.stderr
    assert MeasureConfig.model_fields["profile"].default is False
