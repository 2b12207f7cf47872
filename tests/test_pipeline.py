"""A measurement end to end on a real small training: its files, its stages, resuming, repeatability."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from cases import estimate_of
from stepscope import cli
from stepscope.config import STAGES, MeasureConfig, build_config
from stepscope.errors import MeasurementError, RunFolderError
from stepscope.measure.influence.attribution import influence
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline import run_measure
from stepscope.pipeline.inputs.policies import checkpoints_in
from stepscope.pipeline.stages import PLANS
from stepscope.pipeline.stages.influence import OWN_PROMPTS_SEED
from stepscope.pipeline.stages.staleness import needs
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.rollouts import sample_responses
from stepscope.policy.vectors import dot, norm
from stepscope.results import Rollouts
from stepscope.runs import LOCK, locked
from stepscope.stats import Estimate
from stepscope.tasks.judge.worker import shared_worker

TASK = ["--task", "arithmetic:terms=2,digits=2,ops=+"]
SETTINGS = [
    "update.num_prompts=4", "update.group_size=4", "probe.num_prompts=24", "probe.group_size=2",
    "batch_size=64",
]  # fmt: skip
UNROUNDED = (
    "share_", "effect_after_", "change_linear_", "influence_", "linearity_", "rank_", "probe_needed_",
    "shrinkage_",
)  # fmt: skip
"""Beginnings of the figures of the step before rounding, where a training rounds it."""
QUICK = [*SETTINGS, "lrs=[1e-5]", "second_order=false", "baseline=none"]


def measure(*args: object) -> str:
    result = CliRunner().invoke(cli.app, ["measure", *map(str, args)])
    assert result.exit_code == 0, (result.output, result.exception)
    return result.stderr


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.iterdir()}


def by_stage(said: str) -> list[str]:
    """What a measurement says of its stages; its result comes after them."""
    return [line for line in said.splitlines() if line.split(":")[0] in PLANS]


def load_json(path: Path):
    return json.loads(path.read_text(), parse_constant=lambda c: pytest.fail(f"{path}: {c} is no JSON"))


@pytest.fixture(scope="module")
def measured(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole measurement, never changed by a test."""
    out = tmp_path_factory.mktemp("measured") / "run"
    said = measure(checkpoint, *TASK, "--out", out, *SETTINGS)
    assert [line.split(":")[0] for line in by_stage(said)] == list(STAGES)
    assert "changes the policy's entropy by" in said.splitlines()[len(STAGES)]
    return out


def test_stages_are_those_of_the_configuration():
    on_request = ("validation", "models", "curvature", "kinship", "frontier")
    assert [stage for stage in PLANS if stage not in on_request] == list(STAGES)


def test_every_file_of_the_contract_is_there_and_nothing_else(measured):
    expected = {"config.yaml", "provenance.json", "summary.json"}
    expected |= {file for stage in STAGES for file in PLANS[stage].writes}
    assert {p.name for p in measured.iterdir()} == expected


def in_bfloat16(checkpoint: Path, folder: Path, *, weights: bool = True, moments: bool = True) -> Path:
    """A checkpoint with its weights in bfloat16, as a training that keeps them so would leave it, or not."""
    shutil.copytree(checkpoint, folder)
    if weights:
        stored = load_file(folder / "model.safetensors")
        half = {name: tensor.to(torch.bfloat16) for name, tensor in stored.items()}
        save_file(half, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "manifest.json").unlink()
    if moments:
        saved = torch.load(folder / "optimizer.pt", weights_only=True)
        for entry in saved["state"].values():
            entry |= {key: entry[key].to(torch.bfloat16) for key in ("exp_avg", "exp_avg_sq")}
        torch.save(saved, folder / "optimizer.pt")
    return folder


