"""Shares of own position, own response, same prompt and other prompts against the length of responses.

    python bench/long_responses.py CHECKPOINT --json FILE [--terms 3 6 9 12] [--prompts 96] [--seed 0]
    python bench/long_responses.py CHECKPOINT --json FILE --difficulty easy hard --prompts 32
    python bench/long_responses.py --over FILE FILE ... [--figure docs/figures/long_responses.svg]

For sums of each number of terms a batch is sampled from the checkpoint, its step is rebuilt, and its kinship
is taken (``stepscope.kinship``), with shares of a batch of 16 prompts. What is measured stays in FILE. The
model of ``stepscope.measure.ledger.kin_model`` is fitted to the shares of one number of terms (``--fit``) and
predicts the others; both are printed. The checkpoint is that of
``stepscope train configs/long_responses.yaml``.

Longer sums are harder too. ``--difficulty`` tells the two apart: of 1,000 prompts that the policy answers 4
times, ``easy`` takes those with 3 or 4 right answers, ``hard`` the others, and the batch is of new responses
to them. ``--over`` takes the files of several trainings together: shares of each cell with their 95 %
t-intervals over trainings, and how the share of the own position goes with length and with reward;
``--figure`` draws them.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import stepscope as ss
from stepscope.intervals import student
from stepscope.measure.ledger.kin_model import Batch, KinModel, fit_kin_model
from stepscope.measure.ledger.kinship import KinOptions
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import sample_responses
from stepscope.results import FloatArray, Rollouts
from stepscope.results.kinship import BATCH, FRESH, KINS, StepKinship
from stepscope.stats import Estimate

OF_PROMPTS = 16
"""Prompts of the batch that shares are of."""

CANDIDATES, TRIES = 1000, 4
"""Prompts that are tried, and how often, to tell easy ones from hard ones."""
RIGHT = {"easy": range(3, TRIES + 1), "hard": range(3)}
"""How many tries have to be right."""

KIN4 = tuple(KINS)[:4]
LOOKS = {BATCH: "the batch's own positions", FRESH: "fresh responses to its prompts"}


def shared(rollouts: Rollouts) -> FloatArray:
    """(position,) share of pairs of responses to one prompt whose first so many tokens are the same."""
    groups: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for prompt, response in zip(rollouts.prompt_token_ids, rollouts.response_token_ids, strict=True):
        groups.setdefault(prompt, []).append(response)
    length = round(float(np.mean(rollouts.num_tokens)))
    same, pairs = np.zeros(length), 0
    for group in groups.values():
        for i, one in enumerate(group):
            for other in group[i + 1 :]:
                depth = next(
                    (k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
                    min(len(one), len(other)),
                )
                same[: depth + 1] += 1
                pairs += 1
    return same / pairs


def left_out(policy: Any, task: Any, difficulty: str, seed: int, budget: Budget) -> frozenset[str]:
    """Questions of the training split that are not as difficult as asked, or were not tried."""
    if difficulty == "all":
        return frozenset()
    tried = ss.sample_rollouts(
        policy, task, num_prompts=CANDIDATES, group_size=TRIES, seed=seed + 2**30, budget=budget
    )
    right = np.bincount(tried.prompt_index, weights=tried.rewards)
    asked = dict(zip(tried.questions, tried.prompt_index, strict=True))
    fit = {question for question, prompt in asked.items() if right[prompt] in RIGHT[difficulty]}
    return frozenset(p.question for p in task.problems("train")) - fit


def measured(
    checkpoint: Path, prompts: int, tokens: int, terms: int, seed: int, difficulty: str
) -> dict[str, Any]:
    """Kinship of one batch of sums of so many terms."""
    begin = time.process_time()
    policy = ss.load_checkpoint(checkpoint)
    task = ss.load_task(f"arithmetic:terms={terms}")
    budget = Budget(max_sequences=64)
    exclude = left_out(policy, task, difficulty, seed, budget)
    update = ss.sample_rollouts(
        policy,
        task,
        num_prompts=prompts,
        group_size=policy.settings.group_size or 8,
        seed=seed,
        options=ss.SamplingOptions(resample=24, exclude=exclude),
        budget=budget,
    )
    step = ss.reconstruct_step(policy, update, budget=budget)
    fresh = sample_responses(policy, update.prompt_token_ids, seed=seed + 2**31, budget=budget)
    found = ss.kinship(
        policy, step, fresh=fresh, prompts=OF_PROMPTS, options=KinOptions(tokens=tokens), budget=budget
    )
    pushing = [bool(np.any(row)) for row in step.token_weights]
    return {
        "terms": terms,
        "seed": seed,
        "difficulty": difficulty,
        "length": float(np.mean(update.num_tokens)),
        "length_sd": float(np.std(update.num_tokens)),
        "entropy": float(np.concatenate(update.entropies).mean()),
        "reward": float(update.rewards.mean()),
        "pushing": float(np.mean(pushing)),
        "group_size": len(update) // update.num_prompts,
        "shared": shared(update).tolist(),
        "kinship": found.to_plain(),
        "seconds": time.process_time() - begin,
    }


def batch_of(row: dict[str, Any], *, fresh: bool) -> Batch:
    """What the model needs to know of a measured batch, at the number of prompts that shares are of."""
    return Batch(np.array(row["shared"]), row["group_size"], OF_PROMPTS, fresh)


def shares_of(row: dict[str, Any], look: str) -> dict[str, Estimate]:
    found = StepKinship.from_plain(row["kinship"], f"{row['terms']} terms")
    return {kin.kin: kin.share for kin in found.kin if kin.look == look}


def fitted(known: list[dict[str, Any]], terms: int, noise: np.random.Generator | None = None) -> KinModel:
    """The model of the shares at both looks of one number of terms.

    With ``noise``, of shares drawn by their errors: each kin but the own position is drawn by itself, and
    that has what is left of 1.
    """
    rows = [row for row in known if row["terms"] == terms]
    if not rows:
        raise SystemExit(f"nothing measured of {terms} terms, to fit to")
    measured_shares = []
    for row in rows:
        for look in LOOKS:
            shares = shares_of(row, look)
            if noise is not None:
                shares = {k: replace(s, value=noise.normal(s.value, s.stderr)) for k, s in shares.items()}
                others = sum(shares[kin].value for kin in KIN4[1:])
                shares[KIN4[0]] = replace(shares[KIN4[0]], value=1 - others)
            measured_shares.append((batch_of(row, fresh=look == FRESH), shares))
    return fit_kin_model(measured_shares)


@dataclass(frozen=True)
class Prediction:
    """The model as fitted, and as it would be fitted to other batches.

    Attributes:
        model: fitted to what was measured.
        others: fitted to shares drawn by their errors.
    """

    model: KinModel
    others: list[KinModel]

    @classmethod
    def of(cls, known: list[dict[str, Any]], terms: int, draws: int = 40) -> Prediction:
        rng = np.random.default_rng(0)
        return cls(fitted(known, terms), [fitted(known, terms, rng) for _ in range(draws)])

    def shares(self, batch: Batch) -> dict[str, tuple[float, float, float]]:
        """Kin to share, and the ends of its 95 % interval by the fit's error."""
        drawn = [model.shares(batch) for model in self.others]
        found = {}
        for kin, value in self.model.shares(batch).items():
            low, high = np.quantile([row[kin] for row in drawn], [0.025, 0.975])
            found[kin] = (value, float(low), float(high))
        return found


