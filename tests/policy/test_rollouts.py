"""Sampling: the distribution, the flags, the seeds and the refusals."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

import cases
from stepscope.errors import BatchError, MeasurementError
from stepscope.policy.loss.advantages import advantages
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts, score_rollouts
from stepscope.policy.sampling.base import Decoding
from stepscope.policy.sampling.generate import TransformersSampler
from stepscope.policy.state import Policy
from stepscope.tasks import load_task
from stepscope.tasks.problem import Problem, Score, Task

SETTINGS = StepSettings(temperature=0.8, max_response_tokens=7, scale_rewards="group")


@pytest.fixture
def policy(tokenizer: Any) -> Policy:
    return Policy(model=cases.model(), tokenizer=tokenizer, settings=SETTINGS)


def test_same_seed_same_batch_and_global_state_untouched(policy: Policy, letters: Any) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = sample_rollouts(policy, letters, num_prompts=5, group_size=3, seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    again = sample_rollouts(policy, letters, num_prompts=5, group_size=3, seed=4)
    other = sample_rollouts(policy, letters, num_prompts=5, group_size=3, seed=5)
    assert first.response_token_ids == again.response_token_ids
    assert first.prompt_ids == again.prompt_ids
    assert first.response_token_ids != other.response_token_ids


def test_records_are_consistent(policy: Policy, letters: Any) -> None:
    batch = sample_rollouts(policy, letters, num_prompts=8, group_size=4, seed=0)
    assert len(batch) == 32
    assert batch.num_prompts == 8
    assert list(batch.prompt_index) == [i for i in range(8) for _ in range(4)]
    assert batch.truncated.any()
    assert not batch.truncated.all()
    for ids, cut, response in zip(batch.response_token_ids, batch.truncated, batch.responses, strict=True):
        assert (ids[-1] != 1) == bool(cut)
        assert 1 not in ids[:-1]
        assert len(ids) == 7 if cut else len(ids) <= 7
        assert response == policy.tokenizer.decode(ids, skip_special_tokens=True)
    logprobs, entropies = score_rollouts(policy, batch, budget=Budget(max_sequences=1))
    for i in range(32):
        np.testing.assert_allclose(batch.logprobs[i], logprobs[i], atol=1e-5)
        np.testing.assert_allclose(batch.entropies[i], entropies[i], atol=1e-5)
    assert batch.advantages is not None
    np.testing.assert_array_equal(batch.advantages, advantages(batch.rewards, batch.prompt_index, "group"))
    assert sample_rollouts(policy, letters, num_prompts=2, group_size=1, seed=0).advantages is None


@pytest.mark.parametrize("hidden_defaults", [False, True])
def test_tokens_follow_the_policy_itself(policy: Policy, hidden_defaults: bool) -> None:
    """First-token frequencies against softmax(z/T), whatever the model's generation config asks for."""
    model: Any = policy.model
    if hidden_defaults:
        model.generation_config.top_k = 2
        model.generation_config.top_p = 0.3
        model.generation_config.repetition_penalty = 3.0
        model.generation_config.temperature = 5.0
        model.generation_config.max_length = 3
    kept = model.generation_config
    short = replace(policy, settings=replace(SETTINGS, max_response_tokens=1))
    batch = sample_rollouts(
        short, OneProblem(), num_prompts=1, group_size=4000, seed=1, budget=Budget(max_sequences=2000)
    )
    assert model.generation_config is kept
    with torch.no_grad():
        logits = model(torch.tensor([[7, 12, 7, 13]])).logits[0, -1]
    expected = torch.softmax(logits / 0.8, -1).numpy()
    found = np.bincount([ids[0] for ids in batch.response_token_ids], minlength=len(expected)) / 4000
    error = np.sqrt(expected * (1 - expected) / 4000)
    assert np.all(np.abs(found - expected) < 4.5 * error + 1e-3)


