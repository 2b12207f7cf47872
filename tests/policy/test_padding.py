"""Padding on the left of prompts, for models told no positions or with a state that runs over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import cases
from stepscope.errors import MeasurementError
from stepscope.policy.check.examination import examine
from stepscope.policy.forward import forward, make_batch, plain_experts
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model, matching_precision
from stepscope.policy.state import Policy

PROMPTS = [(5, 6, 7, 8, 9, 3), (8, 9), (4,)]
RESPONSES = [(10, 1), (15, 16, 17, 18, 19), (13, 14, 1)]

MAMBA = {"state_size": 4, "expand": 2, "time_step_rank": 4}
HYBRID = {
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_d_state": 4,
    "mamba_n_groups": 1,
    "mamba_d_conv": 4,
    "mamba_expand": 2,
}
WIDE = {"d_model": 16, "n_heads": 2, "n_layers": 2, "max_seq_len": 128}

KINDS: dict[str, dict[str, Any]] = {
    "opt": {"ffn_dim": 32, "word_embed_proj_dim": 16},
    "bloom": {},
    "mpt": WIDE,
    "falcon": {"alibi": True},
    "gptj": {"rotary_dim": 4},
    "gpt_neox": {},
    "mamba": MAMBA,
    "mamba2": MAMBA | {"num_heads": 4, "head_dim": 8, "n_groups": 1},
    "bamba": HYBRID,
    "qwen3_next": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8},
}
SLOW = {"qwen3_next"}


def built(kind: str, **special: Any) -> Any:
    """Like ``cases.model``, of an architecture that only this file knows."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **{**cases.SHAPE, **special})
    return lift_model(AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(
    "kind", [pytest.param(k, marks=[pytest.mark.slow] if k in SLOW else []) for k in KINDS]
)
def test_a_padded_row_is_the_sequence_alone(kind: str) -> None:
    """Log-probs, entropies and the gradient of each row, in float64."""
    model = built(kind, **KINDS[kind])
    parameters = [p for p in model.parameters() if p.requires_grad]
    padded = forward(model, make_batch(PROMPTS, RESPONSES), temperature=0.7)
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        with matching_precision(model), plain_experts(model):
            logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0] / 0.7
        said = logits[len(prompt) - 1 : -1].log_softmax(-1)
        alone = said[torch.arange(len(response)), torch.tensor(response)]
        own = padded.logprobs[i, : len(response)]
        torch.testing.assert_close(own, alone, rtol=0, atol=1e-12)
        entropy = padded.entropies[i, : len(response)]
        torch.testing.assert_close(entropy, -(said.exp() * said).sum(-1), rtol=0, atol=1e-12)
        ours, theirs = (
            torch.autograd.grad(values.sum(), parameters, retain_graph=True, allow_unused=True)
            for values in (own, alone)
        )
        for a, b in zip(ours, theirs, strict=True):
            if a is not None or b is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


def test_a_model_whose_state_runs_over_padding_is_refused() -> None:
    model = built("rwkv", attention_hidden_size=16)
    with pytest.raises(MeasurementError, match="RwkvForCausalLM: its forward takes no position_ids and what"):
        forward(model, make_batch(PROMPTS, RESPONSES), temperature=1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_small_logits_hide_no_dependence_on_padding(dtype: torch.dtype) -> None:
    model = built("rwkv", attention_hidden_size=16).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e-5)
    with pytest.raises(MeasurementError, match="takes no position_ids"):
        forward(model, make_batch(PROMPTS, RESPONSES), temperature=1.0)


def test_round_off_of_a_half_type_is_no_dependence_on_padding() -> None:
    model = built("bloom").to(torch.bfloat16)
    with torch.no_grad():
        found = forward(model, make_batch(PROMPTS, RESPONSES), temperature=1.0)
    assert found.logprobs.isfinite().all()


def test_a_recurrence_without_forward_mode_is_refused_by_name() -> None:
    model = built("recurrent_gemma", head_dim=8, attention_window_size=8, num_hidden_layers=3)
    found = examine(Policy(model, cases.tokenizer(), StepSettings(max_response_tokens=5)))
    failed = [finding.what for finding in found if finding.level == "fail"]
    assert len(failed) == 1
    assert "torch cannot differentiate this model in forward mode" in failed[0]
