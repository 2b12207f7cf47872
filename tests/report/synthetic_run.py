"""A whole run folder drawn with numpy: the shapes, sizes and odd values of a real one, in no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

HOSTILE = "<script>document.title='owned'</script>"
OWN_LR = 1e-4


def estimate(
    value: float, stderr: float, n: int, unit: str, method: str, *, reliable: bool = True, reason: str = ""
) -> dict[str, Any]:
    return {
        "value": value,
        "stderr": stderr,
        "n": n,
        "unit": unit,
        "method": method,
        "reliable": reliable,
        "reason": reason,
    }


def series(rng: np.random.Generator, quantity: str, normalisation: str, version: str, slope: float) -> dict:
    unit = "nats/token" if normalisation == "per_token" else "nats/sequence"
    points = []
    for lr in [*np.geomspace(1e-07, 0.001, 9).tolist(), OWN_LR]:
        linear = slope * lr
        true = linear * (1 + 60 * lr + 0.02 * rng.standard_normal()) + 2e-8 * rng.standard_normal()
        ess = 64 * np.exp(-3e6 * lr**2)
        trusted = ess > 16
        points.append(
            {
                "lr": lr,
                "true": estimate(
                    true,
                    abs(0.12 * true) + 3e-8,
                    64,
                    unit,
                    "per-decision importance weights, control variate, clustered by prompt",
                    reliable=bool(trusted),
                    reason="" if trusted else "effective sample size 3.2 of 64, below 16",
                ),
                "linear": estimate(
                    linear,
                    abs(0.13 * linear),
                    64,
                    unit,
                    "first order, on-policy gradient form, critic baseline",
                ),
                "second_order": estimate(55 * lr * linear, abs(8 * lr * linear), 64, unit, "second order"),
                "excess": estimate(true - linear, abs(0.02 * true) + 2e-8, 64, unit, "paired difference"),
                "odd": None,
                "effective_sample_size": float(ess),
                "pareto_k": 0.31 if trusted else float("nan"),
            }
        )
    points.sort(key=lambda point: point["lr"])
    return {
        "quantity": quantity,
        "normalisation": normalisation,
        "version": version,
        "lr": OWN_LR,
        "points": points,
        "fit": {"slope": 1.004, "intercept": 2.1, "r2": 0.9994, "n": 8, "lrs": [1e-7], "slope_stderr": 0.004},
        "value": estimate(0.412, 0.018, 64, unit, "mean over the probe batch"),
        "slope": estimate(slope, abs(0.13 * slope), 64, f"{unit}/lr", "first order"),
        "curvature": None,
        "baseline": "ridge",
        "round_off": 3e-9,
        "measurable_from": 3e-9 / abs(slope) * 10,
        "linear_up_to": 1.8e-3,
        "estimator": "per_decision",
    }


def rollouts(
    rng: np.random.Generator, num_prompts: int, group_size: int, split: str, *, weights: bool
) -> tuple[dict[str, list], dict[str, list]]:
    sequences: dict[str, list] = {
        name: []
        for name in [
            "sequence_id",
            "prompt_id",
            "prompt",
            "response",
            "prompt_token_ids",
            "response_token_ids",
            "reward",
            "correct",
            "advantage",
            "num_tokens",
            "logprob",
            "entropy_mean",
            "truncated",
        ]
    }
    names = ["sequence_id", "position", "token_id", "token", "logprob", "entropy"]
    tokens: dict[str, list] = {name: [] for name in names + (["token_weight"] if weights else [])}
    for index in range(num_prompts * group_size):
        left, right = (int(v) for v in rng.integers(10, 99, 2))
        correct = bool(rng.random() < 0.6)
        answer = left + right if correct else left + right + int(rng.integers(1, 9))
        text = ["<think>", f"{left}", " +", f" {right}", " =", f" {answer}", "\n", "</think>", "<answer>"]
        text += [*list(str(answer)), "</answer>", "<eos>"]
        if index < group_size:
            text[6] = HOSTILE
        truncated = bool(rng.random() < 0.04)
        if truncated:
            text = text[:6]
        entropies = rng.gamma(0.35, 0.6, len(text))
        logprobs = -rng.gamma(0.25, 0.9, len(text))
        advantage = float(correct) - 0.6
        sequences["sequence_id"].append(index)
        sequences["prompt_id"].append(f"arithmetic/{split}/{index // group_size}")
        sequences["prompt"].append(f"What is {left} + {right}? Think, then answer.")
        sequences["response"].append("".join(text[:-1]))
        sequences["prompt_token_ids"].append(list(range(12)))
        sequences["response_token_ids"].append(list(range(len(text))))
        sequences["reward"].append(float(correct))
        sequences["correct"].append(correct)
        sequences["advantage"].append(advantage if weights else None)
        sequences["num_tokens"].append(len(text))
        sequences["logprob"].append(float(logprobs.sum()))
        sequences["entropy_mean"].append(float(entropies.mean()))
        sequences["truncated"].append(truncated)
        for position, token in enumerate(text):
            tokens["sequence_id"].append(index)
            tokens["position"].append(position)
            tokens["token_id"].append(position)
            tokens["token"].append(token)
            tokens["logprob"].append(float(logprobs[position]))
            tokens["entropy"].append(float(entropies[position]))
            if weights:
                tokens["token_weight"].append(advantage / len(text))
    return sequences, tokens


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_measurement(folder: Path, *, step: int, seed: int) -> Path:
    """Fill ``folder`` with every artifact of DESIGN 5.3 but the report."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True)
    update, update_tokens = rollouts(rng, 16, 8, "train", weights=True)
    probe, probe_tokens = rollouts(rng, 64, 1, "train", weights=False)
    pq.write_table(pa.table(update), folder / "update.parquet")
    pq.write_table(pa.table(probe), folder / "probe.parquet")
    pq.write_table(pa.table(update_tokens), folder / "update_tokens.parquet")
    pq.write_table(pa.table(probe_tokens), folder / "probe_tokens.parquet")

    primary = series(rng, "entropy", "per_token", "on_policy", -31.0)
    others = [
        series(rng, "entropy", "per_token", "fixed_prefix", -24.0),
        series(rng, "entropy", "per_seq", "on_policy", -390.0),
        series(rng, "reward", "per_seq", "on_policy", 55.0),
    ]
    write_json(folder / "change.json", {**primary, "others": others})
    write_json(
        folder / "step.json",
        {
            "lr": OWN_LR,
            "norm_momentum": 41.2,
            "norm_decay": 0.31,
            "norm_sequences": 22.4,
            "norm_direction": 52.9,
            "num_parameters": 118_784,
            "num_sequences": 128,
            "num_prompts": 16,
            "num_tokens": 1694,
            "grad_norm": 1.71,
            "clip_coefficient": 0.585,
            "share_momentum": 0.703,
            "share_decay": -0.002,
            "share_sequences": 0.299,
            "lifetime": {
                "step": 21,
                "effect": {"1": 1.0, "10": 6.2, "40": 9.3},
                "share": 0.299,
                "white_noise_share": 0.192,
                "constant_share": 0.112,
                "relative_share": 1.56,
            },
        },
    )
    token_influence = rng.standard_t(1.6, len(update_tokens["position"])) * 0.05 - 0.01
    sums = np.zeros(len(update["sequence_id"]))
    np.add.at(sums, update_tokens["sequence_id"], token_influence)
    errors = np.abs(sums) * 0.2 + 0.02
    ids: list[int | None] = [*update["sequence_id"], None, None]
    pq.write_table(
        pa.table(
            {
                "component": ["sequence"] * len(sums) + ["momentum", "decay"],
                "sequence_id": pa.array(ids, type=pa.int64()),
                "quantity": ["entropy"] * len(ids),
                "through": ["fixed"] * len(ids),
                "influence": [*sums.tolist(), -18.0, 0.04],
                "stderr": [*errors.tolist(), 2.5, 0.01],
                "low": [*(sums - 2 * errors).tolist(), -23.0, 0.02],
                "high": [*(sums + 2 * errors).tolist(), -13.0, 0.06],
            }
        ),
        folder / "influence_sequences.parquet",
    )
    pq.write_table(
        pa.table(
            {
                "sequence_id": update_tokens["sequence_id"],
                "position": update_tokens["position"],
                "quantity": ["entropy"] * len(token_influence),
                "through": ["optimizer"] * len(token_influence),
                "influence": token_influence.tolist(),
                "stderr": (0.3 * np.abs(token_influence) + 0.01).tolist(),
                "shrunk": (0.8 * token_influence).tolist(),
            }
        ),
        folder / "influence_tokens.parquet",
    )
    write_json(folder / "reliability.json", reliability())
    write_json(folder / "validation.json", {"zeroed": validation(rng)})
    write_criteria(folder, rng, update_tokens["sequence_id"], update_tokens["position"])
    write_kernel(folder, rng)
    write_json(
        folder / "noise.json",
        {
            "noise_scale": noise_scale(212.0, 61.0)["prompts"],
            "sgd": noise_scale(212.0, 61.0),
            "preconditioned": noise_scale(480.0, 390.0, reason="|G|^2 is 0.9 standard errors from zero"),
            "effects": {"entropy_per_token": noise_scale(None, None, reason="effect not resolved")},
        },
    )
    point = next(p for p in primary["points"] if p["lr"] == OWN_LR)
    summary = {
        "entropy_per_token": primary["value"],
        "entropy_per_seq": estimate(5.31, 0.22, 64, "nats", "mean over the probe batch"),
        "mean_reward": estimate(
            0.61, 0.043, 16, "reward", "mean over probe responses, error clustered by prompt"
        ),
        "change_linear_per_token": point["linear"],
        "change_true_per_token": point["true"],
        "change_true_reward_per_seq": others[2]["points"][0]["true"],
        "linearity_slope": estimate(1.004, 0.006, 8, "1", "least squares on log-log axes"),
        "linearity_r2": estimate(0.9994, float("nan"), 8, "1", "least squares on log-log axes"),
        "share_momentum": estimate(
            0.703, float("nan"), 16, "share of the step", "exact for this update batch"
        ),
        "share_decay": estimate(-0.002, float("nan"), 16, "share of the step", "exact for this update batch"),
        "share_sequences": estimate(
            0.299, float("nan"), 16, "share of the step", "exact for this update batch"
        ),
        "wall_seconds": estimate(48.2, 0.0, 1, "s", "clock"),
    }
    write_json(folder / "summary.json", summary)
    write_json(
        folder / "provenance.json",
        {
            "verb": "measure",
            "wall_seconds": 61.2,
            "versions": {"stepscope": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "trl": "1.16.0"},
            "python": "3.11.9",
            "platform": "Linux x86_64",
            "checkpoint": f"runs/demo/checkpoints/step-{step}",
            "checkpoint_digest": "sha256:9f2c7a1e5b",
            "seeds": {"update": 0, "probe": 1},
            "stages": {"rollouts": {"seconds": 3.1, "files": {"update.parquet": 9123}}},
            "command": f"stepscope measure runs/demo/checkpoints/step-{step} --task arithmetic",
            "started": "2026-11-21T12:00:00Z",
        },
    )
    (folder / "config.yaml").write_text(
        f"checkpoint: runs/demo/checkpoints/step-{step}\ntask: arithmetic\nprecision: float32\nseed: 0\n"
        "update:\n  num_prompts: 16\n  group_size: 8\nprobe:\n  num_prompts: 64\n"
    )
    return folder


