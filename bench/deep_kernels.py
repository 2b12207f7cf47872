"""Deep kernel machines against a Gaussian process and the NNGP on small regressions, over seeds.

    python bench/deep_kernels.py --json runs/deep_kernels.json [--seeds 3] [--rows 200] [--steps 200]

Data that scikit-learn ships or generates (diabetes; Friedman's three), a fresh split (and for the generated
ones fresh data) for each seed; inputs and outputs are scaled by the training part. All models learn a scale
for every column, kernels and noise by Adam for the same number of steps at the same rate; the Gaussian
process is GPyTorch's. Of each: RMSE over the standard deviation of the training outputs, mean log density of
a test output in those units, seconds. Means over seeds, and differences to the Gaussian process of the same
seed with 95 % intervals. "nu chosen": of 10, 100, 1000 and infinite the one of largest log density on
a fifth of the training rows, fitted again to all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from scipy.stats import t as student_t
from torch import Tensor

from stepscope.kernels import DeepKernelMachine

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import gpytorch
    from sklearn.datasets import load_diabetes, make_friedman1, make_friedman2, make_friedman3

RATE = 3e-2
Data = tuple[Tensor, Tensor, Tensor, Tensor]


def split(name: str, seed: int, rows: int) -> Data:
    """Training inputs and outputs, test inputs and outputs, scaled by the training part."""
    made: dict[str, Callable[[], tuple[np.ndarray, np.ndarray]]] = {
        "diabetes": lambda: load_diabetes(return_X_y=True, scaled=False),
        "friedman1": lambda: make_friedman1(2 * rows, noise=1.0, random_state=seed),
        "friedman2": lambda: make_friedman2(2 * rows, noise=125.0, random_state=seed),
        "friedman3": lambda: make_friedman3(2 * rows, noise=0.1, random_state=seed),
    }
    X, y = made[name]()
    order = np.random.default_rng(seed).permutation(len(X))
    train, test = order[:rows], order[rows : 2 * rows]
    X = (X - X[train].mean(0)) / X[train].std(0)
    y = (y - y[train].mean()) / y[train].std()
    a, b, c, d = (torch.tensor(v, dtype=torch.float64) for v in (X[train], y[train], X[test], y[test]))
    return a, b[:, None], c, d[:, None]


class Exact(gpytorch.models.ExactGP):
    """Squared exponential with a length for every column."""

    def __init__(self, X: Tensor, y: Tensor, likelihood: gpytorch.likelihoods.Likelihood) -> None:
        super().__init__(X, y, likelihood)
        self.mean_module = gpytorch.means.ZeroMean()
        base = gpytorch.kernels.RBFKernel(ard_num_dims=X.shape[1])
        self.covar_module = gpytorch.kernels.ScaleKernel(base)

    def forward(self, x: Tensor) -> gpytorch.distributions.MultivariateNormal:
        return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))


def gaussian_process(data: Data, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    X, y, new, _ = data
    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Exact(X, y[:, 0], likelihood).double()
    with torch.no_grad():
        model.covar_module.outputscale = 1.0
        model.covar_module.base_kernel.lengthscale = math.sqrt(X.shape[1])
        likelihood.noise = 0.1
    marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    for _ in range(steps):
        optimizer.zero_grad()
        (-marginal(model(X), y[:, 0])).backward()
        optimizer.step()
    model.eval()
    likelihood.eval()
    with torch.no_grad():
        out = likelihood(model(new))
        return out.mean[:, None], out.variance


def machine(**options: object) -> Callable[[Data, int, int], tuple[Tensor, Tensor]]:
    def fitted(data: Data, steps: int, seed: int) -> tuple[Tensor, Tensor]:
        model = DeepKernelMachine(data[0], data[1], seed=seed, jitter=1e-6, **options)  # type: ignore[arg-type]
        model.fit(steps, RATE)
        return model.predict(data[2])

    return fitted


WIDTHS = (10.0, 100.0, 1000.0, math.inf)


def chosen_width(**options: object) -> Callable[[Data, int, int], tuple[Tensor, Tensor]]:
    """A machine of the width whose density is largest on a fifth of the training rows, then fitted to all."""

    def fitted(data: Data, steps: int, seed: int) -> tuple[Tensor, Tensor]:
        X, y = data[:2]
        held = len(X) // 5
        part = X[held:], y[held:], X[:held], y[:held]  # rows are in random order

        def density(width: float) -> float:
            mean, variance = machine(width=width, **options)(part, steps, seed)
            return log_density(part[3] - mean, variance)

        return machine(width=max(WIDTHS, key=density), **options)(data, steps, seed)

    return fitted


def log_density(off: Tensor, variance: Tensor) -> float:
    each = -0.5 * (off[:, 0].square() / variance + (2 * math.pi * variance).log())
    return each.mean().item()


MODELS: dict[str, Callable[[Data, int, int], tuple[Tensor, Tensor]]] = {
    "Gaussian process": gaussian_process,
    "NNGP, 2 layers": machine(layers=2, width=math.inf, kernel="arc_cosine"),
    "DKM, arc cosine, nu 10": machine(layers=2, width=10.0, kernel="arc_cosine"),
    "DKM, squared exponential, nu 10": machine(layers=2, width=10.0),
    "DKM, sparse (50), squared exponential, nu 10": machine(layers=2, width=10.0, inducing=50),
    "DKM, sparse (50), squared exponential, nu 1": machine(layers=2, width=1.0, inducing=50),
    "DKM, arc cosine, nu 1000": machine(layers=2, width=1000.0, kernel="arc_cosine"),
    "DKM, sparse (50), squared exponential, nu infinite": machine(layers=2, width=math.inf, inducing=50),
    "DKM, sparse (50), squared exponential, nu chosen": chosen_width(layers=2, inducing=50),
    "DKM, sparse (50), arc cosine, nu chosen": chosen_width(layers=2, inducing=50, kernel="arc_cosine"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=200)
    parser.add_argument("--steps", type=int, default=200)
    args = parser.parse_args()
    done = json.loads(args.json.read_text()) if args.json.exists() else []
    for seed in range(args.seeds):
        for name in ("diabetes", "friedman1", "friedman2", "friedman3"):
            data = split(name, seed, args.rows)
            for model, fitted in MODELS.items():
                case = {"data": name, "model": model, "seed": seed, "rows": args.rows, "steps": args.steps}
                if any(case.items() <= row.items() for row in done):
                    continue
                start = time.process_time()
                mean, variance = fitted(data, args.steps, seed)
                seconds = time.process_time() - start
                rmse = (data[3] - mean).square().mean().sqrt().item()
                density = log_density(data[3] - mean, variance)
                done.append({**case, "rmse": rmse, "log_density": density, "cpu_seconds": seconds})
                print(name, seed, model, f"{rmse:.4f} {density:.4f} {seconds:.1f} s", flush=True)
                args.json.parent.mkdir(parents=True, exist_ok=True)
                part = args.json.with_suffix(".part")
                part.write_text(json.dumps(done, indent=1))
                part.replace(args.json)
    table([row for row in done if (row["rows"], row["steps"]) == (args.rows, args.steps)])


def table(rows: list[dict[str, object]]) -> None:
    """Means over seeds; in brackets the difference to the Gaussian process, with its 95 % interval."""
    print("| data | model | RMSE | log density | CPU s |\n|---|---|---|---|---|")
    for name in dict.fromkeys(row["data"] for row in rows):
        base = {row["seed"]: row for row in rows if (row["data"], row["model"]) == (name, "Gaussian process")}
        for model in MODELS:
            own = [
                row for row in rows if (row["data"], row["model"]) == (name, model) and row["seed"] in base
            ]
            if not own:
                continue
            cells = []
            for figure in ("rmse", "log_density"):
                values = np.array([row[figure] for row in own], dtype=float)
                cell = f"{values.mean():.3f}"
                if model != "Gaussian process" and len(own) > 1:
                    gaps = values - np.array([base[row["seed"]][figure] for row in own], dtype=float)
                    half = student_t.ppf(0.975, len(own) - 1) * gaps.std(ddof=1) / math.sqrt(len(own))
                    cell += f" ({gaps.mean():+.3f} ± {half:.3f})"
                cells.append(cell)
            seconds = np.mean([float(str(row["cpu_seconds"])) for row in own])
            print(f"| {name} | {model} | {cells[0]} | {cells[1]} | {seconds:.1f} |")


if __name__ == "__main__":
    main()