def table(known: list[dict[str, Any]], said: Prediction) -> str:
    """Markdown: measured share with its interval, then the model's with that of its fit."""
    lines = [
        f"| where | terms, seed | tokens | {' | '.join(KINS[kin] for kin in KIN4)} | overlap wanted |",
        f"|---|---|---|{'---|' * 5}",
    ]
    rows = sorted(known, key=lambda row: (row["terms"], row["seed"]))
    wanted = [fitted([row], row["terms"]).common for row in rows]
    for look in LOOKS:
        for row, overlap in zip(rows, wanted, strict=True):
            predicted = said.shares(batch_of(row, fresh=look == FRESH))
            cells = [
                f"{s.value:.2f} ({s.low:.2f} to {s.high:.2f}); "
                f"{predicted[kin][0]:.2f} ({predicted[kin][1]:.2f} to {predicted[kin][2]:.2f})"
                for kin, s in shares_of(row, look).items()
            ]
            lines.append(
                f"| {look} | {row['terms']}, {row['seed']} | {row['length']:.1f} | {' | '.join(cells)} "
                f"| {overlap:.3f} |"
            )
    return "\n".join(lines)


def effects(known: list[dict[str, Any]]) -> str:
    """Markdown: what one token does to the entropy of one position, by length and kin."""
    lines = [
        f"| terms, seed | entropy | reward | prefix shared | {' | '.join(KINS[kin] for kin in KIN4)} |",
        f"|---|---|---|---|{'---|' * 4}",
    ]
    for row in sorted(known, key=lambda row: (row["terms"], row["seed"])):
        found = StepKinship.from_plain(row["kinship"], f"{row['terms']} terms")
        each = [
            found.of(BATCH, kin).per_pair.scaled(found.positions[BATCH] * found.num_sequences) for kin in KIN4
        ]
        cells = " | ".join(f"{x.value:.3g} ± {x.stderr:.1g}" for x in each)
        lines.append(
            f"| {row['terms']}, {row['seed']} | {row['entropy']:.4f} | {row['reward']:.2f} "
            f"| {np.mean(row['shared']):.2f} | {cells} |"
        )
    return "\n".join(lines)


