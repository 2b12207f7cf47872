"""Findings about policies built to have one thing wrong each."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import AdaLoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, FalconConfig, OPTConfig, PhiConfig, PhiForCausalLM
from trl.trainer.utils import disable_dropout_in_model

import cases
from made_tokenizers import CHAT, byte_level
from stepscope.errors import CheckpointError, MeasurementError
from stepscope.policy import forward as forward_module
from stepscope.policy.check.derivatives import random_direction
from stepscope.policy.check.examination import _asking, _settings, computed_types, examine
from stepscope.policy.check.findings import Finding
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import lift_model
from stepscope.policy.state import Policy


def policy_of(model: nn.Module, tokenizer: Any) -> Policy:
    return Policy(model, tokenizer, StepSettings())


def levels(policy: Policy) -> dict[str, str]:
    return {f.what: f.level for f in examine(policy)}


def test_float64_computes_in_float64_at_every_stage(tokenizer: Any, architecture: str) -> None:
    assert computed_types(policy_of(lift_model(cases.model(architecture)), tokenizer)) == {torch.float64}
    assert computed_types(policy_of(cases.model(architecture), tokenizer)) == {torch.float32}
    assert torch.bfloat16 in computed_types(policy_of(cases.model(architecture).bfloat16(), tokenizer))


def test_a_float64_model_that_computes_in_less_fails(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the lifting, the casts inside the norms show."""
    policy = policy_of(lift_model(cases.model("llama")), tokenizer)
    assert "fail" not in levels(policy).values()
    monkeypatch.setattr(forward_module, "matching_precision", lambda model: nullcontext())
    failed = [what for what, level in levels(policy).items() if level == "fail"]
    assert any("computes in less somewhere" in what for what in failed)


