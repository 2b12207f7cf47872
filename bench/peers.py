"""What a kernel or an influence costs, in multiples of one plain forward and backward over the same tokens.

    python bench/peers.py [--large] [--full] [--sequences 64] [--rounds 5] [--threads 2] [--only NAME ...]

Every timing is taken beside a timing of the floor (the plain pass at its own best batch size), and the median
of the ratios over rounds counts. A first part finds each method's best batch size; the second takes all
methods at theirs in turn, in random order, ``--final`` rounds of it, so that a slow minute meets them all.
Results are compared with float64. Libraries that are not installed are left out, with the reason; install
them in an environment of their own, never as dependencies.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cases import Case, build, reference
from peer_methods import METHODS

TASKS = ("kernel", "kernel_P", "influence", "tokens")
SIZES = (8, 16, 32, 64)
TOO_SLOW = 2.5
"""Floors beyond which a method is not timed again beside the others."""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def best_floor(case: Case, sizes: list[int], rounds: int) -> tuple[int, float]:
    """Batch size and time at which the plain pass is fastest."""
    for size in sizes:
        case.floor(size)
    times: dict[int, list[float]] = {size: [] for size in sizes}
    for _ in range(rounds):
        for size in sizes:
            times[size].append(seconds(lambda size=size: case.floor(size)))
    medians = {size: statistics.median(t) for size, t in times.items()}
    best = min(medians, key=medians.__getitem__)
    return best, medians[best]


def measure(work: Callable[[], Tensor], floor: Callable[[], None], rounds: int, limit: float) -> list[float]:
    """Ratios of the work to the floor timed just before it; slow work gets fewer rounds."""
    ratios = []
    started = time.perf_counter()
    for _ in range(rounds):
        base = seconds(floor)
        ratios.append(seconds(work) / base)
        if time.perf_counter() - started > limit:
            break
    return ratios


def run(case: Case, names: list[str], sizes: list[int], rounds: int, limit: float) -> dict:
    size, floor_time = best_floor(case, sizes, rounds)
    print(
        f"floor: {floor_time:.3f} s at batch size {size} "
        f"({case.count} sequences of {case.ids.shape[1]} tokens)"
    )
    exact = reference(case)
    found: dict[str, dict] = {}
    for name in names:
        rows: dict[str, dict] = {}
        for batch in sizes:
            own = case.fresh()
            try:
                tasks = METHODS[name](own, batch)
            except ImportError as error:
                print(f"{name}: left out ({error})")
                break
            for task, work in tasks.items():
                try:
                    result = work().detach().double()
                except ImportError as error:
                    print(f"{name}, {task}: left out ({error})")
                    continue
                error = float((result - exact[task]).abs().max() / exact[task].abs().max())
                ratios = measure(work, lambda: case.floor(size), rounds, limit)
                ratio = statistics.median(ratios)
                print(
                    f"{name:18s} {task:10s} batch {batch:3d}: {ratio:6.2f} x floor, error {error:.1e}",
                    flush=True,
                )
                if task not in rows or ratio < rows[task]["ratio"]:
                    rows[task] = {"ratio": ratio, "batch": batch, "error": error, "ratios": ratios}
            del own, tasks
            gc.collect()
        if rows:
            found[name] = rows
    return {"floor": {"seconds": floor_time, "batch": size}, "methods": found}


def compare(case: Case, found: dict, rounds: int) -> None:
    """Time all methods within ``TOO_SLOW`` again, side by side; these ratios replace the first."""
    works = {
        (name, task): METHODS[name](case.fresh(), row["batch"])[task]
        for name, rows in found["methods"].items()
        for task, row in rows.items()
        if row["ratio"] <= TOO_SLOW
    }
    ratios: dict[tuple[str, str], list[float]] = {key: [] for key in works}
    for work in works.values():
        work()
    random = np.random.default_rng(0)
    for _ in range(rounds):
        for i in random.permutation(len(works)):
            key = list(works)[i]
            base = seconds(lambda: case.floor(found["floor"]["batch"]))
            ratios[key].append(seconds(works[key]) / base)
    for (name, task), values in ratios.items():
        found["methods"][name][task] |= {"ratio": statistics.median(values), "ratios": values}


def table(found: dict[str, dict]) -> str:
    """Markdown: one row a method, cost in floors at its best batch size."""
    lines = [
        "| method | " + " | ".join(TASKS) + " | largest error |",
        "|---|" + "---|" * (len(TASKS) + 1),
    ]
    for name, rows in found["methods"].items():
        cells = [f"{rows[t]['ratio']:.2f} (batch {rows[t]['batch']})" if t in rows else "" for t in TASKS]
        error = max(row["error"] for row in rows.values())
        lines.append(f"| {name} | " + " | ".join(cells) + f" | {error:.0e} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--large", action="store_true", help="hidden 512, 8 layers, r = 32")
    parser.add_argument("--full", action="store_true", help="full fine-tuning with tied embeddings")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--final", type=int, default=15, help="rounds of all methods in turn; 0 for none")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds for the rounds of one figure")
    parser.add_argument("--sizes", type=int, nargs="*", default=list(SIZES), help="batch sizes to try")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    warnings.simplefilter("ignore")
    case = build("large" if arguments.large else "small", full=arguments.full, count=arguments.sequences)
    sizes = [size for size in arguments.sizes if size <= case.count]
    found = run(case, arguments.only, sizes, arguments.rounds, arguments.limit)
    if arguments.final:
        compare(case, found, arguments.final)
    print()
    print(table(found))
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