def test_weights_stored_in_less_than_the_training_had_flag_what_depends_on_the_step(checkpoint, tmp_path):
    """Moments in float32 mean weights in float32; what the policy is like does not depend on that."""
    folder = in_bfloat16(checkpoint, tmp_path / "checkpoint", moments=False)
    out = tmp_path / "m"
    measure(folder, *TASK, "--out", out, *QUICK, "--stages", "rollouts,step,change,influence")
    step = load_json(out / "step.json")
    assert (step["stored_dtypes"], step["rounding"]) == (["bfloat16"], None)
    summary = load_json(out / "summary.json")
    names = [name for name in summary if name.startswith(("share_", "change_", "influence_", "linearity_"))]
    assert {"share_momentum", "change_true_per_token", "change_linear_per_seq", "influence_total"} <= set(
        names
    )
    for name in names:
        assert not summary[name]["reliable"], name
        assert "the training had finer weights" in summary[name]["reason"], name
    assert "bfloat16" not in summary["entropy_per_token"]["reason"] + summary["mean_reward"]["reason"]
    points = load_json(out / "change.json")["points"]
    assert not any(point[part]["reliable"] for point in points for part in ("true", "linear"))
    rankings = load_json(out / "reliability.json")["rankings"]
    assert all("the training had finer weights" in order["whole"]["reason"] for order in rankings)


def test_a_training_in_bfloat16_is_measured_as_it_rounds(checkpoint, tmp_path):
    """The headline is the change by the rounded step; what stays of the step before rounding says so."""
    folder = in_bfloat16(checkpoint, tmp_path / "checkpoint")
    (told,) = [f for f in inspect_checkpoint(folder) if "kept as bfloat16 and rounded after" in f.what]
    assert told.level == "warn"
    out = tmp_path / "m"
    measure(folder, *TASK, "--out", out, *QUICK, "--stages", "rollouts,step,change,influence,report")
    rounding = load_json(out / "step.json")["rounding"]
    assert rounding["kept_in"] == "bfloat16"
    assert 0 < rounding["share_moved"] < 1
    summary, change = load_json(out / "summary.json"), load_json(out / "change.json")
    taken = change["taken"]
    assert summary["change_true_per_token"] == taken["true"]
    assert summary["change_unrounded_per_token"] == taken["unrounded"]
    assert summary["change_rounding_per_token"] == taken["difference"]
    assert taken["difference"]["value"] == pytest.approx(taken["true"]["value"] - taken["unrounded"]["value"])
    assert "forward pass in float32" in taken["true"]["method"]
    point = next(p for p in change["points"] if p["lr"] == change["lr"])
    assert point["true"]["value"] == taken["unrounded"]["value"]
    assert summary["rounding_share_moved"]["value"] == rounding["share_moved"]
    for name, entry in summary.items():
        before = name.startswith(UNROUNDED)
        assert ("the step before rounding" in entry["reason"]) == before, name
    assert summary["change_true_per_token"]["reliable"]
    assert "The training keeps its weights in bfloat16" in (out / "report.html").read_text()


def test_moments_in_bfloat16_over_finer_weights_are_refused(checkpoint, tmp_path):
    folder = in_bfloat16(checkpoint, tmp_path / "checkpoint", weights=False)
    (told,) = [f for f in inspect_checkpoint(folder) if "is no bfloat16 number" in f.what]
    assert told.level == "fail"
    with pytest.raises(MeasurementError, match="is no bfloat16 number although the optimizer's moments are"):
        run_measure(MeasureConfig(checkpoint=str(folder), task=TASK[1], out=str(tmp_path / "m")))


def test_summary_has_the_figures_of_the_contract(measured):
    summary = load_json(measured / "summary.json")
    assert set(summary) >= {
        "entropy_per_token", "entropy_per_seq", "mean_reward", "change_linear_per_token",
        "change_true_per_token", "linearity_slope", "linearity_r2", "share_momentum", "share_decay",
        "share_sequences", "share_sequences_relative", "effect_after_10_steps", "noise_scale",
        "effective_rank", "wall_seconds",
    }  # fmt: skip
    for name, entry in summary.items():
        keys = {"value", "stderr", "n", "unit", "method", "reliable", "reason", "low", "high"}
        assert set(entry) == keys, name
        assert entry["unit"], name
        assert entry["method"], name
        assert bool(entry["reason"]) is not entry["reliable"], name
    shares = [summary[f"share_{part}"]["value"] for part in ("momentum", "decay", "sequences")]
    assert sum(shares) == pytest.approx(1, abs=1e-5)
    assert summary["wall_seconds"]["value"] > 0


