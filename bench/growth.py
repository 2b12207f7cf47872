"""How time and memory grow: with the length of responses, the vocabulary, sequences, parameters, processes.

    python bench/growth.py --json runs/growth.json [--minutes 4] [--only length vocabulary ...]
    python bench/growth.py --json runs/growth.json --figure docs/figures/growth.svg

Each figure is taken in a process of its own (several under torchrun): seconds, best of a few rounds, and the
peak of resident memory above what was there after a first pass over two short sequences. Models are tiny
Qwen2s, so that what grows is seen and not what is large. What is finished stays in the file, and a call goes
on where an earlier one stopped. Along each axis y = a + b x^p is fitted to the
logarithms, for p and its error.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import OptimizeWarning, curve_fit

HERE = Path(__file__).resolve()
WORKS = ("gradient", "influence", "tokens", "kernel")
"""A plain gradient; products u . grad of each sequence; of each token; the kernel of all pairs."""

SURE = 0.3
"""Largest error of an exponent beside a constant; else the constant is left out."""

FLAT = 1.3
"""Where the largest is less than this times the smallest, nothing grows that a power could be told of."""


@dataclass(frozen=True)
class Size:
    """What is passed, and through what.

    Attributes:
        length: response tokens of each sequence; prompts have 8.
        vocabulary: of the model.
        sequences: of the batch.
        hidden: width of the model, which has two layers.
        processes: that share the work.
        adapter: train LoRA of rank 4 on all linear maps, and not the model itself, whose embeddings grow with
            the vocabulary.
    """

    length: int = 64
    vocabulary: int = 256
    sequences: int = 16
    hidden: int = 32
    processes: int = 1
    adapter: bool = False


@dataclass(frozen=True)
class Axis:
    """Sizes that differ in one thing.

    Attributes:
        name: of what grows.
        base: the rest.
        values: of the field ``name``.
        works: what is timed.
    """

    name: str
    base: Size
    values: tuple[int, ...]
    works: tuple[str, ...] = WORKS

    def sizes(self) -> list[Size]:
        return [replace(self.base, **{self.name: value}) for value in self.values]


AXES = (
    Axis(
        "length", Size(sequences=2), (256, 512, 1024, 2048, 4096, 8192), ("gradient", "influence", "tokens")
    ),
    Axis(
        "vocabulary",
        Size(sequences=4, adapter=True),
        tuple(2**k for k in range(10, 19, 2)),
        ("gradient", "influence", "tokens"),
    ),
    Axis("sequences", Size(length=24), (16, 64, 256, 1024, 4096)),
    Axis("hidden", Size(sequences=8), (32, 64, 128, 256, 512)),
    Axis("processes", Size(sequences=256, hidden=64), (1, 2)),
)


def one(size: Size, work: str) -> dict[str, float]:
    """Seconds and bytes of one figure, in this process (or these, under torchrun)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
    from stepscope.policy.gradients.gram import gram
    from stepscope.policy.gradients.products import per_sequence_dot
    from stepscope.policy.gradients.stream import SequenceGradients
    from stepscope.policy.group import entered
    from stepscope.policy.loss.settings import StepSettings
    from stepscope.policy.state import Policy
    from stepscope.results import Rollouts

    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=size.vocabulary,
        hidden_size=size.hidden,
        intermediate_size=2 * size.hidden,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16384,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(config)
    if size.adapter:
        model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.02)
    policy = Policy(model.eval(), None, StepSettings())
    ids = torch.randint(0, size.vocabulary, (size.sequences, 8 + size.length)).tolist()

    def batch(count: int, length: int) -> Rollouts:
        zeros, blank = np.zeros(count), ("",) * count
        return Rollouts(
            prompt_ids=tuple(map(str, range(count))),
            prompts=blank,
            responses=blank,
            prompt_token_ids=tuple(tuple(row[:8]) for row in ids[:count]),
            response_token_ids=tuple(tuple(row[8 : 8 + length]) for row in ids[:count]),
            rewards=zeros,
            correct=zeros > 0,
            truncated=zeros > 0,
            logprobs=(np.zeros(length),) * count,
            entropies=(np.zeros(length),) * count,
            temperature=1.0,
            max_response_tokens=length,
        )

    u = {n: torch.randn_like(p) for n, p in policy.parameters.items()}
    works: dict[str, Callable[[Rollouts], object]] = {
        "gradient": lambda rollouts: gradient(policy, rollouts, response_logprob),
        "influence": lambda rollouts: per_sequence_dot(
            policy, SequenceGradients(rollouts, response_logprob), u
        ),
        "tokens": lambda rollouts: directional_derivative(policy, rollouts, response_logprob, u),
        "kernel": lambda rollouts: gram(policy, SequenceGradients(rollouts, response_logprob)),
    }
    run, whole = works[work], batch(size.sequences, size.length)
    with entered() as group:
        run(batch(2, 4))
        group.barrier()
        resident = _reset_peak()
        times = [_seconds(run, whole, group.barrier)]
        rise = _status("VmHWM") - resident
        while len(times) < 3 and sum(times) < 4:
            times.append(_seconds(run, whole, group.barrier))
        return {
            "seconds": group.most(min(times)),
            "bytes": group.most(rise),
            "parameters": sum(p.numel() for p in policy.parameters.values()),
        }