def t_interval(x: FloatArray) -> str:
    """Mean and half width of the 95 % t-interval."""
    return f"{x.mean():.3f} ± {student(len(x)) * x.std(ddof=1) / len(x) ** 0.5:.3f}"


def mean_figures(known: list[dict[str, Any]], cell: tuple[int, str]) -> FloatArray:
    """Tokens, reward, entropy, shares at the batch's own positions: the mean of a training's batches."""
    rows = [row for row in known if (row["terms"], row["difficulty"]) == cell]
    return np.mean(
        [
            [row["length"], row["reward"], row["entropy"], *(s.value for s in shares_of(row, BATCH).values())]
            for row in rows
        ],
        0,
    )


def over_trainings(trainings: list[list[dict[str, Any]]]) -> str:
    """Markdown: shares at the batch's own positions over trainings, and what goes with length and reward.

    Batches of one training are averaged. The slopes are those of least squares of the own position's share on
    the logarithm of the length and the reward, over the cells of one training.
    """
    cells = cells_of(trainings)
    lines = [
        f"| terms, prompts | tokens | reward | entropy | {' | '.join(KINS[kin] for kin in KIN4)} |",
        f"|---|---|---|---|{'---|' * 4}",
    ]
    figures = np.array([[mean_figures(known, cell) for cell in cells] for known in trainings])
    for place, (terms, difficulty) in enumerate(cells):
        columns = [t_interval(column) for column in figures[:, place].T]
        lines.append(f"| {terms}, {difficulty} | {' | '.join(columns)} |")
    slopes = []
    for length, reward, _, share, *_ in figures.transpose(0, 2, 1):
        design = np.stack([np.ones_like(length), np.log2(length), reward], axis=1)
        slopes.append(np.linalg.lstsq(design, share, rcond=None)[0])
    _, of_length, of_reward = np.array(slopes).T
    lines.append(
        f"\nown position's share: {t_interval(of_length)} for twice the length at equal reward, "
        f"{t_interval(of_reward)} for all right instead of none at equal length"
    )
    return "\n".join(lines)


def cells_of(trainings: list[list[dict[str, Any]]]) -> list[tuple[int, str]]:
    """Numbers of terms and difficulties that every training has."""
    return sorted(set.intersection(*({(r["terms"], r["difficulty"]) for r in known} for known in trainings)))


