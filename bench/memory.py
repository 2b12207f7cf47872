"""Kernel of thousands of sequences within a memory budget: peak memory, time, and the same numbers.

    python bench/memory.py [--sequences 4096] [--gib 2]

The budget is for gradients that are kept; the peak of the whole process is reported beside what it took
before the kernel was asked for. The kernel's corner is compared with that of its first 64 sequences alone.
"""

from __future__ import annotations

import argparse
import resource
import time

import torch

from cases import build
from stepscope.policy.gradients.derivatives import response_logprob
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.passes import Budget


def peak() -> float:
    """Largest resident size of this process so far, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sequences", type=int, default=4096)
    parser.add_argument("--gib", type=float, default=2.0)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    case = build("small", full=False, count=options.sequences)
    part = case.rollouts.select(range(64))
    exact = grams(
        case.policy,
        SequenceGradients(part, response_logprob),
        metrics={"P": case.P},
        budget=Budget(max_sequences=options.batch),
    )
    for _ in range(2):
        start = time.perf_counter()
        case.floor(options.batch, count=64)
        floor = (time.perf_counter() - start) * options.sequences / 64
    before = peak()
    start = time.perf_counter()
    found = grams(
        case.policy,
        SequenceGradients(case.rollouts, response_logprob),
        metrics={"P": case.P},
        budget=Budget(max_sequences=options.batch, memory_bytes=int(options.gib * 2**30), progress=True),
    )
    seconds = time.perf_counter() - start
    size = sum(p.numel() for p in case.policy.parameters.values())
    error = (found.square["P"][:64, :64] - exact.square["P"]).abs().max() / exact.square["P"].abs().max()
    print(
        f"{options.sequences} sequences x {size:,} parameters: "
        f"{options.sequences * size * 4 / 2**30:.2f} GiB of gradients"
    )
    print(
        f"budget {options.gib} GiB: {found.blocks} block(s), {seconds:.1f} s = {seconds / floor:.2f} x floor"
    )
    print(f"peak resident {peak():.2f} GiB, {peak() - before:.2f} GiB above what was there before")
    print(f"the kernel itself takes {found.square['P'].numel() * 8 / 2**30:.2f} GiB")
    print(f"first 64 sequences, largest relative difference to their own kernel: {float(error):.1e}")


if __name__ == "__main__":
    main()
