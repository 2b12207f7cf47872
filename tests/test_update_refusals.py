"""Dumps that hold other responses than those of the step, and numbers that are none."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from trl import GRPOConfig

import cases
from stepscope.errors import BatchError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline.inputs.update_files import update_from_file
from stepscope.pipeline.inputs.update_files.fields import logged
from stepscope.pipeline.inputs.update_files.rows import Dump
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from test_update_files import one_end, trained, true_direction

ONE = {"prompt_token_ids": [5, 6], "response_token_ids": [7, 8, 1], "reward": 1.0, "advantage": 0.5}
TWO = {"prompt_token_ids": [5, 6], "response_token_ids": [9, 1], "reward": 0.0, "advantage": -0.5}


def policy(**settings: Any) -> Policy:
    made = cases.policy(**{"group_size": 2, "prompts_per_step": 2, **settings})
    return replace(made, tokenizer=cases.tokenizer(), step=0)


def read(
    reader: Policy, tmp_path: Path, rows: Sequence[Mapping[str, Any]], *, kind: str = "table"
) -> Rollouts:
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return update_from_file(reader, path, step=None, budget=Budget()).rollouts


def unmasked(row: Mapping[str, Any]) -> dict[str, Any]:
    return {**row, "response_mask": [0] * len(row["response_token_ids"])}


def test_a_response_without_a_token_in_the_loss_still_counts_in_its_average(tmp_path: Path) -> None:
    """Left out under a mean over tokens, whose weights are A/N; refused where responses are counted."""
    rows = [unmasked(ONE), TWO, ONE, TWO]
    tokens = policy(loss_type="dapo", max_grad_norm=0.0)
    batch = read(tokens, tmp_path, rows)
    weights = reconstruct_step(tokens, batch).token_weights
    expected = [np.full(n, a / 7) for n, a in ((2, -0.5), (3, 0.5), (2, -0.5))]
    for found, wanted in zip(weights, expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert len(read(policy(loss_type="bnpo"), tmp_path, rows)) == 3
    for changes in (
        {"loss_type": "grpo"},
        {"loss_type": "dr_grpo"},
        {"loss_type": "bnpo", "micro_batch_size": 2},
        {"loss_type": "verl:vanilla", "aggregation": "seq-mean-token-sum"},
        {"loss_type": "verl:geo_mean", "aggregation": "token-mean"},
    ):
        with pytest.raises(BatchError, match=r"row 0: its mask takes .* counts it all the same"):
            read(policy(**changes), tmp_path, rows)
    cut = [{**ONE, "truncated": True}, TWO, ONE, TWO]
    counted = policy(loss_type="grpo", mask_truncated=True, max_grad_norm=0.0)
    found = reconstruct_step(counted, read(counted, tmp_path, cut)).token_weights
    expected = [np.full(n, a / n / 4) for n, a in ((3, 0.0), (2, -0.5), (3, 0.5), (2, -0.5))]
    np.testing.assert_allclose(np.concatenate(found), np.concatenate(expected), rtol=1e-12)


def test_the_advantage_of_a_response_is_that_of_its_own_tokens(tmp_path: Path) -> None:
    """verl has 0 on tokens of a tool, and others have nothing there."""
    for tool in (0.0, None):
        rows = [
            {**row, "advantage": [row["advantage"], tool, *[row["advantage"]] * (n - 2)], "response_mask": m}
            for row, n, m in ((ONE, 3, [1, 0, 1]), (TWO, 2, [1, 0]))
        ]
        batch = read(policy(), tmp_path, rows)
        assert batch.advantages is not None
        assert batch.advantages.tolist() == [0.5, -0.5]


ARGUMENTS = {"gradient_accumulation_steps": 2, "use_cpu": True, "bf16": False, "report_to": []}
PLAIN = {name: value for name, value in ONE.items() if name != "advantage"}
LOGGED = {"prompt": "1", "completion": "2", "advantage": 1.0, "r": 1.0, "step": 1}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "three to a group of two": ([PLAIN] * 3, "its prompt has 3 responses in the file"),
    "nothing in the loss": ([unmasked(ONE)] * 4, "and so do those of all others"),
    "mask": ([{**ONE, "response_mask": 1}], "response_mask is 1, expected a list"),
    "old log-probs": ([{**ONE, "old_logprobs": -3.0}], "old_logprobs is -3.0, expected a list"),
    "positive": ([{**ONE, "old_logprobs": [0.5, -1.0, -1.0]}], "token 0 is 0.5, expected .* at most 0"),
    "huge reward": ([{**ONE, "reward": 10**400}], "reward is 1000.*, expected a finite number"),
    "huge log-prob": ([{**ONE, "logprobs": [-(10**400), 0, 0]}], "logprobs of token 0 is -1000"),
    "huge token": ([{**ONE, "response_token_ids": [10**30]}], "expected a list of token ids"),
    "negative token": ([{**ONE, "prompt_token_ids": [-1]}], "expected a list of token ids"),
    "half a pair": ([{"prompt": "1", "response": "\ud800", "reward": 1.0}], "row 0: response .* no text"),
    "half in messages": (
        [{"prompt": [{"role": "user", "content": "\ud800"}], "response": "1", "reward": 1.0}],
        "row 0: prompt .* no text",
    ),
    "part of a step": ([LOGGED] * 2, "2 responses, and the run takes 4 for a step"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_the_steps_batch_is_refused(tmp_path: Path, name: str) -> None:
    rows, message = REFUSED[name]
    with pytest.raises(BatchError, match=message):
        read(policy(), tmp_path, rows)


def test_the_log_of_a_step_that_an_evaluation_followed(tmp_path: Path) -> None:
    """As the states of later checkpoints have it; the second update of a batch logs no responses anew."""
    rows = [LOGGED] * 4
    for updates, steps in ((1, {1}), (2, {1}), (1, {2})):
        run = replace(policy(num_iterations=updates), path=tmp_path / "checkpoint-0")
        later = tmp_path / "checkpoint-9"
        later.mkdir(exist_ok=True)
        history = [{"step": s, "reward": 1.0} for s in range(1, 10)]
        history += [{"step": s, "eval_reward": 1.0} for s in steps]
        (later / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        if 1 in steps:
            with pytest.raises(BatchError, match="the run evaluated after step 1"):
                read(run, tmp_path, rows)
        else:
            assert len(read(run, tmp_path, rows)) == 4


def test_a_later_step_on_a_generation_needs_the_log_probs_before_the_first(tmp_path: Path) -> None:
    """TRL cuts a generation of twice a step's batch into two steps, of which the second is off policy."""
    folder = tmp_path / "checkpoint-3"
    folder.mkdir()
    args = GRPOConfig(output_dir=str(folder), num_generations=2, steps_per_generation=4, **ARGUMENTS)
    torch.save(args, folder / "training_args.bin")
    rows = [ONE, TWO] * 2
    for step in (2, 3):
        reader = replace(policy(), path=folder, step=step)
        if step == 2:
            assert len(read(reader, tmp_path, rows)) == 4
            continue
        with pytest.raises(BatchError, match="the update 2 of 2 on its batch"):
            read(reader, tmp_path, rows)
        old = [{**row, "old_logprobs": [-1.0] * len(row["response_token_ids"])} for row in rows]
        assert len(read(reader, tmp_path, old)) == 4