def write_criteria(folder: Path, rng: np.random.Generator, ids: list[int], positions: list[int]) -> None:
    rows, names = [], {"disc_v": "literature", "cov_batch": "literature", "logp": "control"}
    for truth, preconditioner, version in (
        ("column", "adamw", "on_policy"),
        ("column", "sgd", "on_policy"),
        ("row", "adamw", "fixed_prefix"),
    ):
        for name, kind in names.items():
            figures = {
                key: estimate(rng.uniform(-1, 1), 0.05, 16, "correlation", "bootstrap over prompts")
                for key in ("spearman", "kendall", "pearson", "auc", "sign_agreement", "gain_over_control")
            }
            control = kind == "control"
            rows.append(
                {
                    "criterion": name,
                    "level": "token",
                    "kind": kind,
                    "target": "signed",
                    "quantity": "entropy",
                    "truth": truth,
                    "preconditioner": preconditioner,
                    "version": version,
                    **figures,
                    "captured": {"0.01": estimate(0.2, 0.01, 16, "share of the total", "top 1 %")},
                    "best_control": None if control else "logp",
                    "gain_over_control": None if control else figures["gain_over_control"],
                }
            )
    about = {"formula": "A p (l + H)", "paper": HOSTILE, "equation": "(1)", "sign": "+", "verified": False}
    write_json(
        folder / "criteria.json",
        {
            "rows": rows,
            "shares": ["0.01"],
            "definitions": dict.fromkeys(names, about),
            "properties": [
                {
                    "outcome": "influence",
                    "level": "token",
                    "coefficients": {"entropy": estimate(1.2, 0.4, 16, "1/lr", "least squares")},
                    "standardised": {"entropy": estimate(0.3, 0.1, 16, "1", "least squares")},
                    "left_out": {},
                    "r2": 0.21,
                    "num_items": len(ids),
                }
            ],
        },
    )
    change = estimate(-1e-4, 1e-5, 16, "nats/token", "per-decision importance weights")
    points = [
        {
            "rule": rule,
            "share": share,
            "num_dropped": round(share * len(ids)),
            "entropy_kept": estimate(share * 1e-3, 1e-5, 16, "nats/token", "paired"),
            "reward_given_up": estimate(share * 1e-2, 1e-3, 16, "reward", "paired"),
        }
        for rule in ("influence", "random")
        for share in (0.02, 0.1)
    ]
    write_json(
        folder / "pareto.json",
        {"lr": OWN_LR, "full_entropy_change": change, "full_reward_change": change, "points": points},
    )
    columns = {name: rng.normal(size=len(ids)) for name in names}
    pq.write_table(
        pa.table({"sequence_id": ids, "position": positions, **columns}), folder / "criteria_tokens.parquet"
    )


