"""Does a ledger know what a training without some tokens comes to? Rules x doses x seeds, trained again.

    python bench/what_if.py --out runs/what_if --steps 40 [--base runs/demo/base]

The demo's policy after its warm-up is trained once for every seed, recorded; of each training a ledger is
made, and every rule's what-if with its trainings again (``stepscope ledger RUN --without RULE --retrain``). A
dose of 0.01 of the first rule is trained again, too: it hardly changes a weight, so what it changes is the
scatter of two trainings whose samples have parted. Tables go to standard output, figures to
``what_if.svg``. Run again, it goes on where it was stopped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import pandas as pd

import stepscope as ss
from stepscope.config import LedgerConfig, TrainConfig, WhatIfConfig, build_config
from stepscope.config.loading import read_yaml
from stepscope.pipeline import run_ledger, run_train, run_what_if
from stepscope.pipeline.ledger.retrain import folder_of
from stepscope.results.ledger import LEDGER
from stepscope.results.what_if import AGAIN, HELD, REWEIGHTED, SUMMARY, WHAT_IF

PRESET = Path(ss.__file__).parent / "presets" / "demo.yaml"
RULES = ("quadrant=wrong, rare", "quadrant=right, likely", "kind=digits")
DOSES = (0.25, 0.5, 1.0)
NOTHING = 0.01
"""A dose that changes next to nothing but which tokens are drawn."""


def base_of(out: Path) -> Path:
    """The demo's policy after its warm-up."""
    plain = read_yaml(PRESET) | {"rl": None, "out": str(out / "warmup")}
    run_train(build_config(TrainConfig, plain), resume=True)
    return out / "warmup" / "base"


def made(out: Path, seed: int, base: Path, steps: int, samples: int) -> pd.DataFrame:
    """The curves of all rules on the training of one seed, whatever of it is still to be made."""
    run = out / f"run-{seed}"
    plain = read_yaml(PRESET)
    model = plain["model"] | {"source": str(base.resolve())}
    rl = plain["rl"] | {"record": {"state_every": 10}, "report_to": [], "save_every": plain["rl"]["steps"]}
    if not (run / "record" / "record.json").exists():
        training = plain | {"model": model, "sft": None, "seed": seed, "rl": rl, "out": str(run)}
        run_train(build_config(TrainConfig, training), resume=True)
    if not (run / LEDGER).exists():
        account = {"run": str(run), "stop": steps, "every": 4, "through": ["fixed", "optimizer"]}
        run_ledger(build_config(LedgerConfig, account | {"probe": {"num_prompts": 256}}), resume=True)
    tables = []
    for number, rule in enumerate(RULES):
        doses = [NOTHING, *DOSES] if number == 0 else [*DOSES]
        settings = {"run": str(run), "rule": rule, "doses": doses, "samples": samples, "retrain": True}
        if not (run / WHAT_IF / folder_of(rule) / SUMMARY).exists():
            run_what_if(build_config(WhatIfConfig, settings))
        found = ss.load_ledger(run).what_if[rule]
        entries = {(o.quantity, o.dose): o for o in found.result.outcomes}
        table = found.curves.to_pandas().assign(rule=rule, seed=seed)
        keys = list(zip(table.quantity, table.dose, strict=True))
        firsts = [entries[key].first_order if key in entries else None for key in keys]
        table["entries"] = [np.nan if first is None else first.value for first in firsts]
        table["free"] = [entries[key].through_optimizer if key in entries else np.nan for key in keys]
        for path in (HELD, REWEIGHTED):
            table[f"horizon_{path}"] = [
                entries[key].horizons.get(path, np.nan) if key in entries else np.nan for key in keys
            ]
        tables.append(table)
    return pd.concat(tables, ignore_index=True)


def row(table: pd.DataFrame, quantity: str, rule: str, dose: float, step: int) -> list[str]:
    """Means over seeds at one step, and the scatter of the realised difference."""
    own = table[
        (table.quantity == quantity) & (table.rule == rule) & (table.dose == dose) & (table.step == step)
    ]
    by = {path: own[own.path == path].set_index("seed") for path in (HELD, REWEIGHTED, AGAIN)}
    real = by[AGAIN].difference
    cells = [rule, f"{dose:g}", f"{real.mean():+.4f} ± {real.std(ddof=1):.4f}"]
    if step == table.step.max():
        cells.append(f"{by[HELD].entries.mean():+.4f}, {by[HELD].free.mean():+.4f}")
    for path in (HELD, REWEIGHTED):
        found = by[path]
        reach = found[f"horizon_{path}"]
        off = found.apart.mean() / by[AGAIN].distance.mean()
        cells += [f"{found.difference.mean():+.4f}", f"{reach.min():.0f} to {reach.max():.0f}", f"{off:.2f}"]
    cells.append(f"{by[REWEIGHTED].effective.mean():.2f}")
    return cells


def draw(table: pd.DataFrame, path: Path) -> None:
    """Realised against predicted difference of entropy over steps, a panel for each rule."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(RULES), figsize=(11, 3.4), sharey=True)
    own = table[(table.quantity == "entropy") & (table.dose > 0)]
    for axis, rule in zip(axes, RULES, strict=True):
        for color, dose in zip(("C0", "C1", "C2"), DOSES, strict=True):
            mine = own[(own.rule == rule) & (own.dose == dose)]
            for name, style in ((HELD, ":"), (REWEIGHTED, "-")):
                mean = mine[mine.path == name].groupby("step").difference.mean()
                axis.plot(mean.index, mean, style, color=color, label=f"dose {dose:g}, {name}")
            real = mine[mine.path == AGAIN].groupby("step").difference.agg(["mean", "min", "max"])
            bars = np.abs(real[["min", "max"]].to_numpy().T - real["mean"].to_numpy())
            axis.errorbar(
                real.index,
                real["mean"],
                bars,
                fmt="o",
                ms=3.5,
                lw=1,
                color=color,
                label=f"dose {dose:g}, trained again",
            )
        axis.axhline(0, color="0.6", lw=0.8)
        axis.set_title(f"without {rule}", fontsize=9)
        axis.set_xlabel("optimizer step")
    axes[0].set_ylabel("entropy less what it was (nats/token)")
    axes[0].legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/what_if"))
    parser.add_argument("--base", type=Path, help="the demo's base; its warm-up is trained without one")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--samples", type=int, default=4, help="responses to each probe prompt")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    given = parser.parse_args()
    base = given.base or base_of(given.out)
    found = [made(given.out, seed, base, given.steps, given.samples) for seed in given.seeds]
    table = pd.concat(found, ignore_index=True)
    table.to_parquet(given.out / "what_if.parquet")
    draw(table, given.out / "what_if.svg")
    last = int(table.step.max())
    for quantity in ("entropy", "reward"):
        for step in sorted({last // 4, last // 2, last}):
            print(f"\n{quantity}, step {step}")
            for rule in RULES:
                for dose in (NOTHING, *DOSES) if rule == RULES[0] else DOSES:
                    print("| " + " | ".join(row(table, quantity, rule, dose, step)) + " |")


if __name__ == "__main__":
    main()