def test_influence_on_the_batch_s_own_prompts_is_that_on_fresh_responses(measured, checkpoint, tmp_path):
    update = Rollouts.from_parquet(measured / "update.parquet", measured / "update_tokens.parquet")
    policy = load_checkpoint(checkpoint)
    fresh = sample_responses(policy, update.prompt_token_ids, seed=OWN_PROMPTS_SEED)
    assert fresh.num_prompts == update.num_prompts == 4
    assert fresh.response_token_ids != update.response_token_ids
    step = reconstruct_step(policy, update)
    found = influence(policy, step, update, fresh, quantity="entropy").sum_of_sequences
    stored = load_json(measured / "summary.json")["influence_sequences_own_prompts"]
    assert stored["value"] == pytest.approx(found.value, rel=1e-3)
    assert stored["stderr"] == pytest.approx(found.stderr, rel=1e-3)
    assert stored["n"] == 4
    short = [*TASK, *QUICK, "--stages", "rollouts,step,influence"]
    for name, without in (("off", "own_prompts=false"), ("reward", "quantities=[reward]")):
        measure(checkpoint, *short, "--out", tmp_path / name, without)
        summary = load_json(tmp_path / name / "summary.json")
        assert "influence_sequences" in summary
        assert "influence_sequences_own_prompts" not in summary


def test_batches_are_stored_with_what_the_contract_asks(measured):
    update = pq.read_table(measured / "update.parquet")
    tokens = pq.read_table(measured / "update_tokens.parquet")
    probe = pq.read_table(measured / "probe.parquet")
    assert (update.num_rows, probe.num_rows) == (16, 48)
    assert tokens.num_rows == sum(update["num_tokens"].to_pylist())
    assert "token_weight" in tokens.column_names
    assert "token_weight" not in pq.read_table(measured / "probe_tokens.parquet").column_names
    assert set(probe["advantage"].to_pylist()) != {None} or probe["advantage"].null_count == 48
    assert not set(update["prompt_id"].to_pylist()) & set(probe["prompt_id"].to_pylist())
    assert all("/train/" in p for p in update["prompt_id"].to_pylist())
    assert all("/test/" in p for p in probe["prompt_id"].to_pylist())


def test_stored_step_is_the_step(measured, checkpoint):
    policy = load_checkpoint(checkpoint)
    update = Rollouts.from_parquet(measured / "update.parquet", measured / "update_tokens.parquet")
    step = reconstruct_step(policy, update)
    stored = load_file(measured / "direction.safetensors")
    assert set(stored) == set(policy.parameters)
    assert dot(stored, step.direction) / norm(stored) / norm(step.direction) > 1 - 1e-6
    figures = load_json(measured / "step.json")
    assert figures["lr"] == step.lr == 0.001
    assert figures["grad_norm"] == pytest.approx(step.grad_norm, rel=1e-5)
    weights = pq.read_table(measured / "update_tokens.parquet")["token_weight"].to_numpy()
    np.testing.assert_allclose(weights, np.concatenate(step.token_weights), rtol=1e-12)


def test_summary_repeats_the_change_at_the_checkpoints_own_learning_rate(measured):
    summary, change = load_json(measured / "summary.json"), load_json(measured / "change.json")
    assert (change["quantity"], change["normalisation"], change["version"]) == (
        "entropy",
        "per_token",
        "on_policy",
    )
    point = next(p for p in change["points"] if math.isclose(p["lr"], 0.001))
    assert summary["change_linear_per_token"] == point["linear"]
    assert summary["change_true_per_token"] == point["true"]
    assert summary["linearity_slope"]["value"] == change["fit"]["slope"]
    assert summary["linearity_r2"]["value"] == change["fit"]["r2"]
    kinds = {(s["normalisation"], s["version"]) for s in [change, *change["others"]]}
    assert kinds == {(n, v) for n in ("per_token", "per_seq") for v in ("on_policy", "fixed_prefix")}


