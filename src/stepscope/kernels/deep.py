"""Deep kernel machines for regression: full, and sparse with inducing points."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from stepscope.errors import MeasurementError
from stepscope.kernels.gram import GramKernel, KernelName

BETAS = (0.8, 0.9)
"""Adam's, as in the code of convolutional deep kernel machines."""


@dataclass(frozen=True)
class _Top:
    """What the last kernel sees: K_ii = L L', B = K_ti L^-T, diag K_tt, and the sum of penalties."""

    gram: Tensor
    root: Tensor
    cross: Tensor
    diagonal: Tensor
    penalty: Tensor


class DeepKernelMachine(nn.Module):
    """Learned Gram matrices G_1..G_L between data and outputs (Yang et al. 2023, 2108.13097).

    L = sum_c log N(y_c; 0, K(G_L) + s I) - sum_l nu_l KL(N(0, G_l) || N(0, K(G_{l-1}))), G_0 = X D X'/d,
    with KL = (tr(K^-1 G) - log|K^-1 G| - P)/2. It is the log posterior of the Gram matrices of a deep
    Gaussian process with N nu_l features a layer and each output N times, over N, as N grows: the log
    density of a Wishart matrix with N nu degrees of freedom, over N, tends to -nu KL and a constant.
    nu = infinity leaves the Gaussian process of the infinite network (NNGP); no layers, a Gaussian process.

    Each G_l is L A L' with K = L L', A = W W', W lower triangular with a positive diagonal: KL = (|W|^2 - 2
    sum log W_ii - P)/2 needs no inverse, and W = 1 is the NNGP, where it starts. With P inducing points the
    Gram matrix of these is learned, and G_ti = K_ti K_ii^-1 G_ii, diag G_tt = diag(K_tt - K_ti K_ii^-1 K_it +
    K_ti K_ii^-1 G_ii K_ii^-1 K_it) are the means under the layer's prior given the inducing features; the
    likelihood is Titsias' bound (2009), the best over all normal q(u): time and memory linear in the data,
    P^3 beside it.

    Args:
        inputs: (n, d) float64; scaled by the caller. A scale for each column is learned (D).
        outputs: (n, C) float64, mean zero by the caller; all share the kernel and the noise s.
        layers: L, Gram layers; there are L + 1 kernels.
        width: nu of every layer, in units of one output's log likelihood.
        kernel: of :class:`~stepscope.kernels.gram.GramKernel`.
        inducing: P; None for the full machine.
        noise: s to begin with, in squares of the outputs' unit.
        bias: of the kernels.
        regulariser: ``exact`` the KL; ``taylor`` |A^-1 - 1|^2 / 4, its second order about the NNGP, which
            holds G away from singular ones harder. The code of Milsom et al. (2024) has |G^-1 K -
            1|^2, not whitened, which is not the KL's second order where G and K do not commute.
        wishart: in training G_l is drawn from a Wishart law with so many degrees of freedom about itself
            (stochastic kernel regularisation, Milsom et al. 2024); None for no draws.
        jitter: part of the mean diagonal added to each kernel of the inducing points.
        seed: of the choice of inducing points and of the draws.

    Raises:
        MeasurementError: shapes, types or numbers that do not fit.
    """

    def __init__(
        self,
        inputs: Tensor,
        outputs: Tensor,
        *,
        layers: int,
        width: float,
        kernel: KernelName = "squared_exponential",
        inducing: int | None = None,
        noise: float = 0.1,
        bias: float = 0.1,
        regulariser: Literal["exact", "taylor"] = "exact",
        wishart: int | None = None,
        jitter: float = 1e-8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        _check(inputs, outputs, layers, width, inducing, noise, regulariser, wishart, jitter)
        self.inputs, self.outputs = inputs, outputs
        self.width, self.regulariser, self.wishart, self.jitter = width, regulariser, wishart, jitter
        self.draws = torch.Generator().manual_seed(seed)
        count, size = inputs.shape
        self.points: nn.Parameter | None = None
        if inducing is not None:
            chosen = torch.randperm(count, generator=self.draws)[:inducing].sort().values
            self.points = nn.Parameter(inputs[chosen].clone())
        self.log_scales = nn.Parameter(torch.zeros(size, dtype=torch.float64))
        self.log_noise = nn.Parameter(torch.tensor(math.log(noise), dtype=torch.float64))
        self.kernels = nn.ModuleList(GramKernel(kernel, bias) for _ in range(layers + 1))
        learned = 0 if math.isinf(width) else layers
        free = count if inducing is None else inducing
        self.factors = nn.ParameterList(torch.zeros(free, free, dtype=torch.float64) for _ in range(learned))

    def factor(self, layer: int) -> Tensor:
        """W (P, P) of a layer: strictly lower triangle as it stands, diagonal through exp."""
        raw: Tensor = self.factors[layer]
        return raw.tril(-1) + torch.diag_embed(raw.diagonal().exp())

    def penalty(self, layer: int) -> Tensor:
        """KL of a layer in nats per unit of nu, or its second order."""
        W = self.factor(layer)
        eye = torch.eye(len(W), dtype=torch.float64)
        if self.regulariser == "taylor":
            inverse: Tensor = torch.linalg.solve_triangular(W, eye, upper=False)
            return (inverse.mT @ inverse - eye).square().sum() / 4
        return (W.square().sum() - len(W)) / 2 - W.diagonal().log().sum()

    def gram(self, layer: int) -> Tensor:
        """G (P, P) of layer 1..L over the inducing points (all data in the full machine); 0 the inputs'."""
        if not 0 <= layer < len(self.kernels):
            raise MeasurementError(f"gram of layer {layer}: there are 0 to {len(self.kernels) - 1}")
        grams: list[Tensor] = []
        self._propagate(self.inputs[:0], grams)
        return grams[layer]

    def objective(self) -> Tensor:
        """L in nats, with Titsias' bound for the likelihood where there are inducing points."""
        top = self._propagate(self.inputs if self.points is not None else self.inputs[:0])
        noise, (count, several) = self.log_noise.exp(), self.outputs.shape
        if self.points is None:
            root = _root(top.gram + noise * torch.eye(count, dtype=torch.float64), "outputs")
            white = torch.linalg.solve_triangular(root, self.outputs, upper=False)
            fit, logdet = white.square().sum(), 2 * root.diagonal().log().sum()
            lost = torch.zeros((), dtype=torch.float64)
        else:
            inner, weights = self._posterior(top.cross)
            fit = (self.outputs.square().sum() - weights.square().sum() / noise) / noise
            logdet = count * self.log_noise + 2 * inner.diagonal().log().sum()
            lost = (top.diagonal - top.cross.square().sum(1)).clamp(min=0).sum() / noise
        likelihood: Tensor = -0.5 * (several * (count * math.log(2 * math.pi) + logdet + lost) + fit)
        return likelihood - top.penalty

    def predict(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Mean (t, C) and variance (t,) of new outputs, noise included, at (t, d) inputs; no draws."""
        size = self.inputs.shape[1]
        if inputs.ndim != 2 or inputs.shape[1] != size or inputs.dtype != torch.float64:
            raise MeasurementError(
                f"predict: got inputs {tuple(inputs.shape)} {inputs.dtype}, expected (t, {size}) float64"
            )
        _finite("predict", inputs)
        training = self.training
        self.eval()
        try:
            with torch.no_grad():
                new = self._propagate(inputs)
                seen = new.root if self.points is None else self._propagate(self.inputs).cross
                inner, weights = self._posterior(seen)
                spread = torch.linalg.solve_triangular(inner, new.cross.mT, upper=False)
                left = (new.diagonal - new.cross.square().sum(1)).clamp(min=0)
                noise = self.log_noise.exp()
                return spread.mT @ weights / noise, left + spread.square().sum(0) + noise
        finally:
            self.train(training)

    def log_density(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        """(t,) log density of new outputs (t, C) under :meth:`predict`, row by row, summed over outputs."""
        mean, variance = self.predict(inputs)
        if outputs.shape != mean.shape:
            raise MeasurementError(
                f"log_density: got outputs {tuple(outputs.shape)}, expected {tuple(mean.shape)}"
            )
        each = -0.5 * (
            (outputs - mean).square() / variance[:, None] + (2 * math.pi * variance[:, None]).log()
        )
        return each.sum(1)

    def fit(self, steps: int = 500, rate: float = 1e-2) -> list[float]:
        """Ascend the objective with Adam, at a tenth of the rate in the last fifth; the objectives in nats.

        Raises:
            MeasurementError: steps or rate that are none, an objective that is not finite, or a kernel that
                is not positive.
        """
        if steps < 0 or not 0 < rate < math.inf:
            raise MeasurementError(
                f"deep kernel machine: {steps} steps at rate {rate}, expected 0 or more at a "
                "finite rate above 0"
            )
        optimizer = torch.optim.Adam(self.parameters(), lr=rate, betas=BETAS)
        schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [max(1, steps * 4 // 5)])
        self.train()
        values: list[float] = []
        for step in range(steps):
            optimizer.zero_grad()
            value = self.objective()
            if not torch.isfinite(value):
                raise MeasurementError(
                    f"deep kernel machine: objective is {value.item()} at step {step}; lower rate"
                )
            (-value / len(self.inputs)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            values.append(value.item())
        self.eval()
        return values

    def _propagate(self, inputs: Tensor, grams: list[Tensor] | None = None) -> _Top:
        """Through all kernels, with (t, d) inputs beside the inducing points."""
        scales = self.log_scales.exp() / math.sqrt(self.inputs.shape[1])
        points = (self.inputs if self.points is None else self.points) * scales
        others = inputs * scales
        gram, cross, diagonal = points @ points.mT, others @ points.mT, others.square().sum(1)
        penalty = torch.zeros((), dtype=torch.float64)
        for layer, kernel in enumerate(self.kernels):
            if grams is not None:
                grams.append(gram)
            own = gram.diagonal()
            K = kernel(gram, own[:, None], own[None, :])
            K = K + self.jitter * K.diagonal().mean() * torch.eye(len(K), dtype=torch.float64)
            cross = kernel(cross, diagonal[:, None], own[None, :])
            diagonal = kernel(diagonal, diagonal, diagonal)
            root = _root(K, f"layer {layer}")
            white = torch.linalg.solve_triangular(root, cross.mT, upper=False).mT
            if layer < len(self.factors):
                W = self.factor(layer)
                penalty = penalty + self.width * self.penalty(layer)
                if self.wishart is not None and self.training:
                    shape = (len(W), self.wishart)
                    W = (
                        W
                        @ torch.randn(shape, generator=self.draws, dtype=torch.float64)
                        / math.sqrt(self.wishart)
                    )
                left, here, there = (diagonal - white.square().sum(1)).clamp(min=0), root @ W, white @ W
                gram, cross, diagonal = here @ here.mT, there @ here.mT, left + there.square().sum(1)
            else:
                gram = K
        return _Top(gram, root, white, diagonal, penalty)

    def _posterior(self, white: Tensor) -> tuple[Tensor, Tensor]:
        """R with R R' = 1 + B'B/s, and R^-1 B'Y: the normal q(u) in whitened coordinates."""
        eye = torch.eye(white.shape[1], dtype=torch.float64)
        inner = _root(eye + white.mT @ white / self.log_noise.exp(), "posterior")
        return inner, torch.linalg.solve_triangular(inner, white.mT @ self.outputs, upper=False)


def _root(matrix: Tensor, where: str) -> Tensor:
    """Lower Cholesky factor; refuses what is not positive, and adds nothing in silence."""
    root: Tensor
    root, failed = torch.linalg.cholesky_ex(matrix)
    if failed.item() or not bool(torch.isfinite(root).all()):
        raise MeasurementError(
            f"deep kernel machine, {where}: a kernel of {len(matrix)} points is not positive definite; "
            "raise jitter, remove duplicate points, or scale the inputs"
        )
    return root


def _finite(where: str, values: Tensor) -> None:
    bad = (~torch.isfinite(values)).any(1).nonzero().flatten().tolist()
    if bad:
        raise MeasurementError(
            f"{where}: {len(bad)} of {len(values)} rows are not finite, the first is row {bad[0]}; "
            "leave them out"
        )


def _check(
    inputs: Tensor,
    outputs: Tensor,
    layers: int,
    width: float,
    inducing: int | None,
    noise: float,
    regulariser: str,
    wishart: int | None,
    jitter: float,
) -> None:
    if (
        inputs.ndim != 2
        or outputs.ndim != 2
        or len(inputs) != len(outputs)
        or inputs.numel() * outputs.numel() == 0
    ):
        raise MeasurementError(
            f"deep kernel machine: got inputs {tuple(inputs.shape)} and outputs {tuple(outputs.shape)}, "
            "expected (n, d) and (n, C)"
        )
    for name, values in (("inputs", inputs), ("outputs", outputs)):
        if values.dtype != torch.float64:
            raise MeasurementError(f"deep kernel machine: {name} are {values.dtype}, expected float64")
        _finite(f"deep kernel machine, {name}", values)
    wrong = {
        f"layers is {layers}, expected 0 or more": layers < 0,
        f"width is {width}, expected more than 0 (infinity is the NNGP)": not width > 0,
        f"inducing is {inducing}, expected 1 to {len(inputs)}": inducing is not None
        and not 1 <= inducing <= len(inputs),
        f"noise is {noise}, expected a finite number above 0": not 0 < noise < math.inf,
        f"regulariser is {regulariser!r}, expected 'exact' or 'taylor'": regulariser
        not in ("exact", "taylor"),
        f"wishart is {wishart}, expected 1 or more": wishart is not None and wishart < 1,
        f"jitter is {jitter}, expected 0 or more": not 0 <= jitter < math.inf,
    }
    for message, true in wrong.items():
        if true:
            raise MeasurementError(f"deep kernel machine: {message}")