def reliability() -> dict[str, Any]:
    def ranking(level: str, whole: float, needed: float) -> dict[str, Any]:
        return {
            "quantity": "entropy",
            "through": "optimizer",
            "level": level,
            "num_items": 100,
            "num_prompts": 64,
            "target": 0.9,
            "halves": estimate(whole / (2 - whole), 0.05, 8, "correlation", "halves"),
            "whole": estimate(whole, 0.04, 8, "correlation", "stepped up"),
            "needed": estimate(needed, 40.0, 8, "probe prompts", "Spearman-Brown"),
            "curve": [
                {"prompts": 64 * k, "correlation": k * whole / (1 + (k - 1) * whole), "stderr": 0.04}
                for k in (1, 2, 4)
            ],
            "top": {"0.01": estimate(0.41, 0.1, 8, "share of the set", "overlap")},
        }

    gain = estimate(2.1, 0.4, 8, "times fewer probe prompts", "against the other half")
    return {
        "rankings": [ranking("token", 0.75, 192.0), ranking("sequence", 0.5, 576.0)],
        "shrunk": [{"quantity": "entropy", "through": "optimizer", "kept": 0.2, "gain": gain}],
    }


def validation(rng: np.random.Generator) -> dict[str, Any]:
    correlation = estimate(0.994, 0.003, 24, "correlation", "Spearman, zeroed")
    predicted = rng.normal(size=24) * 1e-4
    true = predicted + 1e-6 * rng.normal(size=24)
    points = {"true": true.tolist(), "predicted": predicted.tolist()}
    return {
        "quantity": "entropy",
        "removal": "zeroed",
        "through": "fixed",
        "lr": OWN_LR,
        "lds": correlation,
        "leave_one_out": correlation,
        "lds_across": estimate(0.57, 0.08, 8, "correlation", "Spearman, across halves"),
        "leave_one_out_across": estimate(0.59, 0.09, 8, "correlation", "Pearson, across halves"),
        **{f"{sort}_{name}": values for sort in ("subset", "single") for name, values in points.items()},
    }