def _seconds(run: Callable[[Any], object], batch: Any, wait: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run(batch)
    wait()
    return time.perf_counter() - begin


def _reset_peak() -> float:
    """Resident bytes; from now on the peak starts there."""
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024.0 * float(line.split()[1]) for line in lines if line.startswith(key))


def measured(size: Size, work: str) -> dict[str, float]:
    """One figure from a process of its own: a fork with the imports and no threads, or several new ones."""
    if size.processes == 1:
        import peft  # noqa: F401
        import torch  # noqa: F401
        import transformers.models.qwen2.modeling_qwen2  # noqa: F401

        context = multiprocessing.get_context("fork")
        receiving, sending = context.Pipe(duplex=False)
        child = context.Process(target=_tell, args=(sending, size, work))
        child.start()
        sending.close()
        found: dict[str, float] = receiving.recv()
        child.join()
        return found
    asked = json.dumps({"size": asdict(size), "work": work})
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size.processes}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    made = subprocess.run(
        [sys.executable, *command, str(HERE), "--case", asked],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    lines = [line for line in made.stdout.splitlines() if line.startswith("{")]
    if made.returncode or not lines:
        raise SystemExit(f"{asked}: {made.stderr[-2000:]}")
    told: dict[str, float] = json.loads(lines[0])
    return told


def _tell(sending: Any, size: Size, work: str) -> None:
    sending.send(one(size, work))
    sending.close()


def key(size: Size, work: str) -> str:
    return f"{work} {' '.join(f'{name}={value}' for name, value in asdict(size).items())}"


def points(axis: Axis, work: str, known: dict[str, Any], figure: str) -> tuple[list[float], list[float]]:
    """What is known along an axis: x and y."""
    rows = [(size, known.get(key(size, work))) for size in axis.sizes()]
    found = [
        (row["parameters"] if axis.name == "hidden" else getattr(size, axis.name), row[figure])
        for size, row in rows
        if row is not None
    ]
    return [float(x) for x, _ in found], [float(y) for _, y in found]


def power(x: list[float], y: list[float]) -> str:
    """P of y = a + b x^p with its standard error, by least squares of logarithms; or that nothing grows."""
    if len(x) < 3 or min(y) <= 0:
        return ""
    if max(y) < FLAT * min(y):
        return f"flat ({y[-1] / y[0]:.2f} times)"

    def model(log_x: Any, a: float, b: float, p: float) -> Any:
        return np.logaddexp(a, b + p * (log_x - np.log(x[-1])))

    start = (np.log(y[0]) - 1, np.log(y[-1]), 1.0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", OptimizeWarning)  # an infinite error says it, too
            best, spread = curve_fit(model, np.log(x), np.log(y), p0=start, maxfev=20000)
    except RuntimeError:
        return ""
    error = float(np.sqrt(spread[2, 2])) if len(x) > 3 else float("inf")
    if not error < SURE or best[0] < np.log(y[0]) - 8:  # nothing constant is seen: a plain power
        slope, covariance = np.polyfit(np.log(x), np.log(y), 1, cov="unscaled")
        residual = np.log(y) - np.polyval(slope, np.log(x))
        scale = float(residual @ residual) / max(1, len(x) - 2)
        return f"{slope[0]:.2f} ± {np.sqrt(covariance[0, 0] * scale):.2f}"
    return f"{best[2]:.2f} ± {error:.2f}"


NAMES = {"hidden": "parameters", "length": "response tokens", "vocabulary": "vocabulary"}


def table(known: dict[str, Any]) -> str:
    """Markdown: a row for each axis and work."""
    lines = [
        "| along | from, to | work | seconds | exponent | MiB above idle | exponent |",
        "|---|---|---|---|---|---|---|",
    ]
    for axis in AXES:
        for work in axis.works:
            x, times = points(axis, work, known, "seconds")
            _, sizes = points(axis, work, known, "bytes")
            if not x:
                continue
            mib = [size / 2**20 for size in sizes]
            lines.append(
                f"| {NAMES.get(axis.name, axis.name)} | {x[0]:,.0f} to {x[-1]:,.0f} | {work} "
                f"| {times[0]:.3g} to {times[-1]:.3g} | {power(x, times)} "
                f"| {mib[0]:.3g} to {mib[-1]:.3g} | {power(x, sizes)} |"
            )
    return "\n".join(lines)


def draw(known: dict[str, Any], path: Path) -> None:
    """Seconds above and memory below, an axis a column, on logarithmic axes."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "growth", "font.size": 8}
    from matplotlib import pyplot

    shown = [axis for axis in AXES if any(len(points(axis, w, known, "seconds")[0]) > 1 for w in axis.works)]
    figure, panels = pyplot.subplots(2, len(shown), figsize=(2.4 * len(shown), 4.4), squeeze=False)
    colours = dict(zip(WORKS, ("#0072b2", "#d55e00", "#009e73", "#cc79a7"), strict=True))
    for column, axis in enumerate(shown):
        for row, (figure_name, unit) in enumerate((("seconds", 1.0), ("bytes", 2.0**20))):
            panel = panels[row][column]
            for work in axis.works:
                x, y = points(axis, work, known, figure_name)
                panel.plot(x, np.array(y) / unit, "o-", ms=3, lw=1, color=colours[work], label=work)
            panel.set_xscale("log", base=2)
            panel.set_yscale("log")
            panel.grid(alpha=0.3)
            if row:
                panel.set_xlabel(NAMES.get(axis.name, axis.name))
            if not column:
                panel.set_ylabel("MiB above idle" if row else "seconds")
    panels[0][-1 if len(shown) < 3 else 2].legend(fontsize=7)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="figures that are known, and where new ones go")
    parser.add_argument("--minutes", type=float, default=60.0, help="after which no figure is begun")
    parser.add_argument("--only", nargs="*", choices=[a.name for a in AXES], default=[a.name for a in AXES])
    parser.add_argument("--figure", type=Path, help="draw what is known, and measure nothing")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        asked = json.loads(options.case)
        found = one(Size(**asked["size"]), asked["work"])
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    known: dict[str, Any] = json.loads(options.json.read_text()) if options.json.is_file() else {}
    begin = time.monotonic()
    for axis in AXES if not options.figure else ():
        for size in axis.sizes() if axis.name in options.only else ():
            for work in axis.works:
                if key(size, work) in known or time.monotonic() - begin > 60 * options.minutes:
                    continue
                known[key(size, work)] = measured(size, work)
                options.json.parent.mkdir(parents=True, exist_ok=True)
                options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
                print(key(size, work), known[key(size, work)], flush=True)
    missing = sum(
        key(s, w) not in known for a in AXES if a.name in options.only for s in a.sizes() for w in a.works
    )
    print(table(known))
    print(f"{platform.machine()}, {os.cpu_count()} cores, one thread a process; {missing} figures missing")
    if options.figure:
        draw(known, options.figure)


if __name__ == "__main__":
    main()
