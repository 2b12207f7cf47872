"""The influence of every update sequence against evaluating each sequence's own step on every probe sequence.

    python bench/influence_table.py CHECKPOINT --measurement DIR [--update 512] [--probe 2048]

Times, on the batches of a measurement: the whole influence table (sequences with their errors, and tokens),
and the entropy after single-sequence steps, one probe sequence at a time and in batches. Both are scaled to
the size asked for: the table by its passes over either batch, the evaluations by their number.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from estimators import read, timed
from stepscope.measure.influence.attribution import InfluenceOptions, influence
from stepscope.measure.quantity.base import make_quantity
from stepscope.measure.quantity.values import values_at
from stepscope.measure.step.reconstruct import reconstruct_step, sequence_direction
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.passes import Budget
from stepscope.results import Rollouts


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--measurement", type=Path, required=True, help="folder of `stepscope measure`")
    parser.add_argument("--update", type=int, default=512, help="sequences of the update to scale to")
    parser.add_argument("--probe", type=int, default=2048, help="sequences of the probe to scale to")
    parser.add_argument("--directions", type=int, default=2, help="single-sequence steps that are timed")
    parser.add_argument("--singles", type=int, default=16, help="probe sequences timed one at a time")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a micro-batch")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    policy = load_checkpoint(options.checkpoint)
    update, probe = (read(options.measurement, name) for name in ("update", "probe"))
    step = reconstruct_step(policy, update)
    size = {"budget": Budget(max_sequences=options.batch)}

    def table(u: Rollouts, p: Rollouts) -> float:
        own = reconstruct_step(policy, u, **size)
        return timed(
            lambda: influence(policy, own, u, p, options=InfluenceOptions(baseline="position"), **size)
        )[1]

    half_u, half_p = range(len(update) // 2), range(len(probe) // 2)
    table(update.select(half_u), probe.select(half_p))
    whole = table(update, probe)
    per_update = (whole - table(update.select(half_u), probe)) / (len(update) - len(half_u))
    per_probe = (whole - table(update, probe.select(half_p))) / (len(probe) - len(half_p))
    fixed = whole - per_update * len(update) - per_probe * len(probe)
    ours = max(fixed, 0.0) + per_update * options.update + per_probe * options.probe

    quantity = make_quantity("entropy", probe)
    few = probe.select(range(options.singles))
    chosen = np.linspace(0, len(update) - 1, options.directions).astype(int)
    batched, single = [], []
    for i in chosen:
        direction = sequence_direction(policy, step, int(i))
        batched.append(
            timed(lambda d=direction: values_at(policy, probe, (quantity,), d, step.lr, **size))[1]
        )
        rows = [few.select([k]) for k in range(len(few))]
        single.append(
            timed(
                lambda d=direction, rows=rows: [
                    values_at(policy, row, (make_quantity("entropy", row),), d, step.lr) for row in rows
                ]
            )[1]
        )
    evaluations = options.update * options.probe
    in_batches = float(np.median(batched)) / len(probe) * evaluations
    one_by_one = float(np.median(single)) / len(few) * evaluations
    found = {
        "measured": {"update": len(update), "probe": len(probe), "seconds": whole},
        "scaled_to": {"update": options.update, "probe": options.probe},
        "table_seconds": ours,
        "evaluations_in_batches_seconds": in_batches,
        "evaluations_one_by_one_seconds": one_by_one,
        "factor_in_batches": in_batches / ours,
        "factor_one_by_one": one_by_one / ours,
    }
    print(json.dumps(found, indent=1))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