class Random(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + 0.01 * torch.randn_like(x)


def test_randomness_in_the_model_fails(tokenizer: Any) -> None:
    model: Any = cases.model()
    model.model.norm = nn.Sequential(model.model.norm, Random())
    found = levels(policy_of(model, tokenizer))
    assert found["two equal forward passes differ"] == "fail"


def test_a_model_that_ignores_padding_fails(tokenizer: Any) -> None:
    model: Any = cases.model()
    inner = model.model.forward
    model.model.forward = lambda input_ids, **ignored: inner(input_ids=input_ids)
    failed = [what for what, level in levels(policy_of(model, tokenizer)).items() if level == "fail"]
    assert any("depend on batch size and padding by up to" in what for what in failed)


def test_dropout_and_missing_end_token_are_warnings(tokenizer: Any) -> None:
    model: Any = cases.model("gpt2")
    tokenizer.eos_token = None
    model.generation_config.eos_token_id = None
    warned = [what for what, level in levels(policy_of(model, tokenizer)).items() if level == "warn"]
    assert any("dropout" in what for what in warned)
    assert any("all responses are truncated" in what for what in warned)


def random_in_training(model: nn.Module) -> bool:
    """Two passes of the model as TRL trains it."""
    model.train()
    ids = torch.arange(2, 14)[None]
    passes = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        passes.append(model(input_ids=ids).logits.detach())
    return not torch.equal(*passes)


@pytest.mark.parametrize("disabled", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["opt", "falcon", "gpt2", "qwen2"])
def test_dropout_is_found_where_it_acts(tokenizer: Any, kind: str, dropout: float, disabled: bool) -> None:
    """OPT and Falcon call the function, which TRL's ``disable_dropout`` leaves on; GPT-2 has modules."""
    size: dict[str, Any] = {"vocab_size": 20, "hidden_size": 16, "num_attention_heads": 2}
    if kind == "opt":
        config: Any = OPTConfig(
            **size,
            num_hidden_layers=2,
            ffn_dim=32,
            word_embed_proj_dim=16,
            dropout=dropout,
            attention_dropout=0.0,
        )
    elif kind == "falcon":
        config = FalconConfig(
            **size, num_hidden_layers=2, hidden_dropout=dropout, attention_dropout=0.0, ffn_hidden_size=32
        )
    else:
        config = cases.model(kind).config  # type: ignore[assignment]
        if kind == "gpt2":
            config.resid_pdrop, config.embd_pdrop, config.attn_pdrop = dropout, 0.0, 0.0
        else:
            config.attention_dropout = dropout
    model = AutoModelForCausalLM.from_config(config).eval()
    policy = Policy(model, tokenizer, StepSettings(disable_dropout=disabled))
    before = torch.get_rng_state()
    found = [f for f in examine(policy) if "training mode agree" in f.what or "while it trains" in f.what]
    assert torch.equal(torch.get_rng_state(), before)
    assert not model.training
    if kind == "gpt2" and dropout:
        assert any(m.p == dropout for m in model.modules() if isinstance(m, nn.Dropout))
    if disabled:
        disable_dropout_in_model(model)
    assert [f.level for f in found] == ["warn" if random_in_training(model) else "ok"]
    if dropout and kind in ("opt", "falcon"):
        assert found[0].level == "warn", "the modules are off, the function is not"


def test_tied_and_separate_embeddings(tokenizer: Any) -> None:
    assert "input and output embeddings are one tied parameter" in levels(policy_of(cases.model(), tokenizer))
    assert "input and output embeddings are separate" in levels(policy_of(cases.model("llama"), tokenizer))


@pytest.mark.parametrize(
    ("settings", "chat", "level", "words"),
    [
        ({"prompt_template": "Q: {question}"}, None, "ok", "problems of a task are asked as 'Q: {question}'"),
        ({"task": "arithmetic"}, CHAT, "ok", "problems of a task are asked as '{question}='"),
        ({"prompt_template": "chat:{question}"}, CHAT, "ok", "'<|user|>{question}<|end|><|assistant|>'"),
        ({}, "{{ raise_exception('no') }}", "warn", "chat template fails on messages of the roles user"),
        ({"prompt_template": "chat:{question}"}, None, "warn", "the tokenizer has no chat template"),
    ],
)
def test_how_problems_are_asked(settings, chat, level, words) -> None:
    policy = Policy(cases.model(), byte_level(chat=chat), StepSettings(**settings))
    (found,) = [finding for finding in _asking(policy) if words in finding.what]
    assert found.level == level


def test_an_error_becomes_a_finding_with_its_cure() -> None:
    assert Finding.from_error(CheckpointError("a: b; c; do this")) == Finding("fail", "a: b; c", "do this")
    assert Finding.from_error(CheckpointError("no cure")) == Finding("fail", "no cure", "")


def excluding(model: nn.Module, spoilt: float | None = None) -> nn.Module:
    """Logits of the tokens from 17 on are -inf, as for a padded vocabulary; a sequence alone is spoilt."""

    def change(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
        output = torch.cat([output[..., :17], torch.full_like(output[..., 17:], -torch.inf)], -1)
        return output + spoilt if spoilt is not None and len(output) == 1 and output.shape[1] > 1 else output

    model.get_submodule("lm_head").register_forward_hook(change)
    return model


def test_a_model_that_excludes_tokens_is_fine(tokenizer: Any) -> None:
    found = levels(policy_of(excluding(cases.model("llama")), tokenizer))
    assert "fail" not in found.values()
    assert any("log-probs depend on batch size and padding by at most" in what for what in found)


def test_a_nan_in_some_batches_is_not_dropped(tokenizer: Any) -> None:
    with pytest.raises(MeasurementError, match="logits before it are not finite"):
        examine(policy_of(excluding(cases.model("llama"), float("nan")), tokenizer))


@pytest.mark.parametrize("architecture", cases.MIXTURES)
@pytest.mark.parametrize("double", [False, True])
def test_mixtures_of_experts_are_examined_at_every_precision(
    tokenizer: Any, architecture: str, double: bool
) -> None:
    model = cases.model(architecture)
    assert "fail" not in levels(policy_of(lift_model(model) if double else model, tokenizer)).values()


@pytest.mark.parametrize("fill", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_bias_that_excludes_tokens_stays_put(tokenizer: Any, fill: float) -> None:
    """The direction in which derivatives are compared moves everything else."""
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    model: Any = PhiForCausalLM(PhiConfig(vocab_size=len(tokenizer), initializer_range=0.3, **shape)).eval()
    model.lm_head.bias.data[-2:] = fill
    policy = policy_of(model, tokenizer)
    direction = random_direction(policy)
    assert not direction["lm_head.bias"][-2:].any()
    assert direction["lm_head.bias"][:-2].all()
    assert all(bool(t.isfinite().all()) for t in direction.values())
    assert "fail" not in levels(policy).values()


@pytest.mark.parametrize(
    ("size", "coefficient", "told"), [(4, None, True), (12, None, False), (4, 0.0, False)]
)
def test_a_router_loss_of_pieces_of_a_batch_is_told(
    tokenizer: Any, size: int, coefficient: float | None, told: bool
) -> None:
    """TRL shuffles a batch before it is cut, and the loss of a piece is no sum over its sequences."""
    settings = StepSettings(group_size=4, prompts_per_step=3, micro_batch_size=size, router_loss=coefficient)
    found = examine(Policy(cases.model("mixtral"), tokenizer, settings))
    assert any(f.level == "warn" and "cut at random" in f.what for f in found) == told


def test_an_adapter_that_hardly_says_anything_is_no_false_alarm(tokenizer: Any) -> None:
    """AdaLoRA multiplies three small matrices: they move many times their size before log-probs move much."""
    config = AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj", "down_proj"])
    torch.manual_seed(0)
    model: Any = get_peft_model(cases.model("llama"), config).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 5e-3 * torch.randn_like(parameter).sign()
    found = levels(policy_of(model, tokenizer))
    assert any(what.startswith("derivatives are those of the function") for what in found), found


def test_what_a_loss_is_made_of_is_said() -> None:
    policy = cases.policy(
        loss_type="verl:vanilla",
        loss_parameters={"clip_ratio_c": 5.0},
        aggregation="token-sum",
        advantage_estimator="verl:rloo",
    )
    (found,) = _settings(policy)
    assert found.level == "ok"
    for words in (
        "loss verl:vanilla",
        "averaged by token-sum",
        "advantages by verl:rloo",
        "clip_ratio_c 5.0",
    ):
        assert words in found.what
    odd = replace(policy, settings=replace(policy.settings, loss_parameters={"delta": 1.0}))
    (found,) = _settings(odd)
    assert found.level == "fail"
    assert found.what.startswith("loss_parameters.delta of verl:vanilla")