def test_entropy_of_the_summary_is_that_of_the_probe(measured):
    summary = load_json(measured / "summary.json")
    probe = Rollouts.from_parquet(measured / "probe.parquet", measured / "probe_tokens.parquet")
    total = sum(float(h.sum()) for h in probe.entropies)
    assert summary["entropy_per_token"]["value"] == pytest.approx(total / probe.num_tokens.sum())
    assert summary["entropy_per_seq"]["value"] == pytest.approx(total / len(probe))
    assert summary["entropy_per_token"]["n"] == probe.num_prompts == 24
    assert estimate_of(summary["mean_reward"]).value == pytest.approx(probe.rewards.mean())


def test_provenance_says_where_it_came_from(measured, checkpoint):
    provenance = load_json(measured / "provenance.json")
    assert provenance["checkpoint"] == str(checkpoint.resolve())
    assert len(provenance["checkpoint_digest"]) == 64
    assert provenance["seeds"] == {"update": 0, "probe": 1}
    assert list(provenance["stages"]) == list(STAGES)
    config = yaml.safe_load((measured / "config.yaml").read_text())
    assert build_config(MeasureConfig, config).probe.num_prompts == 24


def test_a_stage_alone_leaves_the_bytes_of_a_whole_run(measured, checkpoint, tmp_path):
    """Each stage in a process state of its own: everything that it needs comes from the folder."""
    whole = tmp_path / "whole/run"
    shutil.copytree(measured, whole)
    validation = ("validation.num_subsets=6", "validation.num_single=3")
    models = ("models.folds=3", "models.steps=5", "models.inducing=4", "models.draws=19")
    settings = [*SETTINGS, *validation, *models, "curvature.sketches=2", "curvature.folds=4"]
    settings += ["frontier.levels=2", "frontier.second_order=true", "--resume"]
    measure(checkpoint, *TASK, "--out", whole, *settings, "--stages", ",".join(PLANS))
    for stage, plan in PLANS.items():
        out = tmp_path / stage / "run"
        shutil.copytree(whole, out)
        for file in set(plan.writes) - set(plan.reads):
            (out / file).unlink()
        said = measure(checkpoint, *TASK, "--out", out, *settings, "--stages", stage)
        assert [line.split(":")[0] for line in by_stage(said)] == [stage]
        if stage == "rollouts":
            assert "token_weight" not in pq.read_table(out / "update_tokens.parquet").column_names
            measure(checkpoint, *TASK, "--out", out, *settings, "--stages", "step")
        ours, theirs = contents(out), contents(whole)
        assert set(ours) == set(theirs)
        for name in plan.writes:
            if name == "report.html":  # it shows the folder, and how long all stages took so far
                for pages, folder in ((ours, out), (theirs, whole)):
                    pages[name] = re.sub(rb"wall seconds</dt><dd>[\d.]+", b"", pages[name])
                    pages[name] = pages[name].replace(bytes(folder), b"")
            assert ours[name] == theirs[name], (stage, name)
        figures = [load_json(folder / "summary.json") for folder in (out, whole)]
        assert list(figures[0]) == list(figures[1])
        for found in figures:
            del found["wall_seconds"]
        assert figures[0] == figures[1], stage


def test_plans_read_what_earlier_stages_write_and_keys_that_there_are():
    written: set[str] = set()
    for plan in PLANS.values():
        assert set(plan.reads) <= written, plan.name
        assert set(plan.config) <= set(MeasureConfig.model_fields), plan.name
        written |= set(plan.writes)
    assert needs("change") == ["rollouts", "step"]
    assert needs("noise") == ["rollouts", "step"]