def draw(trainings: list[list[dict[str, Any]]], fit: int, path: Path) -> None:
    """Shares against length, with the model's; and the own position's by difficulty.

    Means over trainings with 95 % t-intervals; the model is fitted to each training's sums of ``fit`` terms.
    """
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams |= {"svg.fonttype": "none", "svg.hashsalt": "long_responses", "font.size": 8}
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(7.6, 3.1), sharey=True)
    cells = cells_of(trainings)

    def points(panel: Any, difficulty: str, kin: str, shift: float, colour: str, label: str) -> None:
        at = [cell for cell in cells if cell[1] == difficulty]
        values = np.array(
            [[mean_figures(known, c)[[0, 3 + KIN4.index(kin)]] for c in at] for known in trainings]
        )
        x, y = values.mean(0).T
        half = student(len(values)) * values[..., 1].std(0, ddof=1) / len(values) ** 0.5
        panel.errorbar(x + shift, y, yerr=half, fmt="o", ms=3, lw=0.9, color=colour, label=label)

    predicted = []
    for known in trainings:
        plain = sorted((r for r in known if r["difficulty"] == "all"), key=lambda row: row["length"])
        model = fitted(plain, fit)
        shares = [model.shares(batch_of(row, fresh=False)) for row in plain]
        predicted.append(
            [[row["length"], *(s[k] for k in KIN4)] for row, s in zip(plain, shares, strict=True)]
        )
    at, *lines = np.mean(predicted, 0).T
    colours = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    for place, (kin, line, colour) in enumerate(zip(KIN4, lines, colours, strict=True)):
        left.plot(at, line, "--", lw=1, color=colour)
        points(left, "all", kin, 0.8 * (place - 1.5), colour, KINS[kin])
    for place, (difficulty, colour) in enumerate({"easy": "#009e73", "hard": "#d55e00"}.items()):
        points(right, difficulty, KIN4[0], 1.6 * (place - 0.5), colour, f"{difficulty} prompts")
    titles = ("all prompts; dashed: the model", "its own position, by difficulty")
    for panel, title in zip((left, right), titles, strict=True):
        panel.axhline(0, lw=0.5, color="#888888")
        panel.set_title(title, fontsize=8)
        panel.set_xlabel("response tokens")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=7)
    left.set_ylabel(f"share, batch of {OF_PROMPTS} prompts")
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--json", type=Path, help="what is measured, and where more goes")
    parser.add_argument("--terms", type=int, nargs="+", default=[3, 6, 9, 12])
    parser.add_argument("--prompts", type=int, default=96, help="of each batch")
    parser.add_argument("--tokens", type=int, default=1024, help="looked at for their own position")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fit", type=int, default=3, help="number of terms that the model is fitted to")
    parser.add_argument(
        "--difficulty", choices=["all", *RIGHT], nargs="+", default=["all"], help="of the prompts"
    )
    parser.add_argument("--over", type=Path, nargs="+", help="files of several trainings; measures nothing")
    parser.add_argument("--figure", type=Path, help="of --over")
    options = parser.parse_args()
    if options.over:
        trainings = [json.loads(file.read_text()) for file in options.over]
        print(over_trainings(trainings))
        if options.figure:
            draw(trainings, options.fit, options.figure)
        return
    if not (options.checkpoint and options.json):
        parser.error("a checkpoint and --json, or --over")
    known: list[dict[str, Any]] = json.loads(options.json.read_text()) if options.json.is_file() else []
    cells = [(terms, options.seed, d) for terms in options.terms for d in options.difficulty]
    for cell in cells:
        if any((row["terms"], row["seed"], row["difficulty"]) == cell for row in known):
            continue
        row = measured(options.checkpoint, options.prompts, options.tokens, *cell)
        known.append(row)
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(known, indent=1) + "\n", encoding="utf-8")
        print({k: v for k, v in row.items() if k not in ("kinship", "shared")}, flush=True)
        for kin in row["kinship"]["kin"]:
            share = kin["share"]
            print(kin["look"], kin["kin"], *(f"{share[k]:.3f}" for k in ("value", "low", "high")), flush=True)
    known = [row for row in known if row["difficulty"] == "all"]
    if not known:
        return
    said = Prediction.of(known, options.fit)
    print(table(known, said))
    print(effects(known))
    model = said.model
    print(f"common {model.common:.3f}, prompt {model.prompt:.3f}, memory {model.memory:.3f}")


if __name__ == "__main__":
    main()