def test_a_text_that_ended_has_room_for_its_end(tmp_path: Path) -> None:
    row = {"prompt": "1", "response": "1234", "reward": 1.0, "advantage": 1.0}
    reader = replace(policy(max_response_tokens=4), tokenizer=one_end())
    assert read(reader, tmp_path, [row] * 4).truncated.all()
    with pytest.raises(BatchError, match="has 5 tokens when tokenized back, its end among them, and the run"):
        read(reader, tmp_path, [{**row, "truncated": False}] * 4)


def test_rewards_are_the_weighted_sum_that_trl_takes(tmp_path: Path) -> None:
    row = {
        "step": 1,
        "prompt": "1",
        "completion": "2",
        "reward": 0.5,
        "size": 7,
        "form": None,
        "advantage": 1.0,
    }
    dump = Dump(tmp_path / "log.parquet", "trl", 1, (row, {**row, "form": 2.0}))
    names = frozenset({"reward", "form"})
    assert [one.reward for one in logged(dump, names, (1.0, 0.1))] == [0.5, 0.7]
    assert [one.reward for one in logged(dump, names)] == [0.5, 2.5]
    with pytest.raises(BatchError, match=r"2 columns of rewards \(reward, form\), and the run weighed 1"):
        logged(dump, names, (1.0,))


@pytest.mark.slow
def test_logs_of_real_runs_that_are_not_the_batch(tmp_path: Path) -> None:
    """TRL writes an evaluation's responses over the step's, and keeps the last of a step's generations."""
    asked = Dataset.from_list([{"prompt": "9+9="}, {"prompt": "8+8="}])
    run = trained(
        tmp_path / "a",
        asked,
        eval_strategy="steps",
        eval_steps=2,
        per_device_eval_batch_size=8,
        reward_weights=[2.0],
    )
    reader = load_checkpoint(run / "checkpoint-2", precision="float64")
    given = update_from_file(reader, run / "completions", step=None, budget=Budget())
    assert given.rollouts.rewards == pytest.approx(
        [2 * sum(c.isdigit() for c in text) / 24 for text in given.rollouts.responses]
    )
    assert given.figures["update_advantage_difference"].reliable
    found = reconstruct_step(reader, given.rollouts).direction
    assert vectors.cosine(found, true_direction(run, 2)) >= 1 - 1e-6
    reader = load_checkpoint(run / "checkpoint-1", precision="float64")
    for _ in range(2):
        with pytest.raises(BatchError, match="the run evaluated after step 2"):
            update_from_file(reader, run / "completions", step=None, budget=Budget())
        for step in (2, 3, 4):  # what is known while the run stands at its first checkpoint
            (run / f"checkpoint-{step}" / "trainer_state.json").unlink(missing_ok=True)
    run = trained(tmp_path / "b", steps_per_generation=1, gradient_accumulation_steps=2, loss_type="grpo")
    reader = load_checkpoint(run / "checkpoint-2", precision="float64")
    with pytest.raises(BatchError, match="8 responses, and the run takes 16 for a step"):
        update_from_file(reader, run / "completions", step=None, budget=Budget())
