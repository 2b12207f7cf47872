"""Deep kernel machines against dense formulas, closed forms, quadrature, finite differences and GPyTorch."""

from __future__ import annotations

import math
import subprocess
import sys
import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import norm
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence
from torch.func import functional_call
from torch.utils._python_dispatch import TorchDispatchMode

from stepscope.errors import MeasurementError
from stepscope.kernels import DeepKernelMachine, GramKernel


def data(count: int = 12, size: int = 3, outputs: int = 2, seed: int = 0) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    X = torch.randn(count, size, generator=draws, dtype=torch.float64)
    noise = torch.randn(count, outputs, generator=draws, dtype=torch.float64)
    slopes = torch.randn(size, outputs, generator=draws, dtype=torch.float64)
    return X, torch.sin(X @ slopes) + 0.1 * noise


def disturb(machine: DeepKernelMachine, seed: int = 5) -> DeepKernelMachine:
    """Away from the start, where much is zero or one."""
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in machine.parameters():
            value += 0.2 * torch.randn(value.shape, generator=draws, dtype=torch.float64)
    return machine


def naive(name: str, G: np.ndarray, weight: float, amplitude: float, bias: float) -> np.ndarray:
    """Entry by entry, as written in the literature."""
    out = np.empty_like(G)
    for i in range(len(G)):
        for j in range(len(G)):
            if name == "squared_exponential":
                out[i, j] = amplitude * math.exp(-weight * ((G[i, i] + G[j, j]) / 2 - G[i, j]))
                continue
            c, a, b = (weight * x + bias for x in (G[i, j], G[i, i], G[j, j]))
            theta = math.acos(min(1.0, c / math.sqrt(a * b)))
            out[i, j] = (math.sqrt(max(0.0, a * b - c * c)) + (math.pi - theta) * c) / math.pi
    return out


def kernels_of(machine: DeepKernelMachine, layer: int, G: Tensor) -> Tensor:
    kernel = machine.kernels[layer]
    amplitude = 1.0 if kernel.log_amplitude is None else kernel.log_amplitude.exp().item()
    bias = 0.0 if kernel.log_bias is None else kernel.log_bias.exp().item()
    return torch.tensor(naive(kernel.name, G.numpy(), kernel.log_weight.exp().item(), amplitude, bias))


