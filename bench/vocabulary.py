"""Peak memory and time of derivatives at a large vocabulary: logits in pieces, and all at once.

    python bench/vocabulary.py [--vocabulary 151936] [--tokens 256] [--sequences 4] [--pieces-only]

A Qwen2 of hidden size 896 with LoRA on all its linear maps. Each figure is taken in a process of its own: its
peak resident memory above what it held after a pass over one sequence, as a multiple of what the same needs
up to the hidden states alone (the backbone, pulled back from a fixed vector) and of all logits (float32), and
seconds as a multiple of the same computation with all logits at once.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2Config, Qwen2ForCausalLM

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


def resident(key: str) -> float:
    """Resident memory of this process, MiB: what is there (``VmRSS``), or the peak (``VmHWM``)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))


def _plain() -> torch.no_grad:
    return torch.enable_grad() if torch.is_grad_enabled() else torch.no_grad()


def one(options: argparse.Namespace) -> None:
    """One figure: megabytes above what was there, and seconds, best of a few rounds."""
    policy, rollouts = made(options)
    if options.whole:
        head.PIECE_BYTES = head.LARGE_PIECE_BYTES = 2**50
    works(policy, rollouts.select(range(1)))[options.work]()  # checks of the model, once for all
    work = works(policy, rollouts)[options.work]
    Path("/proc/self/clear_refs").write_text("5")  # from now on the peak is what is there now
    before = resident("VmRSS")
    seconds = []
    for _ in range(options.rounds):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    print(json.dumps({"mib": resident("VmHWM") - before, "seconds": min(seconds)}))


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
    parser.add_argument("--pieces-only", action="store_true", help="leave out all logits at once")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.work:
        one(options)
        return
    logits = options.sequences * options.tokens * options.vocabulary * 4 / 2**20
    print(f"logits: {logits:.0f} MiB")
    found = {}
    for work in ("backbone gradient", "backbone forward", "gradient", "per sequence", "forward"):
        once = options.pieces_only or work.startswith("backbone")
        for whole in (False,) if once else (False, True):
            command = [sys.executable, Path(__file__), *sys.argv[1:], "--work", work]
            done = subprocess.run(command + ["--whole"] * whole, capture_output=True, text=True, check=True)
            found[work, whole] = json.loads(done.stdout.splitlines()[-1])
    for work, floor in (("gradient", "gradient"), ("per sequence", "gradient"), ("forward", "forward")):
        pieces, backbone = found[work, False], found[f"backbone {floor}", False]["mib"]
        times = pieces["mib"] / backbone
        line = f"{work:12s} {pieces['mib']:6.0f} MiB, {times:.2f} x the backbone's {backbone:.0f}"
        if whole := found.get((work, True)):
            line += (
                f"; whole {whole['mib']:.0f}, {whole['mib'] / logits:.1f} x the logits; time "
                f"{pieces['seconds'] / whole['seconds']:.2f} x the whole's {whole['seconds']:.1f} s"
            )
        print(line, flush=True)


if __name__ == "__main__":
    main()