def test_nucleus_leaves_out_the_tail(policy: Policy) -> None:
    short = replace(policy, settings=replace(SETTINGS, max_response_tokens=1))
    arguments: dict[str, Any] = {
        "num_prompts": 1,
        "group_size": 4000,
        "seed": 2,
        "budget": Budget(max_sequences=4000),
    }
    nucleus = SamplingOptions(sampler=TransformersSampler(decoding=Decoding(top_p=0.6)))
    batch = sample_rollouts(short, OneProblem(), options=nucleus, **arguments)
    model: Any = policy.model
    with torch.no_grad():
        logits = model(torch.tensor([[7, 12, 7, 13]])).logits[0, -1]
    probs = torch.softmax(logits / 0.8, -1).numpy()
    order = np.argsort(-probs)
    kept = order[: int(np.searchsorted(np.cumsum(probs[order]), 0.6)) + 1]
    expected = np.zeros_like(probs)
    expected[kept] = probs[kept] / probs[kept].sum()
    found = np.bincount([ids[0] for ids in batch.response_token_ids], minlength=len(probs)) / 4000
    assert set(np.flatnonzero(found)) == set(kept)
    assert np.all(np.abs(found - expected) < 4.5 * np.sqrt(expected * (1 - expected) / 4000) + 1e-3)
    np.testing.assert_allclose(
        batch.logprobs[0], np.log(probs[batch.response_token_ids[0][0]]), rtol=1e-4
    )  # of the whole policy


def test_responses_do_not_depend_on_the_batch_size(policy: Policy, letters: Any) -> None:
    batches = [
        sample_rollouts(
            policy, letters, num_prompts=9, group_size=3, seed=7, budget=Budget(max_sequences=size)
        )
        for size in (1, 4, 27)
    ]
    assert batches[0].response_token_ids == batches[1].response_token_ids == batches[2].response_token_ids
    for one, all_ in zip(batches[0].logprobs, batches[2].logprobs, strict=True):
        np.testing.assert_allclose(one, all_, atol=1e-5)


@dataclass(frozen=True)
class OneProblem:
    spec: str = "one"

    def problems(self, split: str) -> list[Problem]:
        return [Problem("one/train/0", "5+5=", "10")]

    def prompt(self, problem: Problem, tokenizer: Any) -> str:
        return problem.question

    def formatted(self, response: str) -> bool:
        return True

    def score(self, problem: Problem, response: str) -> Score:
        return Score(float(len(response)), False, True)

    def demonstration(self, problem: Problem) -> str:
        return problem.answer


def test_excluded_prompts_are_not_used(policy: Policy, letters: Any) -> None:
    update = sample_rollouts(policy, letters, num_prompts=16, group_size=1, seed=0)
    probe = sample_rollouts(
        policy,
        letters,
        num_prompts=16,
        group_size=1,
        seed=0,
        options=SamplingOptions(exclude=frozenset(update.prompt_ids)),
    )
    assert not set(update.prompt_ids) & set(probe.prompt_ids)
    assert len(set(probe.prompt_ids)) == 16
    with pytest.raises(
        BatchError,
        match="32 problems, less copies and those that are excluded, are not enough for 17 different prompts",
    ):
        sample_rollouts(
            policy,
            letters,
            num_prompts=17,
            group_size=1,
            seed=0,
            options=SamplingOptions(exclude=frozenset(update.prompt_ids)),
        )


def test_a_prompt_is_its_text(policy: Policy, tmp_path: Path) -> None:
    """Twelve rows, six texts: none is drawn twice, and excluding one excludes its copies."""
    path = tmp_path / "own.jsonl"
    texts = [f"{i % 6}+{i % 6}" + ("" if i < 6 else " \\r\\n") for i in range(12)]
    path.write_text("\n".join(f'{{"prompt": "{t}", "answer": 1, "split": "train"}}' for t in texts))
    task = load_task(f"jsonl:{path}", template="short")
    batch = sample_rollouts(policy, task, num_prompts=6, group_size=2, seed=0)
    assert sorted(set(batch.prompt_keys)) == [f"{i}+{i}" for i in range(6)]
    assert batch.num_prompts == 6
    with pytest.raises(
        BatchError, match="12 problems, less copies and those that are excluded, are not enough for 7"
    ):
        sample_rollouts(policy, task, num_prompts=7, group_size=1, seed=0)
    for excluded in ("2+2", "2+2 \r\n"):
        rest = sample_rollouts(
            policy,
            task,
            num_prompts=5,
            group_size=1,
            seed=1,
            options=SamplingOptions(exclude=frozenset({excluded})),
        )
        assert sorted(rest.prompt_keys) == ["0+0", "1+1", "3+3", "4+4", "5+5"]