@pytest.mark.parametrize("name", ["squared_exponential", "arc_cosine"])
def test_the_full_objective_is_the_literatures(name):
    X, Y = data()
    machine = disturb(DeepKernelMachine(X, Y, layers=2, width=3.0, kernel=name, jitter=0.0))
    with torch.no_grad():
        scaled = X * machine.log_scales.exp() / math.sqrt(3)
        grams = [scaled @ scaled.T]
        expected, zero = 0.0, torch.zeros(12, dtype=torch.float64)
        for layer in range(2):
            K = kernels_of(machine, layer, grams[-1])
            root, W = torch.linalg.cholesky(K), machine.factor(layer)
            grams.append(root @ W @ W.T @ root.T)
            expected -= (
                3.0 * kl_divergence(MultivariateNormal(zero, grams[-1]), MultivariateNormal(zero, K)).item()
            )
        cover = kernels_of(machine, 2, grams[-1]) + machine.log_noise.exp() * torch.eye(12)
        expected += MultivariateNormal(zero, cover).log_prob(Y.T).sum().item()
        assert machine.objective().item() == pytest.approx(expected, rel=1e-9)
        for layer, gram in enumerate(grams):
            torch.testing.assert_close(machine.gram(layer), gram, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("name", ["squared_exponential", "arc_cosine"])
def test_all_data_inducing_is_the_full_machine(name):
    X, Y = data()
    options = {"layers": 2, "width": 3.0, "kernel": name, "jitter": 0.0}
    full = disturb(DeepKernelMachine(X, Y, **options))
    sparse = DeepKernelMachine(X, Y, inducing=len(X), **options)
    sparse.load_state_dict({**full.state_dict(), "points": X})
    assert sparse.objective().item() == pytest.approx(full.objective().item(), rel=1e-7)
    new = data(seed=9)[0]
    for one, other in zip(full.predict(new), sparse.predict(new), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("inducing", [None, 18])
def test_points_that_occur_twice_are_those_of_the_gaussian_process(inducing):
    """The kernel is singular then; with the jitter that is there the objective and predictions stay right."""
    X, Y = data()
    X, Y = torch.cat([X, X[:6]]), torch.cat([Y, Y[:6] + 0.1])
    machine = DeepKernelMachine(X, Y, layers=0, width=1.0, inducing=inducing)
    new = data(seed=9)[0]
    with torch.no_grad():
        both = torch.cat([X, new])
        K = kernels_of(machine, 0, both @ both.T / 3)
    cover, cross = K[:18, :18] + 0.1 * torch.eye(18), K[18:, :18]
    normal = MultivariateNormal(torch.zeros(18, dtype=torch.float64), cover)
    assert machine.objective().item() == pytest.approx(normal.log_prob(Y.T).sum().item(), abs=1e-5)
    mean, variance = machine.predict(new)
    torch.testing.assert_close(mean, cross @ torch.linalg.solve(cover, Y), rtol=0, atol=1e-6)
    spread = 1.1 - (cross * torch.linalg.solve(cover, cross.T).T).sum(1)
    torch.testing.assert_close(variance, spread, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", ["squared_exponential", "arc_cosine", "linear"])
def test_order_of_the_data_is_nothing(name):
    X, Y = data()
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    one, other = (
        DeepKernelMachine(x, y, layers=2, width=3.0, kernel=name) for x, y in ((X, Y), (X[order], Y[order]))
    )
    assert one.objective().item() == pytest.approx(other.objective().item(), rel=1e-12)
    new = data(seed=9)[0]
    for left, right in zip(one.predict(new), other.predict(new), strict=True):
        torch.testing.assert_close(left, right, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("inducing", [None, 1])
def test_one_point_has_its_closed_form(inducing):
    """k = 1, G = w^2: log N(y; 0, 1 + s) of the squared exponential, less the penalty of each layer."""
    X, Y = data(1, 3, 2)
    machine = DeepKernelMachine(X, Y, layers=1, width=2.0, inducing=inducing, jitter=0.0)
    with torch.no_grad():
        machine.factors[0].fill_(0.3)
    w = math.exp(0.3)
    expected = norm.logpdf(Y.numpy(), scale=math.sqrt(1.1)).sum() - 2.0 * ((w * w - 1) / 2 - 0.3)
    assert machine.objective().item() == pytest.approx(expected, rel=1e-12)
    mean, variance = machine.predict(X)
    torch.testing.assert_close(mean, Y / 1.1)
    torch.testing.assert_close(variance, torch.tensor([1.1 - 1 / 1.1], dtype=torch.float64))


def test_fewer_points_give_titsias_bound_which_lies_below():
    X, Y = data(30)
    exact = DeepKernelMachine(X, Y, layers=0, width=1.0, jitter=0.0)
    sparse = DeepKernelMachine(X, Y, layers=0, width=1.0, inducing=6, jitter=0.0)
    with torch.no_grad():
        K = kernels_of(exact, 0, X @ X.T / 3)
        at = [int((p == X).all(1).nonzero()) for p in sparse.points]
        Q = K[:, at] @ torch.linalg.solve(K[at][:, at], K[at])
        normal = MultivariateNormal(
            torch.zeros(30, dtype=torch.float64), Q + 0.1 * torch.eye(30, dtype=torch.float64)
        )
        bound = normal.log_prob(Y.T).sum() - 2 * (K - Q).trace() / (2 * 0.1)
    assert sparse.objective().item() == pytest.approx(bound.item(), rel=1e-9)
    assert sparse.objective() < exact.objective()


@pytest.mark.parametrize(
    ("rho", "a", "b"), [(0.5, 1.0, 1.0), (-0.8, 2.0, 0.3), (0.0, 1.0, 4.0), (0.99, 1.5, 1.0)]
)
def test_the_arc_cosine_kernel_is_what_a_wide_relu_layer_does(rho, a, b):
    """2 E[relu(x) relu(y)]: y given x is normal, so one integral of a known mean is left."""
    kernel = GramKernel("arc_cosine", bias=0.0)
    c = rho * math.sqrt(a * b)
    spread = math.sqrt(b - c * c / a)

    def inner(x: float) -> float:
        mean = c / a * x
        relu = mean * norm.cdf(mean / spread) + spread * norm.pdf(mean / spread)
        return x * relu * norm.pdf(x, scale=math.sqrt(a))

    expected = 2 * quad(inner, 0, 12 * math.sqrt(a), epsabs=1e-12)[0]
    entries = [torch.tensor(v, dtype=torch.float64) for v in (c, a, b)]
    assert kernel(*entries).item() == pytest.approx(expected, abs=1e-9)
    assert kernel(entries[1], entries[1], entries[1]).item() == pytest.approx(a, rel=1e-12)


def test_infinite_width_is_the_nngp_and_large_widths_go_there():
    X, Y = data(10)
    options = {"layers": 3, "kernel": "arc_cosine", "jitter": 0.0}
    limit = DeepKernelMachine(X, Y, width=math.inf, **options)
    assert len(limit.factors) == 0
    with torch.no_grad():
        G = X @ X.T / 3
        for layer in range(4):
            G = kernels_of(limit, layer, G)
        normal = MultivariateNormal(
            torch.zeros(10, dtype=torch.float64), G + 0.1 * torch.eye(10, dtype=torch.float64)
        )
        assert limit.objective().item() == pytest.approx(normal.log_prob(Y.T).sum().item(), rel=1e-9)
    off = []
    for width in (1e3, 1e4, 1e5):
        machine = DeepKernelMachine(X, Y, width=width, **options)
        rest = [p for n, p in machine.named_parameters() if not n.startswith("factors")]
        for value in rest:
            value.requires_grad_(False)
        ascend(machine)
        gained = machine.objective().item() - limit.objective().item()
        moved = max(
            (machine.gram(i) - G_i).abs().max().item() for i, G_i in enumerate(map(limit.gram, range(4)))
        )
        off.append((gained, moved))
    assert all(gain > 0 for gain, _ in off), "learned Gram matrices do better than the NNGP's"
    for one, other in pairwise(off):
        np.testing.assert_allclose(np.divide(one, other), 10, rtol=0.15)  # both fall like 1/nu


def ascend(machine: DeepKernelMachine) -> None:
    free = [p for p in machine.parameters() if p.requires_grad]
    solver = torch.optim.LBFGS(
        free, max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-14, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        solver.zero_grad()
        loss = -machine.objective()
        loss.backward()
        return loss

    solver.step(closure)


@pytest.mark.parametrize("sparse", [False, True])
def test_one_layer_of_the_linear_kernel_without_noise_has_its_closed_form(sparse):
    """With S the Gram matrix of the inputs, no noise, H = S^-1/2 G S^-1/2, T = S^-1/2 YY' S^-1/2:

    L = -(C log|H| + tr(H^-1 T) + nu (tr H - log|H|))/2 + ..., so nu H^2 + (C - nu) H - T = 0 at the maximum.
    """
    X, _ = data(5, 7)
    Y = data(5, 7, 3, seed=4)[1]
    width, several = 8.0, 3
    options = {"layers": 1, "width": width, "kernel": "linear", "bias": 0.0, "noise": 1e-8, "jitter": 0.0}
    machine = DeepKernelMachine(X, Y, inducing=5 if sparse else None, **options)
    for name, value in machine.named_parameters():
        value.requires_grad_(name.startswith("factors"))
    S = X @ X.T / 7
    values, vectors = torch.linalg.eigh(S)
    half = vectors @ torch.diag(values.sqrt()) @ vectors.T
    back = torch.linalg.inv(half)
    t, U = torch.linalg.eigh(back @ Y @ Y.T @ back)
    h = ((width - several) + ((width - several) ** 2 + 4 * width * t.clamp(min=0)).sqrt()) / (2 * width)
    expected = half @ U @ torch.diag(h) @ U.T @ half
    ascend(machine)
    torch.testing.assert_close(machine.gram(1).detach(), expected, rtol=1e-4, atol=1e-5)


def test_one_layer_of_the_linear_kernel_with_noise_on_orthogonal_inputs():
    """S = x 1: G and YY' share eigenvectors, L a sum over eigenvalues t of YY'."""
    Y = data(4, 4, 2, seed=3)[1]
    x, width, noise = 1.5, 2.5, 0.3
    X = torch.eye(4, dtype=torch.float64) * math.sqrt(4 * x)
    options = {"kernel": "linear", "bias": 0.0, "noise": noise, "jitter": 0.0}
    machine = DeepKernelMachine(X, Y, layers=1, width=width, **options)
    for name, value in machine.named_parameters():
        value.requires_grad_(name.startswith("factors"))
    t, U = np.linalg.eigh((Y @ Y.T).numpy())

    def best(t: float) -> float:
        # -C/(g + s) + t/(g + s)^2 - nu/x + nu/g = 0, times g (g + s)^2
        s, square = np.poly1d([1, noise]), np.poly1d([1, 2 * noise, noise**2])
        g = np.poly1d([1, 0])
        roots = (-2 * g * s + t * g - width / x * g * square + width * square).roots
        real = roots[(abs(roots.imag) < 1e-9) & (roots.real > 0)].real

        def gain(g: float) -> float:
            return -(2 * np.log(g + noise) + t / (g + noise) + width * (g / x - np.log(g))) / 2

        return float(max(real, key=gain))

    expected = U @ np.diag([best(v) for v in t]) @ U.T
    ascend(machine)
    np.testing.assert_allclose(machine.gram(1).detach().numpy(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("regulariser", ["exact", "taylor"])
@pytest.mark.parametrize("inducing", [None, 3])
@pytest.mark.parametrize("name", ["squared_exponential", "arc_cosine", "linear"])
def test_gradients_are_those_of_finite_differences(name, inducing, regulariser):
    X, Y = data(6, 2, 1)
    options = {"kernel": name, "inducing": inducing, "regulariser": regulariser, "jitter": 1e-6}
    machine = disturb(DeepKernelMachine(X, Y, layers=2, width=2.0, **options))
    names = [n for n, _ in machine.named_parameters()]

    class Objective(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.machine = machine

        def forward(self) -> Tensor:
            return self.machine.objective()

    whole = Objective()

    def value(*values: Tensor) -> Tensor:
        return functional_call(whole, {f"machine.{n}": v for n, v in zip(names, values, strict=True)}, ())

    inputs = tuple(p.detach().clone().requires_grad_() for p in machine.parameters())
    assert torch.autograd.gradcheck(value, inputs, eps=1e-6, atol=2e-4, rtol=1e-4)


def test_the_second_order_penalty_is_the_kls():
    X, Y = data(6)
    machines = [DeepKernelMachine(X, Y, layers=1, width=1.0, regulariser=r) for r in ("exact", "taylor")]
    ratios = []
    for size in (1e-2, 1e-3):
        raw = size * torch.randn(6, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        for machine in machines:
            machine.factors[0].data = raw
        exact, taylor = (m.penalty(0).item() for m in machines)
        assert exact > 0
        ratios.append(abs(taylor / exact - 1))
    assert ratios[1] < 0.15 * ratios[0] < 0.15


class Work(TorchDispatchMode):
    """Numbers written by all operations, and the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.total, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.total += one.numel()
                self.largest = max(self.largest, one.numel())
        return out


def test_sparse_cost_is_linear_in_the_data():
    """In what is written, forward and backward, exactly; the full machine's is quadratic."""
    total, largest = {}, {}
    for count in (100, 200, 300):
        machine = DeepKernelMachine(*data(count), layers=2, width=1.0, inducing=5, kernel="arc_cosine")
        with Work() as work:
            machine.objective().backward()
        total[count], largest[count] = work.total, work.largest
    assert total[300] - total[200] == total[200] - total[100]
    assert largest[300] == 300 * 5


def test_draws_are_about_the_gram_matrix_in_training_only():
    X, Y = data(6)
    machine = disturb(DeepKernelMachine(X, Y, layers=1, width=1.0, wishart=40))
    machine.eval()
    still = machine.gram(1)
    assert torch.equal(still, machine.gram(1))
    machine.train()
    drawn = torch.stack([machine.gram(1).detach() for _ in range(1000)])
    error = drawn.std(0) / math.sqrt(1000)
    assert ((drawn.mean(0) - still).abs() < 5 * error).all()
    # Var[G_ij] = (G_ii G_jj + G_ij^2)/m of a Wishart matrix over its degrees of freedom
    spread = ((torch.outer(still.diagonal(), still.diagonal()) + still.square()) / 40).sqrt().detach()
    np.testing.assert_allclose(drawn.std(0).numpy(), spread.numpy(), rtol=0.15)


def test_no_layers_are_gpytorchs_gaussian_process():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        gpytorch = pytest.importorskip("gpytorch")
    X, Y = data(15, 3, 1)
    machine = disturb(DeepKernelMachine(X, Y, layers=0, width=1.0, jitter=0.0))

    class Exact(gpytorch.models.ExactGP):
        def __init__(self, likelihood) -> None:
            super().__init__(X, Y[:, 0], likelihood)
            self.mean_module = gpytorch.means.ZeroMean()
            self.covar_module = gpytorch.kernels.ScaleKernel(gpytorch.kernels.RBFKernel(ard_num_dims=3))

        def forward(self, x):
            return gpytorch.distributions.MultivariateNormal(self.mean_module(x), self.covar_module(x))

    likelihood = gpytorch.likelihoods.GaussianLikelihood()
    model = Exact(likelihood).double()
    with torch.no_grad():
        kernel = machine.kernels[0]
        model.covar_module.outputscale = kernel.log_amplitude.exp()
        lengths = math.sqrt(3) * (-machine.log_scales - kernel.log_weight / 2).exp()
        model.covar_module.base_kernel.lengthscale = lengths
        likelihood.noise = machine.log_noise.exp()
        marginal = gpytorch.mlls.ExactMarginalLogLikelihood(likelihood, model)
        assert 15 * marginal(model(X), Y[:, 0]).item() == pytest.approx(machine.objective().item(), rel=1e-9)
        model.eval()
        likelihood.eval()
        new = data(4, 3, 1, seed=7)[0]
        theirs = likelihood(model(new))
        mean, variance = machine.predict(new)
        torch.testing.assert_close(mean[:, 0], theirs.mean, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(variance, theirs.variance, rtol=1e-7, atol=1e-9)
        each = torch.distributions.Normal(theirs.mean, theirs.stddev).log_prob(
            torch.ones(4, dtype=torch.float64)
        )
        torch.testing.assert_close(machine.log_density(new, torch.ones(4, 1, dtype=torch.float64)), each)


def test_fit_climbs_and_predicts():
    X, Y = data(40, 2, 1)
    machine = DeepKernelMachine(X, Y, layers=1, width=5.0, inducing=10, noise=0.5, jitter=1e-6, wishart=50)
    values = machine.fit(150, 5e-2)
    assert np.mean(values[-10:]) > values[0] + 5
    mean, variance = machine.predict(X)
    assert (mean - Y).square().mean() < 0.3 * Y.var()
    assert (variance > 0).all()
    assert not machine.training


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"layers": -1}, "layers is -1"),
        ({"width": 0.0}, "width is 0"),
        ({"width": math.nan}, "width is nan"),
        ({"inducing": 99}, "inducing is 99, expected 1 to 12"),
        ({"noise": 0.0}, "noise is 0"),
        ({"kernel": "cubic"}, "got 'cubic'"),
        ({"regulariser": "none"}, "regulariser is 'none'"),
        ({"wishart": 0}, "wishart is 0"),
        ({"jitter": -1.0}, "jitter is -1"),
        ({"kernel": "linear", "bias": -1.0}, "bias is -1"),
    ],
)
def test_what_does_not_fit_is_refused(options, match):
    with pytest.raises(MeasurementError, match=match):
        DeepKernelMachine(*data(), **{"layers": 1, "width": 1.0, **options})


def test_data_that_does_not_fit_is_refused():
    X, Y = data()
    with pytest.raises(MeasurementError, match=r"inputs are torch\.float32, expected float64"):
        DeepKernelMachine(X.float(), Y, layers=1, width=1.0)
    spoilt = Y.index_fill(0, torch.tensor([3, 5]), math.nan)
    with pytest.raises(MeasurementError, match="outputs: 2 of 12 rows are not finite, the first is row 3"):
        DeepKernelMachine(X, spoilt, layers=1, width=1.0)
    with pytest.raises(MeasurementError, match="expected"):
        DeepKernelMachine(X, Y[:-1], layers=1, width=1.0)
    machine = DeepKernelMachine(X, Y, layers=1, width=1.0)
    with pytest.raises(MeasurementError, match=r"expected \(t, 3\) float64"):
        machine.predict(X[:, :2])
    with pytest.raises(MeasurementError, match="predict: 12 of 12 rows are not finite"):
        machine.predict(X * math.nan)
    for wrong in (Y[:1], Y[:, :1]):  # which would be taken for all rows, or for all outputs
        with pytest.raises(MeasurementError, match=r"expected \(12, 2\)"):
            machine.log_density(X, wrong)
    for steps, rate in ((-1, 1e-2), (3, math.nan), (3, 0.0)):
        with pytest.raises(MeasurementError, match=r"expected 0 or more at a finite rate above"):
            machine.fit(steps, rate)
    assert [len(found) for found in machine.predict(X[:0])] == [0, 0]
    with pytest.raises(MeasurementError, match="there are 0 to 1"):
        machine.gram(2)
    twice = DeepKernelMachine(torch.cat([X, X]), torch.cat([Y, Y]), layers=1, width=1.0, jitter=0.0)
    with pytest.raises(MeasurementError, match="not positive definite; raise jitter"):
        twice.objective()


def test_the_rest_starts_without_it():
    modules = "stepscope, stepscope.cli, stepscope.measure.kernel"
    code = f"import sys, {modules}; print('stepscope.kernels' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"