def test_what_depends_on_a_changed_setting_or_file_is_done_again(measured, checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(measured, out)
    arguments = [checkpoint, *TASK, "--out", out, *SETTINGS, "--resume"]
    refused = CliRunner().invoke(
        cli.app, ["measure", *map(str, arguments), "lrs=[1e-4]", "--stages", "kernel"]
    )
    assert refused.exit_code == 2
    assert "another configuration: lrs (None there, [0.0001] here)" in " ".join(refused.stderr.split())
    said = measure(*arguments, "lrs=[1e-4]")
    assert [line.split(":")[0] for line in by_stage(said) if "done before" not in line] == [
        "change", "change", "report", "report",
    ]  # fmt: skip
    assert "change: stale, done again (lrs (None there, [0.0001] here))" in said
    assert "report: stale, done again (change.json, summary.json changed)" in said
    assert yaml.safe_load((out / "config.yaml").read_text())["lrs"] == [1e-4]
    assert [p["lr"] for p in load_json(out / "change.json")["points"]] == [1e-4, 1e-3]
    (out / "influence_sequences.parquet").unlink()
    said = measure(*arguments, "lrs=[1e-4]", "baseline=none", "--stages", "influence,change,criteria,noise")
    assert "stale now: report; --stages report brings" in said
    (out / "update.parquet").unlink()
    said = by_stage(measure(*arguments, "lrs=[1e-4]", "baseline=none"))
    again = [line.split(":")[0] for line in said if "done before" not in line]
    assert again == ["rollouts", "step", "step", "report", "report"], (
        "the same batch has the same consequences"
    )


def test_finished_stages_are_not_repeated(measured, checkpoint):
    before = contents(measured)
    said = measure(checkpoint, *TASK, "--out", measured, *SETTINGS, "--resume")
    assert said.count("done before") == len(STAGES)
    assert contents(measured) == before


def test_two_measurements_do_not_share_a_folder(checkpoint, tmp_path):
    out = tmp_path / "run"
    config = build_config(MeasureConfig, {"checkpoint": str(checkpoint), "out": str(out)})
    with locked(out), pytest.raises(RunFolderError, match="another process is at work in this folder"):
        run_measure(config)
    assert not out.exists()


def test_the_lock_of_a_killed_measurement_is_void(measured, checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(measured, out)
    (out / LOCK).touch()
    assert measure(checkpoint, *TASK, "--out", out, *SETTINGS, "--resume").count("done before") == len(STAGES)
    assert contents(out) == contents(measured)


def test_a_removed_file_repeats_its_stage_and_nothing_that_read_the_same(checkpoint, tmp_path):
    out = tmp_path / "run"
    stages = ["--stages", "rollouts,step,change"]
    measure(checkpoint, "--out", out, *QUICK, *stages)
    change = (out / "change.json").read_bytes()
    (out / "direction.safetensors").unlink()
    said = measure(checkpoint, "--out", out, *QUICK, *stages)
    assert [("done before" in line) for line in by_stage(said)] == [True, False, True]
    assert (out / "change.json").read_bytes() == change


def test_validation_is_added_to_a_finished_measurement(measured, checkpoint, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(measured, out)
    settings = ["validation.num_subsets=6", "validation.num_single=3"]
    said = measure(checkpoint, *TASK, "--out", out, *SETTINGS, *settings, "--validate", "--resume")
    repeated = dict.fromkeys(line.split(":")[0] for line in by_stage(said) if "done before" not in line)
    assert list(repeated) == ["validation", "report"]
    found = load_json(out / "validation.json")
    assert list(found) == ["zeroed", "zeroed_optimizer"]
    assert found["zeroed"]["subset_true"] == found["zeroed_optimizer"]["subset_true"]
    assert found["zeroed"]["subset_predicted"] != found["zeroed_optimizer"]["subset_predicted"]
    assert len(found["zeroed"]["subset_true"]) == 6
    summary = load_json(out / "summary.json")
    assert summary["lds_zeroed"] == found["zeroed"]["lds"]
    assert summary["lds_across_zeroed"] == found["zeroed"]["lds_across"]
    assert "Influence against re-made steps" in (out / "report.html").read_text()


def test_several_quantities(checkpoint, tmp_path):
    out = tmp_path / "run"
    stages = ["--stages", "rollouts,step,change"]
    measure(checkpoint, "--out", out, *QUICK, "--quantity", "entropy,reward,length", *stages)
    change = load_json(out / "change.json")
    assert {s["quantity"] for s in change["others"]} == {"entropy", "reward", "length"}
    assert [p["lr"] for p in change["points"]] == [1e-5, 1e-3]
    summary = load_json(out / "summary.json")
    assert "change_true_reward_per_seq" in summary
    assert "change_true_per_token" in summary


def test_kernel_on_disk_and_within_a_small_budget_is_the_kernel(measured, checkpoint, tmp_path):
    whole = load_file(measured / "kernel.safetensors")
    for name, setting in (("disk", f"scratch={tmp_path}"), ("memory", "memory=0.001")):
        out = tmp_path / name
        measure(checkpoint, *TASK, "--out", out, *SETTINGS, setting, "--stages", "rollouts,step,kernel")
        for matrix, values in load_file(out / "kernel.safetensors").items():
            torch.testing.assert_close(
                values, whole[matrix], rtol=1e-5, atol=1e-6 * float(values.abs().max())
            )


def test_a_sweep_of_one_rate_has_no_slope_and_says_so(checkpoint, tmp_path):
    out = tmp_path / "run"
    stages = ["--stages", "rollouts,step,change"]
    measure(checkpoint, "--out", out, *QUICK, "lrs=[1e-3]", *stages)
    slope = load_json(out / "summary.json")["linearity_slope"]
    assert slope["value"] is None
    assert not slope["reliable"]
    assert "fewer than two" in slope["reason"]


def test_the_folder_may_be_named_in_another_way(checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    measure(checkpoint, "--out", "run", *QUICK, "--stages", "rollouts")
    said = measure(checkpoint, "--out", tmp_path / "run", *QUICK, "--stages", "rollouts")
    assert "done before" in said


def test_divergence_from_a_reference(trained_run, checkpoint, tmp_path):
    out = tmp_path / "run"
    start = f"reference={trained_run / 'base'}"
    stages = ["--stages", "rollouts,step,change,influence"]
    measure(checkpoint, "--out", out, *QUICK, "--quantity", "kl", start, *stages)
    change = load_json(out / "change.json")
    assert change["quantity"] == "kl"
    assert change["value"]["value"] > 0, "four steps away from the base"
    table = pq.read_table(out / "influence_sequences.parquet").to_pylist()
    total = sum(row["influence"] for row in table if row["through"] == "fixed")
    assert total * 1e-3 == pytest.approx(change["points"][-1]["linear"]["value"], rel=1e-3)


def test_float64(checkpoint, tmp_path):
    out = tmp_path / "run"
    measure(checkpoint, "--out", out, *SETTINGS, "--precision", "float64", "--stages", "rollouts,step,change")
    stored = load_file(out / "direction.safetensors")
    assert {str(t.dtype) for t in stored.values()} == {"torch.float64"}
    change = load_json(out / "change.json")
    small = change["points"][0]
    assert small["true"]["value"] == pytest.approx(small["linear"]["value"], rel=0.02)


def test_given_batches_are_used(measured, checkpoint, tmp_path):
    out = tmp_path / "run"
    files = [f"update.file={measured / 'update.parquet'}", f"probe.file={measured / 'probe.parquet'}"]
    measure(checkpoint, "--out", out, *files, "--stages", "rollouts")
    for name in ("update", "probe"):
        ours, theirs = (
            Rollouts.from_parquet(folder / f"{name}.parquet", folder / f"{name}_tokens.parquet")
            for folder in (out, measured)
        )
        assert ours.response_token_ids == theirs.response_token_ids
        np.testing.assert_allclose(np.concatenate(ours.logprobs), np.concatenate(theirs.logprobs), atol=1e-4)


def test_a_failure_later_keeps_what_is_finished(measured, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "run"

    def broken(*args, **kwargs):
        raise ZeroDivisionError

    monkeypatch.setattr("stepscope.pipeline.stages.change.measure_changes", broken)
    result = CliRunner().invoke(cli.app, ["measure", str(checkpoint), "--out", str(out), *QUICK])
    assert isinstance(result.exception, ZeroDivisionError)
    monkeypatch.undo()
    assert not list(out.glob("*.partial"))
    said = measure(checkpoint, "--out", out, *QUICK, "--resume", "--stages", "rollouts,step,change")
    assert [("done before" in line) for line in by_stage(said)] == [True, True, False]


def test_a_failure_first_leaves_no_folder(checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "run"
    monkeypatch.setattr("stepscope.pipeline.stages.rollouts.batch_figures", lambda *a: 1 / 0)
    result = CliRunner().invoke(cli.app, ["measure", str(checkpoint), "--out", str(out), *QUICK])
    assert isinstance(result.exception, ZeroDivisionError)
    assert not out.exists()


def test_checkpoints_of_a_run_in_order(tmp_path):
    for step in (10, 2, 100):
        (tmp_path / "checkpoints" / f"step-{step}").mkdir(parents=True)
    assert [p.name for p in checkpoints_in(tmp_path)] == ["step-2", "step-10", "step-100"]
    (tmp_path / "trl" / "checkpoint-5").mkdir(parents=True)
    assert [p.name for p in checkpoints_in(tmp_path / "trl")] == ["checkpoint-5"]


def test_check_says_what_was_found(checkpoint, small_training):
    result = CliRunner().invoke(cli.app, ["check", str(checkpoint)])
    assert result.exit_code == 0, result.output
    assert "AdamW" in result.output
    isolation = (
        "answers cannot be isolated" if shared_worker().isolation() else "answers are scored in a process"
    )
    assert isolation in " ".join(result.output.split())
    result = CliRunner().invoke(cli.app, ["check", str(small_training)])
    assert result.exit_code == 0, result.output
    assert "valid TrainConfig" in result.output


def test_report_is_rebuilt_from_the_artifacts_alone(measured, tmp_path):
    others = {n: c for n, c in contents(measured).items() if n != "report.html"}
    pages = []
    for _ in range(2):
        (measured / "report.html").write_text("")
        assert CliRunner().invoke(cli.app, ["report", str(measured)]).exit_code == 0
        pages.append((measured / "report.html").read_bytes())
    assert pages[0] == pages[1]
    assert pages[0].startswith(b"<!doctype html>")
    assert b"fig-m0-batch-sizes" in pages[0]
    assert {n: c for n, c in contents(measured).items() if n != "report.html"} == others


def test_two_measurements_are_compared(measured, tmp_path):
    page = tmp_path / "compare.html"
    result = CliRunner().invoke(cli.app, ["report", str(measured), str(measured), "--out", str(page)])
    assert result.exit_code == 0, result.output
    assert "Differences are B minus A" in page.read_text()
    refused = CliRunner().invoke(cli.app, ["report", str(measured), "--out", str(page)])
    assert refused.exit_code == 2


def test_errors_and_reliability_of_influence_are_left(measured):
    found, summary = load_json(measured / "reliability.json"), load_json(measured / "summary.json")
    assert {(r["level"], r["through"]) for r in found["rankings"]} == set(
        itertools.product(("token", "sequence"), ("fixed", "optimizer"))
    )
    ranked = next(r for r in found["rankings"] if (r["level"], r["through"]) == ("token", "optimizer"))
    assert summary["rank_reliability_tokens"] == ranked["whole"]
    table = pq.read_table(measured / "influence_tokens.parquet")
    moved = table.filter(pc.not_equal(table["influence"], 0))
    assert (moved["stderr"].to_numpy() > 0).all()
    optimizer = table.filter(pc.equal(table["through"], "optimizer"))
    assert np.isfinite(optimizer["shrunk"].to_numpy()).all()
    page = (measured / "report.html").read_text()
    assert page.index("The order below") < page.index("Influence of every sequence")


def test_criteria_are_judged_by_the_measured_influence(measured):
    criteria = load_json(measured / "criteria.json")
    assert {r["truth"] for r in criteria["rows"]} == {"column", "row", "diagonal"}
    assert {r["level"] for r in criteria["rows"]} == {"token", "sequence"}
    assert {r["criterion"] for r in criteria["rows"]} == set(criteria["definitions"])
    tokens = pq.read_table(measured / "criteria_tokens.parquet")
    update = pq.read_table(measured / "update_tokens.parquet")
    for column in ("sequence_id", "position"):
        assert tokens[column].to_pylist() == update[column].to_pylist()
    table = pq.read_table(measured / "influence_tokens.parquet")
    influence = table.filter(pc.equal(table["through"], "fixed"))["influence"].to_numpy()
    column = tokens["column_adamw_on_policy"].to_numpy()
    np.testing.assert_allclose(column, influence, atol=1e-4 * np.abs(influence).max())
    regressions = {(p["level"], p["outcome"]): p for p in criteria["properties"]}
    pushed = np.count_nonzero(pq.read_table(measured / "update.parquet")["advantage"].to_numpy())
    assert "entropy" in regressions["token", "influence"]["coefficients"]
    assert (("sequence", "influence") in regressions) == (pushed > 8)  # as many properties, and a constant
    top = load_json(measured / "summary.json")["influence_top_0.1"]
    size = np.sort(np.abs(column[column != 0]))[::-1]
    whole = int(0.1 * len(size))
    assert size[:whole].sum() <= top["value"] * size.sum() <= size[: whole + 1].sum()


def test_rules_that_drop_tokens_are_stepped_again(measured):
    pareto, change = load_json(measured / "pareto.json"), load_json(measured / "change.json")
    own = next(p for p in change["points"] if math.isclose(p["lr"], pareto["lr"]))
    assert pareto["full_entropy_change"]["value"] == pytest.approx(own["true"]["value"], rel=1e-3)
    rules = {p["rule"] for p in pareto["points"]}
    assert {"influence", "influence_no_reward", "random", "disc_v"} <= rules
    assert len(pareto["points"]) == 2 * len(rules)
    for point in pareto["points"]:
        kept = point["entropy_change"]["value"] - pareto["full_entropy_change"]["value"]
        assert point["entropy_kept"]["value"] == pytest.approx(kept, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "stages"),
    [
        ("direction.safetensors", "change"),
        ("update.parquet", "influence"),
        ("probe_tokens.parquet", "change"),
        ("step.json", "change"),
        ("summary.json", "change"),
        ("kernel.json", "report"),
    ],
)
def test_a_flipped_bit_in_an_artifact_is_one_line(measured, checkpoint, tmp_path, name, stages):
    out = tmp_path / "run"
    shutil.copytree(measured, out)
    content = bytearray((out / name).read_bytes())
    content[len(content) // 2] ^= 1
    (out / name).write_bytes(content)
    for plan in (PLANS[stage] for stage in stages.split(",")):
        (out / plan.writes[0]).unlink()
    with pytest.raises(RunFolderError, match=rf"{name}: (damaged|cannot be read)"):
        run_measure(
            build_config(
                MeasureConfig,
                {
                    **yaml.safe_load((out / "config.yaml").read_text()),
                    "out": str(out),
                    "stages": stages.split(","),
                },
            ),
            resume=True,
        )


def test_a_headline_that_is_no_number_ends_the_stage(measured, checkpoint, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(measured, out)
    (out / "noise.json").unlink()

    figure = Estimate(math.nan, 1.0, 4, "prompts", "ratio", True)
    plan = replace(PLANS["noise"], work=lambda session: {"noise_scale": figure}, writes=())
    monkeypatch.setitem(PLANS, "noise", plan)
    config = yaml.safe_load((out / "config.yaml").read_text())
    with pytest.raises(
        MeasurementError, match=r"noise_scale is nan \+- 1\.0 prompts, expected finite numbers"
    ):
        run_measure(
            build_config(MeasureConfig, {**config, "out": str(out), "stages": ["noise"]}), resume=True
        )
    assert "noise" not in load_json(out / "provenance.json")["stages"]


def test_a_reward_that_is_no_number_in_a_given_batch_is_refused(measured, checkpoint, tmp_path):
    for name in ("update", "update_tokens"):
        shutil.copy(measured / f"{name}.parquet", tmp_path / f"{name}.parquet")
    table = pq.read_table(tmp_path / "update.parquet")
    rewards = [math.nan, *table["reward"].to_pylist()[1:]]
    index = table.column_names.index("reward")
    pq.write_table(table.set_column(index, "reward", pa.array(rewards)), tmp_path / "update.parquet")
    given = f"update.file={tmp_path / 'update.parquet'}"
    result = CliRunner().invoke(
        cli.app, ["measure", str(checkpoint), "--out", str(tmp_path / "run"), given, *QUICK]
    )
    assert result.exit_code == 2
    assert "sequence 0 " in result.stderr
    assert "rewards holds nan" in result.stderr
