"""float64 that is float64: against a forward pass written by hand, and by how small a step is still seen."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import cases
from stepscope.errors import MeasurementError
from stepscope.policy.forward import TokenBatch, forward, make_batch
from stepscope.policy.numerics.precision import is_float64, lift_model, matching_precision, true_float64

PROMPTS = [(5, 6, 7, 8, 9, 3), (8, 9), (10, 11, 12)]
RESPONSES = [(10, 1), (15, 16, 17, 18, 19), (13, 14, 1)]


def entropy(model: nn.Module, params: dict[str, Tensor]) -> Tensor:
    outputs = forward(model, make_batch(PROMPTS, RESPONSES), temperature=0.8, params=params)
    return outputs.entropies.sum()


def trainable(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def random_direction(params: dict[str, Tensor]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}


def central_difference(model: nn.Module, direction: dict[str, Tensor], size: float) -> float:
    params = trainable(model)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        up, down = (
            entropy(model, {n: p + sign * size * direction[n].to(p.dtype) for n, p in params.items()})
            for sign in (1, -1)
        )
    return float(up - down) / (2 * size)


def forward_mode(model: nn.Module, direction: dict[str, Tensor]) -> float:
    params = trainable(model)
    tangent = {n: direction[n].to(p.dtype) for n, p in params.items()}
    with sdpa_kernel(SDPBackend.MATH):
        _, slope = torch.func.jvp(lambda values: entropy(model, values), (params,), (tangent,))
    return float(slope)


def test_a_step_of_1e_9_is_seen(architecture: str) -> None:
    """Round-off of the sum is about 1e-15, so the slope at 1e-9 is good to 1e-5; in float32 it is noise."""
    model = lift_model(cases.model(architecture))
    direction = random_direction(trainable(model))
    slope = forward_mode(model, direction)
    assert central_difference(model, direction, 1e-9) == pytest.approx(slope, rel=1e-5)
    narrow = cases.model(architecture)
    assert central_difference(narrow, direction, 1e-9) != pytest.approx(slope, rel=0.5)


def test_without_lifting_the_casts_a_double_model_has_float32_round_off() -> None:
    """What the lifting buys: the same parameters, the same inputs, the casts left in place."""
    model: Any = lift_model(cases.model("llama"))
    batch = make_batch(PROMPTS, RESPONSES)
    inputs = {
        "input_ids": batch.input_ids,
        "attention_mask": batch.attention_mask,
        "position_ids": batch.position_ids,
    }
    with torch.no_grad():
        plain = model(**inputs).logits
        with true_float64():
            lifted = model(**inputs).logits
    gap = float((plain - lifted).abs()[batch.attention_mask.bool()].max())
    assert 1e-9 < gap < 1e-4


def hand_written(model: Any, tokens: list[int]) -> Tensor:
    """Logits of a Llama or Qwen2 model for one sequence, (pos, vocab), from its weights in plain float64."""
    w = {n: p.detach().double() for n, p in model.state_dict().items()}
    c = model.config
    heads, kv_heads = c.num_attention_heads, c.num_key_value_heads
    size = c.hidden_size // heads
    theta = c.rope_parameters["rope_theta"]
    count = len(tokens)

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return weight * x / torch.sqrt((x * x).mean(-1, keepdim=True) + c.rms_norm_eps)

    def linear(x: Tensor, name: str) -> Tensor:
        bias = w.get(f"{name}.bias")
        y = x @ w[f"{name}.weight"].T
        return y if bias is None else y + bias

    angle = torch.tensor(
        [[k * theta ** (-2 * j / size) for j in range(size // 2)] for k in range(count)], dtype=torch.float64
    )
    cos, sin = torch.cos(angle), torch.sin(angle)

    def rotate(x: Tensor) -> Tensor:
        a, b = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for layer in range(c.num_hidden_layers):
        at = f"model.layers.{layer}"
        y = norm(x, w[f"{at}.input_layernorm.weight"])
        mixed = []
        for h in range(heads):
            g = h * kv_heads // heads
            q = rotate(linear(y, f"{at}.self_attn.q_proj")[:, h * size : (h + 1) * size])
            k = rotate(linear(y, f"{at}.self_attn.k_proj")[:, g * size : (g + 1) * size])
            v = linear(y, f"{at}.self_attn.v_proj")[:, g * size : (g + 1) * size]
            score = q @ k.T / math.sqrt(size)
            causal = torch.tril(torch.ones(count, count, dtype=torch.bool))
            weight = torch.exp(score - score.max()) * causal
            mixed.append(weight / weight.sum(-1, keepdim=True) @ v)
        x = x + linear(torch.cat(mixed, -1), f"{at}.self_attn.o_proj")
        y = norm(x, w[f"{at}.post_attention_layernorm.weight"])
        gate = linear(y, f"{at}.mlp.gate_proj")
        x = x + linear(gate / (1 + torch.exp(-gate)) * linear(y, f"{at}.mlp.up_proj"), f"{at}.mlp.down_proj")
    return norm(x, w["model.norm.weight"]) @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "smollm"])
def test_forward_equals_one_written_by_hand(architecture: str) -> None:
    model = lift_model(cases.model(architecture))
    batch = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        outputs = forward(model, batch, temperature=0.8, keep_logits=True)
    assert outputs.logits is not None
    for i, (prompt, response) in enumerate(zip(PROMPTS, RESPONSES, strict=True)):
        logits = hand_written(model, [*prompt, *response])[len(prompt) - 1 : -1] / 0.8
        torch.testing.assert_close(outputs.logits[i, : len(response)], logits, rtol=1e-12, atol=1e-12)
        p = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
        expected = -(p * torch.log(p)).sum(-1)
        torch.testing.assert_close(outputs.entropies[i, : len(response)], expected, rtol=1e-12, atol=1e-12)


def test_backward_forward_mode_and_nested_forward_mode_agree(architecture: str) -> None:
    model = lift_model(cases.model(architecture))
    params = trainable(model)
    direction = random_direction(params)
    leaves = {n: p.clone().requires_grad_(True) for n, p in params.items()}
    grads = torch.autograd.grad(entropy(model, leaves), list(leaves.values()))
    slope = sum(float((g * direction[n]).sum()) for n, g in zip(leaves, grads, strict=True))
    assert forward_mode(model, direction) == pytest.approx(slope, rel=1e-11)

    def slope_at(values: dict[str, Tensor]) -> Tensor:
        found: Tensor = torch.func.jvp(lambda v: entropy(model, v), (values,), (direction,))[1]
        return found

    with sdpa_kernel(SDPBackend.MATH):
        _, curvature = torch.func.jvp(slope_at, (params,), (direction,))
    h = 1e-5
    ahead, behind = (
        forward_mode_at(model, {n: p + s * h * direction[n] for n, p in params.items()}, direction)
        for s in (1, -1)
    )
    assert float(curvature) == pytest.approx((ahead - behind) / (2 * h), rel=1e-4)


def forward_mode_at(model: nn.Module, values: dict[str, Tensor], direction: dict[str, Tensor]) -> float:
    with sdpa_kernel(SDPBackend.MATH):
        return float(torch.func.jvp(lambda v: entropy(model, v), (values,), (direction,))[1])


def test_adapters_are_lifted_with_their_base() -> None:
    model = get_peft_model(
        cases.model("qwen2"), LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    ).eval()
    lift_model(model)
    direction = random_direction(trainable(model))
    assert central_difference(model, direction, 1e-9) == pytest.approx(
        forward_mode(model, direction), rel=1e-5
    )


class Casting(nn.Module):
    """Every way model code asks for a narrower type."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
        self.narrow = torch.ones(1)

    def forward(self, x: Tensor) -> list[Tensor]:
        return [
            x.float(),
            x.half(),
            x.bfloat16(),
            x.to(torch.float32),
            x.to(dtype=torch.bfloat16),
            x.to("cpu", torch.float16),
            x.to(self.narrow),
            x.type_as(self.narrow),
            x.type(torch.float32),
            x.type("torch.FloatTensor"),
            torch.softmax(x, -1, dtype=torch.float32),
            nn.functional.softmax(x, dim=-1, dtype=torch.float32),
            torch.zeros_like(x, dtype=torch.float32) + x,
            x + torch.ones(3) / 3,
            x + torch.arange(3) / 3,
            x + torch.full((3,), 0.1, dtype=torch.float32),
            x.sum(dtype=torch.float32) * x,
            torch.arange(3).float() + x,
        ]