def noise_scale(value: float | None, stderr: float | None, *, reason: str = "") -> dict[str, Any]:
    def prompts(factor: int, unit: str) -> dict[str, Any]:
        return {
            **estimate(0.0, 0.0, 16, unit, "group gradients", reliable=not reason, reason=reason),
            "value": None if value is None else factor * value,
            "stderr": None if stderr is None else factor * stderr,
            "low": 131.0 * factor,
            "high": None if value is None else 343.0 * factor,
        }

    return {
        "signal": estimate(0.002, 0.0005, 16, "1", "group gradients"),
        "noise": estimate(0.42, 0.05, 16, "1", "group gradients"),
        "within_prompts": estimate(0.36, 0.04, 16, "1", "group gradients"),
        "between_prompts": estimate(0.06, 0.03, 16, "1", "group gradients"),
        "prompts": prompts(1, "prompts"),
        "sequences": prompts(8, "sequences"),
        "at_least": 131.0,
        "share_of_noise": 0.93,
    }


def write_kernel(folder: Path, rng: np.random.Generator) -> None:
    """The cosine kernel of random vectors that share a part with their prompt."""
    num_prompts, group_size = 16, 8
    count = num_prompts * group_size
    prompts = np.repeat(np.arange(num_prompts), group_size)
    vectors = rng.standard_normal((num_prompts, 400))[prompts] + 1.5 * rng.standard_normal((count, 400))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    cosine = vectors @ vectors.T
    spectrum = np.linalg.eigvalsh(cosine)[::-1].tolist()
    same = prompts[:, None] == prompts[None, :]

    def mean(mask: np.ndarray) -> dict[str, Any]:
        value = estimate(float(cosine[mask].mean()), 0.004, num_prompts, "cosine", "mean over pairs")
        return {"mean": value, "count": int(mask.sum()), "std": 0.1}

    share = "share of the mean diagonal"
    report = {
        "diagonal": {"mean": estimate(1.0, 0.0, num_prompts, "cosine", "mean"), "count": count, "std": 0.0},
        "same_prompt": mean(same & ~np.eye(count, dtype=bool)),
        "different_prompts": mean(~same),
        "components": {
            name: estimate(value, 0.01, num_prompts, share, "pair means")
            for name, value in (("common", 0.001), ("prompt", 0.3), ("own", 0.699))
        },
        "effective_rank": estimate(61.2, 2.3, num_prompts, "directions", "exp of the spectral entropy"),
        "spectrum": spectrum,
        "null_spectrum": np.linspace(2.1, 0.2, count).tolist(),
        "null_effective_rank": 110.0,
        "rank_deficit": estimate(48.8, 3.1, num_prompts, "directions", "random signs minus measured"),
        "distinct": count,
        "participation_ratio": 40.0,
        "top_shares": {"1": 0.05},
        "shared_prefix": [
            {"shared_from": low, "shared_to": high, "mean": value, "count": 30}
            for low, high, value in ((0, 0, 0.22), (1, 1, 0.28), (2, 3, 0.36))
        ],
    }
    zero = {"mean": estimate(0.01, 0.02, count, "nats^2", "mean over pairs"), "z": 0.5, "p": 0.6}
    checks = {"off_diagonal": zero, "same_prompt": zero}
    kernels = ("contributions", "raw", "preconditioned")
    matrices = {f"update_{name}_cosine": cosine for name in kernels}
    save_file({**matrices, "probe_raw": cosine[:4]}, folder / "kernel.safetensors")
    write_json(
        folder / "kernel.json",
        {
            "update_prompt_ids": [f"arithmetic/train/{p}" for p in prompts],
            "projection_error": None,
            "structure": {
                f"{name}{form}": {
                    **report,
                    "mean_zero": {} if form or name == "contributions" else checks,
                }
                for name in kernels
                for form in ("", "_cosine")
            },
        },
    )


