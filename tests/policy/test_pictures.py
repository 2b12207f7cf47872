"""Models of images and text: the text path is the model's own, and its step is torch's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

import cases
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.forward import forward, make_batch
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.numerics.precision import matching_precision

ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}
SIGHT = {"depth": 1, "hidden_size": 16, "num_heads": 2, "patch_size": 4}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 8,
    "patch_size": 4,
    "projection_dim": 16,
}
KINDS: dict[str, dict[str, Any]] = {
    "qwen2_vl": {
        "text_config": {**cases.SHAPE, "model_type": "qwen2_vl_text", "rope_scaling": ROPE},
        "vision_config": {**SIGHT, "embed_dim": 16, "mlp_ratio": 2},
    },
    "llava": {
        "text_config": {**cases.SHAPE, "model_type": "llama"},
        "vision_config": CLIP,
        "image_token_index": 21,
    },
}


@pytest.fixture(params=KINDS)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """After two steps of all weights, those that see among them."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model(request.param, **KINDS[request.param])
    ).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(2):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    model.save_pretrained(tmp_path)
    cases.tokenizer().save_pretrained(tmp_path)
    StepSettings(max_response_tokens=6, group_size=3, prompts_per_step=3).save(tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    return tmp_path


def test_the_text_path_is_measured(checkpoint: Path) -> None:
    policy = load_checkpoint(checkpoint, precision="float64")
    model: Any = policy.model
    prompts, responses = [[3, 4, 5], [6] * 7], [[6, 7, 8], [9, 2]]
    with torch.no_grad(), matching_precision(model):
        padded = forward(model, make_batch(prompts, responses), temperature=1.0).logprobs
        for i, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
            said = model(input_ids=torch.tensor([prompt + response])).logits[0].log_softmax(-1)
            alone = said[torch.arange(len(prompt) - 1, len(prompt + response) - 1), torch.tensor(response)]
            torch.testing.assert_close(padded[i, : len(response)], alone, rtol=0, atol=1e-12)
    model.config.vocab_size = len(cases.CHARACTERS)
    step = cases.step(policy)
    assert policy.optimizer is not None
    optimizer = torch.optim.AdamW(policy.parameters.values(), lr=1e-3)
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    optimizer.load_state_dict(saved)
    before = {name: p.detach().clone() for name, p in policy.parameters.items()}
    cases.take_step(policy, optimizer, step.update)
    moved = [name for name, p in policy.parameters.items() if not torch.equal(p, before[name])]
    assert any("q_proj" in name for name in moved)
    for name in moved:
        taken = (policy.parameters[name].detach() - before[name]) / 1e-3
        torch.testing.assert_close(step.direction[name], taken, rtol=0, atol=1e-9)
    sees = set(before) - set(moved)
    assert sees
    assert all("vis" in name or "projector" in name for name in sees)


def test_check_says_that_images_have_no_part(checkpoint: Path) -> None:
    found = inspect_checkpoint(checkpoint)
    assert not [f for f in found if f.level == "fail"]
    assert any("a model of images and text, measured on text alone" in f.what for f in found)