def test_every_way_to_ask_for_less_gets_float64() -> None:
    x = torch.tensor([1 / 3, 1e-9, 7.0], dtype=torch.float64)
    model = Casting()
    with true_float64():
        found = model(x)
    assert {y.dtype for y in found} == {torch.float64}
    for y in found[:10]:
        assert torch.equal(y, x)
    assert torch.equal(found[13], x + torch.ones(3, dtype=torch.float64) / 3)
    assert torch.equal(found[15], x + 0.1)


def test_autocast_is_off_inside() -> None:
    a = torch.rand(4, 4, dtype=torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16), true_float64():
        assert torch.equal(a @ a, torch.einsum("ij,jk->ik", a, a)) or (a @ a).dtype == torch.float64
        assert not torch.is_autocast_enabled("cpu")


def test_all_is_restored_afterwards() -> None:
    x = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ZeroDivisionError), true_float64():
        raise ZeroDivisionError
    assert torch.get_default_dtype() == torch.float32
    assert x.float().dtype == torch.float32


def test_other_precisions_are_left_alone() -> None:
    model = cases.model()
    assert not is_float64(model)
    with matching_precision(model):
        assert torch.ones(1).dtype == torch.float32
    batch: TokenBatch = make_batch(PROMPTS, RESPONSES)
    with torch.no_grad():
        assert forward(model, batch, temperature=1.0).logprobs.dtype == torch.float32
        assert forward(lift_model(model), batch, temperature=1.0).logprobs.dtype == torch.float64


def test_constants_are_derived_anew() -> None:
    for architecture, theta in (("llama", 10000.0), ("smollm", 100000.0)):
        rotary: Any = lift_model(cases.model(architecture)).model.rotary_emb  # type: ignore[union-attr]
        expected = torch.tensor([theta ** (-j / 8) for j in range(0, 8, 2)], dtype=torch.float64)
        torch.testing.assert_close(rotary.inv_freq, expected, rtol=1e-15, atol=0)
    gemma: Any = lift_model(cases.model("gemma3"))
    assert float(gemma.model.embed_tokens.embed_scale) == 4.0


def test_frequencies_changed_after_construction_are_refused() -> None:
    model: Any = cases.model("llama")
    model.model.rotary_emb.inv_freq.mul_(1.1)
    with pytest.raises(MeasurementError, match=r"model\.rotary_emb\.inv_freq: .* --precision float32"):
        lift_model(model)