def test_groups_without_variance_are_replaced(policy: Policy, letters: Any) -> None:
    plain = sample_rollouts(policy, letters, num_prompts=12, group_size=2, seed=3)
    flat = [np.ptp(plain.rewards[plain.prompt_index == g]) == 0 for g in range(12)]
    assert any(flat)
    batch = sample_rollouts(
        policy, letters, num_prompts=12, group_size=2, seed=3, options=SamplingOptions(resample=10)
    )
    assert batch.num_prompts == 12
    for g in range(12):
        assert np.ptp(batch.rewards[batch.prompt_index == g]) > 0


@dataclass(frozen=True)
class Hopeless(OneProblem):
    def problems(self, split: str) -> list[Problem]:
        return [Problem(f"hopeless/{i}", f"5+5+{i}=", "10") for i in range(50)]

    def score(self, problem: Problem, response: str) -> Score:
        return Score(0.0, False, False)


def test_no_variance_after_all_rounds_is_an_error_with_a_cure(policy: Policy) -> None:
    with pytest.raises(BatchError, match=r"2 of 2 prompt groups still .* after 3 rounds"):
        sample_rollouts(
            policy,
            Hopeless(),
            num_prompts=2,
            group_size=2,
            seed=0,
            options=SamplingOptions(resample=3),
        )


def test_requests_that_cannot_be_met(policy: Policy, letters: Any) -> None:
    with pytest.raises(BatchError, match="at least 1 of each"):
        sample_rollouts(policy, letters, num_prompts=0, group_size=2, seed=0)
    with pytest.raises(BatchError, match="group_size of at least 2"):
        sample_rollouts(
            policy, letters, num_prompts=1, group_size=1, seed=0, options=SamplingOptions(resample=10)
        )
    with pytest.raises(BatchError, match="no tokenizer"):
        sample_rollouts(replace(policy, tokenizer=None), letters, num_prompts=1, group_size=1, seed=0)
    long = replace(policy, settings=replace(SETTINGS, max_response_tokens=126))
    with pytest.raises(BatchError, match="128 positions"):
        sample_rollouts(long, letters, num_prompts=1, group_size=1, seed=0)


def test_prompts_keep_their_end_when_cut(policy: Policy, letters: Any) -> None:
    short = replace(policy, settings=replace(SETTINGS, max_prompt_tokens=2))
    batch = sample_rollouts(short, letters, num_prompts=3, group_size=1, seed=0)
    assert all(len(ids) == 2 and ids[-1] == 13 for ids in batch.prompt_token_ids)


def test_float64_and_adapters_sample_from_their_own_policy(policy: Policy, letters: Any) -> None:
    wide = replace(policy, model=lift_model(policy.model))
    batch = sample_rollouts(wide, letters, num_prompts=4, group_size=2, seed=0)
    logprobs, _ = score_rollouts(wide, batch)
    assert all(np.allclose(a, b, atol=1e-13, rtol=0) for a, b in zip(batch.logprobs, logprobs, strict=True))
    adapted = get_peft_model(
        policy.model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    ).eval()
    sampled = sample_rollouts(replace(policy, model=adapted), letters, num_prompts=4, group_size=2, seed=0)
    assert sampled.prompt_ids == batch.prompt_ids
    assert sampled.response_token_ids != batch.response_token_ids


def test_logits_that_are_not_finite_are_no_token(tokenizer: Any, letters: Task) -> None:
    model: Any = cases.model("llama")
    model.lm_head.register_forward_hook(lambda module, inputs, output: output + float("nan"))
    policy = Policy(model, tokenizer, StepSettings(max_response_tokens=4))
    with pytest.raises(MeasurementError, match="logits for response token 0 are not finite"):
        sample_rollouts(policy, letters, num_prompts=2, group_size=2, seed=0)


def test_excluded_tokens_are_neither_sampled_nor_counted(tokenizer: Any, letters: Task) -> None:
    model: Any = cases.model("llama")

    def exclude(module: nn.Module, inputs: Any, output: Any) -> Any:
        return torch.cat([output[..., :12], torch.full_like(output[..., 12:], -torch.inf)], -1)

    model.lm_head.register_forward_hook(exclude)
    policy = Policy(model, tokenizer, StepSettings(max_response_tokens=8))
    found = sample_rollouts(policy, letters, num_prompts=8, group_size=4, seed=0)
    assert max(t for row in found.response_token_ids for t in row) == 11
    assert 0 < np.concatenate(found.entropies).max() <= np.log(12)
