"""Peak memory and time of derivatives at a large vocabulary: logits in pieces, and all at once.

    python bench/vocabulary.py [--vocabulary 151936] [--tokens 256] [--sequences 4] [--layers 2]

A Qwen2 of hidden size 896 with LoRA on all its linear maps. Each figure is taken in a process of its own: its
peak above what it held before, as a multiple of all logits (float32) and of what the same needs up to the
hidden states alone (the backbone, pulled back from a fixed vector), and seconds as a multiple of the same
computation with all logits at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

from memory import peak
from stepscope.policy import head
from stepscope.policy.forward import TokenBatch, TokenOutputs, base_model, forward_inputs
from stepscope.policy.gradients.derivatives import directional_derivative, gradient
from stepscope.policy.gradients.products import per_sequence_dot
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget, longest
from stepscope.policy.state import Policy
from stepscope.results import Rollouts

PROMPT = 32


def made(options: argparse.Namespace) -> tuple[Policy, Rollouts]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=options.vocabulary,
        hidden_size=896,
        intermediate_size=1216,
        num_hidden_layers=options.layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
    )
    model = get_peft_model(Qwen2ForCausalLM(config), LoraConfig(r=8, target_modules="all-linear")).eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.02)
    ids = torch.randint(10, options.vocabulary, (options.sequences, PROMPT + options.tokens)).tolist()
    count, zero = options.sequences, torch.zeros(options.tokens).numpy()
    rollouts = Rollouts(
        prompt_ids=tuple(map(str, range(count))),
        prompts=("",) * count,
        responses=("",) * count,
        prompt_token_ids=tuple(tuple(row[:PROMPT]) for row in ids),
        response_token_ids=tuple(tuple(row[PROMPT:]) for row in ids),
        rewards=torch.zeros(count).numpy(),
        correct=torch.zeros(count, dtype=torch.bool).numpy(),
        truncated=torch.zeros(count, dtype=torch.bool).numpy(),
        logprobs=(zero,) * count,
        entropies=(zero,) * count,
        temperature=1.0,
        max_response_tokens=options.tokens,
    )
    return Policy(model, None, StepSettings()), rollouts


def said(outputs: TokenOutputs, batch: TokenBatch) -> Tensor:
    return outputs.logprobs + outputs.entropies


def works(policy: Policy, rollouts: Rollouts) -> dict[str, Callable[[], object]]:
    """What is measured, and the same up to the hidden states (``backbone ...``)."""
    u = {n: torch.randn_like(p) for n, p in policy.parameters.items()}
    base = base_model(policy.model)
    batch = longest(policy, rollouts, len(rollouts))
    inputs = forward_inputs(policy.model, batch, positions=1)
    inputs = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
    fixed = torch.randn(base.config.hidden_size)

    def pulled() -> object:
        value = (base.model(**inputs, use_cache=False).last_hidden_state @ fixed).sum()
        return torch.autograd.grad(value, list(policy.parameters.values()))

    def pushed() -> object:
        def value(params: dict[str, Tensor]) -> Tensor:
            cut = head.Head(policy.model, base, object, 1, _plain, params)
            return cut.hidden(inputs) @ fixed

        primal = {n: p.detach() for n, p in policy.parameters.items()}
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            return torch.func.jvp(value, (primal,), (u,))

    budget = Budget(max_sequences=len(rollouts))
    return {
        "backbone gradient": pulled,
        "backbone forward": pushed,
        "gradient": lambda: gradient(policy, rollouts, said, budget=budget),
        "per sequence": lambda: per_sequence_dot(policy, SequenceGradients(rollouts, said), u, budget=budget),
        "forward": lambda: directional_derivative(policy, rollouts, said, u, mode="forward", budget=budget),
    }


def _plain() -> torch.no_grad:
    return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()


def one(options: argparse.Namespace) -> None:
    """One figure: megabytes above what was there, and seconds, best of a few rounds."""
    policy, rollouts = made(options)
    if options.whole:
        head.PIECE_BYTES = 2**50
    work = works(policy, rollouts)[options.work]
    before = psutil.Process().memory_info().rss / 2**20
    seconds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"mib": peak() * 1024 - before, "seconds": min(seconds)}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("vocabulary", 151936), ("tokens", 256), ("sequences", 4), ("layers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--work", default="")
    parser.add_argument("--whole", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        one(options)
        return
    logits = options.sequences * options.tokens * options.vocabulary * 4 / 2**20
    print(f"logits: {logits:.0f} MiB")
    found = {}
    for work in ("backbone gradient", "backbone forward", "gradient", "per sequence", "forward"):
        for whole in (False, True)[: 1 if work.startswith("backbone") else 2]:
            command = [sys.executable, Path(__file__), *sys.argv[1:], "--work", work]
            done = subprocess.run(command + ["--whole"] * whole, capture_output=True, text=True, check=True)
            found[work, whole] = json.loads(done.stdout.splitlines()[-1])
    for work, floor in (("gradient", "gradient"), ("per sequence", "gradient"), ("forward", "forward")):
        pieces, whole = found[work, False], found[work, True]
        backbone = found[f"backbone {floor}", False]["mib"]
        print(
            f"{work:12s} {pieces['mib']:6.0f} MiB in pieces ({pieces['mib'] / backbone:.2f} x the backbone's "
            f"{backbone:.0f}), {whole['mib']:6.0f} whole ({whole['mib'] / logits:.1f} x the logits); "
            f"time {pieces['seconds'] / whole['seconds']:.2f} x the whole's {whole['seconds']:.1f} s"
        )


if __name__ == "__main__":
    main()
