"""Which objective holds entropy up, and what does it cost? Trainings from one warm-up, several seeds each.

    python bench/objectives.py --out runs/objectives

The warm-up is trained once; from it start ``seeds`` trainings of every objective, and each checkpoint is
evaluated on the same held-out prompts. ``curves.parquet`` has a row per objective, seed and checkpoint,
``objectives.html`` the curves, and a table of the last checkpoints goes to standard output; with probes in
the trainings (``-- "rl.probe={every: 6}"``) also what they predicted of each step against what it did. Run
again, it goes on where it was stopped.

``--base FOLDER`` starts from a policy that is there already, such as ``runs/demo/base``, in place of the
warm-up. Objectives differ in where they lead, so a second table says how far pass@1 of the last checkpoint is
above that of ``dr_grpo`` of the same seed at the same entropy, between its own checkpoints.

Intervals are 95 % t-intervals over seeds: they say how far another seed would have led, on these prompts and
from this warm-up. The clustered error of each evaluation is in the table of curves.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import plotly.graph_objects as go
import pyarrow as pa
import pyarrow.parquet as pq
from plotly.subplots import make_subplots
from scipy.stats import linregress, t

from stepscope.config import EvalConfig, TrainConfig, build_config, load_config
from stepscope.pipeline import run_eval, run_train
from stepscope.report.style import look
from stepscope.results import FloatArray, read_table, write_table

CONFIG = Path(__file__).parents[1] / "configs" / "objectives.yaml"
OBJECTIVES = {
    "dr_grpo": [],
    "grpo": ["rl.loss_type=grpo", "rl.scale_rewards=group"],
    "clip_higher": ["rl.epsilon_high=0.4"],
    "clip_cov": ["rl.objective={name: clip_cov, fraction: 0.01, low: 0.3}"],
    "kl_cov": ["rl.objective={name: kl_cov, fraction: 0.02}"],
    "entropy_bonus": ["rl.objective={name: entropy_bonus, coefficient: 0.01}"],
    "adaptive_bonus": ["rl.objective={name: entropy_bonus, coefficient: 0.0, target: 0.06, delta: 0.002}"],
    "steer": ["rl.objective={name: steer}"],
    "top_entropy": ["rl.objective={name: top_entropy}"],
    "reweighting": ["rl.objective={name: reweighting}"],
    "discriminator": ["rl.objective={name: discriminator}"],
    "influence": ["rl.objective={name: influence, fraction: 0.002}"],
    "influence_priced": ["rl.objective={name: influence, fraction: 0.02, price: 1.0}"],
    "frontier": ["rl.objective={name: frontier, max_loss: 3.0e-4}"],
}
"""Changes to the shared configuration, by name."""

FIGURES = {"entropy_per_token": "entropy (nats/token)", "pass_at_1": "pass@1"}


def train_and_evaluate(
    name: str, seed: int, base: Path, out: Path, size: tuple[int, int], changes: Sequence[str]
) -> pa.Table:
    """The evaluation of one training, whatever of it is still to be done."""
    run = out / name / f"seed-{seed}"
    table = run / "eval.parquet"
    if not table.exists():
        start = [f"model.source={base}", "sft=null", f"seed={seed}", f"out={run}"]
        run_train(load_config(TrainConfig, CONFIG, [*OBJECTIVES[name], *changes, *start]), resume=True)
        prompts, samples = size
        evaluation = {"num_prompts": prompts, "samples_per_prompt": samples, "ks": [1, samples]}
        run_eval(build_config(EvalConfig, {"source": str(run), **evaluation}))
    return read_table(table)


def interval(values: FloatArray) -> tuple[float, float]:
    """Mean over seeds and half width of its 95 % t-interval; nan with one seed."""
    count = len(values)
    half = t.ppf(0.975, count - 1) * values.std(ddof=1) / np.sqrt(count) if count > 1 else np.nan
    return float(values.mean()), float(half)


def curve(table: pa.Table, name: str, figure: str) -> list[tuple[int, float, float]]:
    """(step, mean, half width) of one objective."""
    rows = [row for row in table.to_pylist() if row["objective"] == name]
    steps = sorted({row["step"] for row in rows})
    return [(step, *interval(np.array([r[figure] for r in rows if r["step"] == step]))) for step in steps]


def draw(table: pa.Table, path: Path) -> None:
    """Both figures against the step, and one against the other."""
    titles = [*FIGURES.values(), "pass@1 against entropy"]
    page = make_subplots(rows=1, cols=3, subplot_titles=titles)
    for number, name in enumerate(OBJECTIVES):
        colour = f"hsl({360 * number / len(OBJECTIVES):.0f}, 70%, 45%)"
        _, symbol, dash = look(number)
        style = {"line_color": colour, "line_dash": dash, "marker_symbol": symbol, "mode": "lines+markers"}
        curves = {figure: curve(table, name, figure) for figure in FIGURES}
        for column, points in enumerate(curves.values(), 1):
            if points:
                steps, means, halves = zip(*points, strict=True)
                bars = {"type": "data", "array": np.nan_to_num(halves)}
                trace = go.Scatter(x=steps, y=means, error_y=bars, name=name, legendgroup=name)
                page.add_trace(trace.update(**style, showlegend=column == 1), row=1, col=column)
        entropies, solved = ([mean for _, mean, _ in points] for points in curves.values())
        trace = go.Scatter(x=entropies, y=solved, name=name, legendgroup=name, showlegend=False)
        page.add_trace(trace.update(**style), row=1, col=3)
    page.update_xaxes(title_text="optimizer step", col=1).update_xaxes(title_text="optimizer step", col=2)
    page.update_xaxes(title_text=FIGURES["entropy_per_token"], col=3)
    page.update_layout(title="Objectives from one warm-up: mean and 95 % t-interval over seeds", height=620)
    page.write_html(path, include_plotlyjs=True)


def last_checkpoints(table: pa.Table) -> str:
    """Markdown table of the last checkpoint of every objective."""
    lines = ["| objective | " + " | ".join(FIGURES.values()) + " | seeds |", "|---|---|---|---|"]
    for name in dict.fromkeys(table.column("objective").to_pylist()):
        cells = []
        for figure in FIGURES:
            _, mean, half = curve(table, name, figure)[-1]
            cells.append(f"{mean:.3f} ± {half:.3f}")
        seeds = {r["seed"] for r in table.to_pylist() if r["objective"] == name}
        lines.append(f"| {name} | {' | '.join(cells)} | {len(seeds)} |")
    return "\n".join(lines)


def at_equal_entropy(table: pa.Table, reference: str) -> str:
    """Markdown table: pass@1 of the last checkpoint less that of the reference at the same entropy, by seed.

    The reference is interpolated between its checkpoints; an entropy that it did not pass through has
    no comparison.
    """
    rows = table.to_pylist()
    curves = {
        seed: sorted(
            (r["entropy_per_token"], r["pass_at_1"])
            for r in rows
            if r["objective"] == reference and r["seed"] == seed
        )
        for seed in {r["seed"] for r in rows}
    }
    lines = [
        f"| objective | entropy | pass@1 above {reference} at the same entropy | seeds |",
        "|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["objective"] for r in rows if r["objective"] != reference):
        own = [r for r in rows if r["objective"] == name]
        last = [r for r in own if r["step"] == max(r["step"] for r in own)]
        apart = []
        for row in last:
            entropies, solved = zip(*curves[row["seed"]], strict=True) if curves[row["seed"]] else ((), ())
            if entropies and entropies[0] <= row["entropy_per_token"] <= entropies[-1]:
                apart.append(row["pass_at_1"] - np.interp(row["entropy_per_token"], entropies, solved))
        entropy, _ = interval(np.array([row["entropy_per_token"] for row in last]))
        gain = "{:.3f} ± {:.3f}".format(*interval(np.array(apart))) if apart else "beyond its range"
        lines.append(f"| {name} | {entropy:.4f} | {gain} | {len(apart)} of {len(last)} |")
    return "\n".join(lines)


def predicted_and_realised(out: Path) -> str:
    """Markdown table: the probed steps of every objective, realised against predicted entropy change."""
    lines = ["| objective | probed steps | correlation | slope | intercept | rms difference / rms change |"]
    lines.append("|---|---|---|---|---|---|")
    pooled: list[FloatArray] = []
    for name in [*OBJECTIVES, "all"]:
        tables = [read_table(path) for path in sorted(out.glob(f"{name}/seed-*/probes.parquet"))]
        own = [np.array([t.column("predicted").to_numpy(), t.column("realised").to_numpy()]) for t in tables]
        pooled += own
        if not (chosen := pooled if name == "all" else own):
            continue
        predicted, realised = np.concatenate(chosen, axis=1)
        fit = linregress(predicted, realised)
        off = np.sqrt(((realised - predicted) ** 2).mean() / (realised**2).mean())
        slope = f"{fit.slope:.3f} ± {fit.stderr:.3f}"
        cells = [str(len(predicted)), f"{fit.rvalue:.4f}", slope, f"{fit.intercept:.1e}", f"{off:.3f}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/objectives"))
    parser.add_argument("--only", nargs="+", choices=list(OBJECTIVES), default=list(OBJECTIVES))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--prompts", type=int, default=128, help="held-out prompts of an evaluation")
    parser.add_argument("--samples", type=int, default=8, help="responses to each of them")
    parser.add_argument("--base", type=Path, help="a policy to start from in place of the warm-up")
    parser.add_argument("changes", nargs="*", help="section.field=value of every training, after `--`")
    given = parser.parse_args()
    base = given.base or given.out / "warmup" / "base"
    if given.base is None:
        warmup = given.out / "warmup"
        run_train(load_config(TrainConfig, CONFIG, [*given.changes, "rl=null", f"out={warmup}"]), resume=True)
    tables = []
    for seed in given.seeds:
        for name in given.only:
            size = (given.prompts, given.samples)
            found = train_and_evaluate(name, seed, base, given.out, size, given.changes)
            marks = {"objective": [name] * len(found), "seed": [seed] * len(found)}
            kept = [c for f in FIGURES for c in (f, f"{f}_stderr")]
            columns = {c: found.column(c) for c in ("step", *kept)}
            tables.append(pa.table({**marks, **columns}))
            everything = pa.concat_tables(tables)
            write_table(everything, given.out / "curves.parquet")
            draw(everything, given.out / "objectives.html")
    print(last_checkpoints(pq.read_table(given.out / "curves.parquet")))
    if "dr_grpo" in given.only:
        print(at_equal_entropy(pq.read_table(given.out / "curves.parquet"), "dr_grpo"))
    if any(given.out.glob("*/seed-*/probes.parquet")):
        print(predicted_and_realised(given.out))


if __name__ == "__main__":
    main()