def write_run(folder: Path) -> Path:
    """A training run: log history, evaluations of five checkpoints, measurements of two."""
    rng = np.random.default_rng(7)
    history = [
        {
            "step": step,
            "reward": float(0.55 + 0.3 * (1 - np.exp(-step / 15)) + 0.02 * rng.standard_normal()),
            "entropy": float(0.45 * np.exp(-step / 25) + 0.05 + 0.01 * rng.standard_normal()),
            "grad_norm": 0.8,
            "loss": 0.0,
            "epoch": step / 40,
        }
        for step in range(1, 41)
    ]
    steps = [0, 10, 20, 30, 40]
    for step in steps:
        (folder / f"checkpoints/step-{step}").mkdir(parents=True)
        write_json(
            folder / f"checkpoints/step-{step}/trainer_state.json",
            {"global_step": step, "log_history": [row for row in history if row["step"] <= step]},
        )
    pass_1 = [0.52, 0.66, 0.74, 0.78, 0.81]
    pass_8 = [0.88, 0.90, 0.91, 0.91, 0.90]
    pq.write_table(
        pa.table(
            {
                "step": steps,
                "checkpoint": [f"step-{step}" for step in steps],
                "pass_at_1": pass_1,
                "pass_at_1_stderr": [0.021] * 5,
                "pass_at_8": pass_8,
                "pass_at_8_stderr": [0.018] * 5,
                "format_rate": [0.93, 0.97, 0.98, 0.99, 0.99],
                "format_rate_stderr": [0.011, 0.008, 0.007, 0.005, 0.005],
                "mean_length": [12.4, 12.2, 12.1, 12.1, 12.0],
                "mean_length_correct": [12.3, 12.2, 12.1, 12.0, 12.0],
                "entropy_per_token": [0.43, 0.30, 0.21, 0.15, 0.12],
                "entropy_per_token_stderr": [0.012, 0.011, 0.010, 0.009, 0.008],
                "truncated_rate": [0.04, 0.02, 0.01, 0.01, 0.01],
                "num_prompts": [256] * 5,
                "samples_per_prompt": [8] * 5,
            }
        ),
        folder / "eval.parquet",
    )
    for seed, step in enumerate((10, 40)):
        write_measurement(folder / f"measure/step-{step}", step=step, seed=seed)
    return folder
