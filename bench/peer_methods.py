"""The ways to per-sequence gradient products that ``bench/peers.py`` times: ours, plain torch, and libraries.

Each method is a factory ``(case, batch_size) -> {task: callable}``; a callable makes the whole result from
the model and the token ids. Tasks: ``kernel`` (64 x 64 of grad S_i . grad S_j), ``kernel_P`` (grad S_i . P .
grad S_j), ``influence`` (u . grad S_i for a given u) and ``tokens`` (u . grad l_ik). A library that is not
installed raises ImportError, and its row is left out with that reason.
"""

from __future__ import annotations

import contextlib
import io
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from cases import Case
from stepscope.policy.gradients.derivatives import directional_derivative, response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import per_sequence_dot
from stepscope.policy.gradients.stream import SequenceGradients, coverage_of
from stepscope.policy.passes import Budget

Tasks = dict[str, Callable[[], Tensor]]


def stepscope(case: Case, size: int) -> Tasks:
    """This project."""
    policy, rollouts = case.policy, case.rollouts
    coverage_of(policy, rollouts)

    def kernel(P: dict[str, Tensor] | None) -> Tensor:
        return gram(
            policy,
            SequenceGradients(rollouts, response_logprob),
            preconditioner=P,
            budget=Budget(max_sequences=size),
        )

    def tokens() -> Tensor:
        return torch.cat(
            directional_derivative(
                policy, rollouts, response_logprob, case.u, budget=Budget(max_sequences=size)
            )
        )

    return {
        "kernel": lambda: kernel(None),
        "kernel_P": lambda: kernel(case.P),
        "influence": lambda: torch.from_numpy(
            per_sequence_dot(
                policy,
                SequenceGradients(rollouts, response_logprob),
                case.u,
                budget=Budget(max_sequences=size),
            )
        ),
        "tokens": tokens,
    }


def _products(case: Case, gradients: Callable[[], dict[str, Tensor]]) -> Tasks:
    """Tasks from a method that returns every parameter's (seq, ...) gradients."""

    def kernel(P: dict[str, Tensor] | None) -> Tensor:
        total = torch.zeros(case.count, case.count)
        for name, g in gradients().items():
            flat = g.reshape(case.count, -1)
            total += (flat if P is None else flat * P[name].reshape(-1)) @ flat.T
        return total

    def influence() -> Tensor:
        return sum(g.reshape(case.count, -1) @ case.u[n].reshape(-1) for n, g in gradients().items())

    return {"kernel": lambda: kernel(None), "kernel_P": lambda: kernel(case.P), "influence": influence}


def loop(case: Case, size: int) -> Tasks:
    """One forward and one autograd.grad per sequence."""
    params = case.policy.parameters

    def gradients() -> dict[str, Tensor]:
        rows = []
        for i in range(case.count):
            value = case.logprob_sums(case.model, case.ids[i : i + 1]).sum()
            rows.append(torch.autograd.grad(value, list(params.values())))
        return {n: torch.stack(g) for n, g in zip(params, zip(*rows, strict=True), strict=True)}

    return _products(case, gradients)


def vmap_grad(case: Case, size: int) -> Tasks:
    """torch.func: vmap over sequences of grad, in chunks of ``size``."""
    params = {n: p.detach() for n, p in case.policy.parameters.items()}

    def value(values: dict[str, Tensor], ids: Tensor) -> Tensor:
        def call(x: Tensor) -> Any:
            return torch.func.functional_call(
                case.model, values, (), {"input_ids": x, "use_cache": False, "logits_to_keep": case.kept}
            )

        return case.sums_of(call(ids.unsqueeze(0)).logits, ids.unsqueeze(0)).sum()

    each = torch.func.vmap(torch.func.grad(value), in_dims=(None, 0), chunk_size=size)
    return _products(case, lambda: each(params, case.ids))


def opacus(case: Case, size: int) -> Tasks:
    """Opacus: GradSampleModule."""
    from opacus.grad_sample import GradSampleModule

    case.model.train()
    wrapped = GradSampleModule(case.model, loss_reduction="sum", strict=False)
    named = {n.removeprefix("_module."): p for n, p in wrapped.named_parameters() if p.requires_grad}

    def gradients() -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {n: [] for n in named}
        for start in range(0, case.count, size):
            case.logprob_sums(wrapped, case.ids[start : start + size]).sum().backward()
            for n, p in named.items():
                parts[n].append(p.grad_sample)
                p.grad_sample = p.grad = None
        return {n: torch.cat(t) for n, t in parts.items()}

    return _products(case, gradients)


def pioneer(case: Case, size: int) -> Tasks:
    """The pioneer's way: a shared graph of 8, one backward per sequence, dictionary dots in float64."""
    params = case.policy.parameters

    def rows() -> list[dict[str, Tensor]]:
        found = []
        for start in range(0, case.count, 8):
            sums = case.logprob_sums(case.model, case.ids[start : start + 8])
            for value in sums:
                grads = torch.autograd.grad(value, list(params.values()), retain_graph=True)
                found.append({n: g.double() for n, g in zip(params, grads, strict=True)})
        return found

    def kernel(P: dict[str, Tensor] | None) -> Tensor:
        left = rows()
        right = left if P is None else [{n: g * P[n] for n, g in row.items()} for row in left]
        K = torch.zeros(case.count, case.count, dtype=torch.float64)
        for i in range(case.count):
            for j in range(i + 1):
                K[i, j] = K[j, i] = sum((left[i][n] * right[j][n]).sum() for n in params)
        return K

    return {"kernel": lambda: kernel(None), "kernel_P": lambda: kernel(case.P)}


def bergson(case: Case, size: int) -> Tasks:
    """bergson: InMemoryCollector for kernels, its Scorer for a given u."""
    from bergson import CollectorComputer, InMemoryCollector, Scorer
    from bergson.config import IndexConfig
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset as HFDataset

    logging.disable(logging.INFO)
    folder = Path(tempfile.mkdtemp())
    (folder / "run.part").mkdir()
    config = IndexConfig(run_path=str(folder / "run"), model="none")
    labels = [[-100] * case.prompt_length + row[case.prompt_length :] for row in case.ids.tolist()]
    data = HFDataset.from_dict({"input_ids": case.ids.tolist(), "labels": labels})
    root = case.model.base_model
    names = {
        m: n
        for n, p in case.policy.parameters.items()
        for m, module in root.named_modules()
        if isinstance(module, nn.Linear) and module.weight is p
    }
    if set(names.values()) != set(case.policy.parameters):
        raise ImportError("covers linear layers only: embeddings, norms and biases are left out")
    batches = [list(range(s, min(s + size, case.count))) for s in range(0, case.count, size)]

    def collect(scorer: Any = None) -> Any:
        collector = InMemoryCollector(
            model=root, target_modules=set(names), data=data, cfg=config, scorer=scorer
        )
        with contextlib.redirect_stderr(io.StringIO()):
            CollectorComputer(
                case.model, data, collector=collector, batches=batches, cfg=config
            ).run_with_collector_hooks(desc="")
        return collector

    def influence() -> Tensor:
        writer = InMemorySequenceScoreWriter(case.count, 1)
        queries = {m: case.u[n].reshape(1, -1) for m, n in names.items()}
        scorer = Scorer(queries, list(names), writer, torch.device("cpu"), torch.float32)
        return -collect(scorer).scores.reshape(-1)

    tasks = _products(case, lambda: {names[m]: g for m, g in collect().gradients.items()})
    return {**tasks, "influence": influence}


class _Rows(Dataset):
    """Token ids as a dataset of dictionaries; every row has its own number, so none is a duplicate."""

    def __init__(self, ids: Tensor) -> None:
        self.ids = ids

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"input_ids": self.ids[i]}


def dattri_llm(case: Case, size: int) -> Tasks:
    """dattri-llm: TracInAttributor, the batch on both sides."""
    from dattri_llm import AttributionArguments, AttributionTask, TracInAttributor

    def loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return case.logprob_sums(model, batch["input_ids"]).sum()

    arguments = AttributionArguments(
        output_dir=tempfile.mkdtemp(), per_device_train_batch_size=size, per_device_eval_batch_size=size
    )
    rows = _Rows(case.ids)

    def kernel() -> Tensor:
        task = AttributionTask(loss, case.model)
        score = TracInAttributor(arguments, task=task).attribute(rows, rows)
        return torch.as_tensor(score.agnostic_matrix()[1])

    return {"kernel": kernel}


def dattri_hooks(case: Case, size: int) -> Tasks:
    """dattri-llm's lower level: HookManager, materialised gradients, our products."""
    from dattri_llm import REGISTER_ALL, HookManager, HookManagerConfig
    from dattri_llm.gradient.ops import materialize

    hooks = HookManager(case.model, config=HookManagerConfig(linear_io=REGISTER_ALL))
    params = {id(p): n for n, p in case.policy.parameters.items()}
    modules = dict(case.model.named_modules())

    def gradients() -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {}
        for start in range(0, case.count, size):
            with hooks.collect():
                case.logprob_sums(case.model, case.ids[start : start + size]).sum().backward()
            found = hooks.get_gradient()
            for layer, held in found.data.items():
                name = params.get(id(modules[layer].weight))
                if name is not None:
                    parts.setdefault(name, []).append(
                        materialize(held, found.layer_types[layer], include_bias=False)
                    )
            for p in case.policy.parameters.values():
                p.grad = None
        if set(parts) != set(params.values()):
            raise ImportError("not every trainable parameter is captured")
        return {n: torch.cat(t) for n, t in parts.items()}

    return _products(case, gradients)


def kronfluence(case: Case, size: int) -> Tasks:
    """kronfluence: pairwise scores with the identity strategy, the batch on both sides."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task

    params = {id(p) for p in case.policy.parameters.values()}
    tracked = [m for m, module in case.model.named_modules() if id(getattr(module, "weight", None)) in params]
    if len(tracked) != len(params):
        raise ImportError("covers linear layers only: embeddings, norms and biases are left out")

    class Sum(Task):
        def compute_train_loss(self, batch: Any, model: nn.Module, sample: bool = False) -> Tensor:
            return case.logprob_sums(model, batch["input_ids"]).sum()

        def compute_measurement(self, batch: Any, model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return tracked

    task = Sum()
    analyzer = Analyzer(
        "bench",
        prepare_model(case.model, task),
        task,
        cpu=True,
        disable_tqdm=True,
        output_dir=tempfile.mkdtemp(),
    )
    rows = _Rows(case.ids)
    analyzer.fit_all_factors(
        "identity", rows, per_device_batch_size=size, factor_args=FactorArguments(strategy="identity")
    )

    def kernel() -> Tensor:
        analyzer.compute_pairwise_scores(
            "scores",
            "identity",
            rows,
            rows,
            per_device_query_batch_size=size,
            per_device_train_batch_size=size,
            score_args=ScoreArguments(),
            overwrite_output_dir=True,
        )
        return analyzer.load_pairwise_scores("scores")["all_modules"]

    return {"kernel": kernel}


METHODS: dict[str, Callable[[Case, int], Tasks]] = {
    "stepscope": stepscope,
    "bergson": bergson,
    "vmap(grad)": vmap_grad,
    "Opacus": opacus,
    "dattri-llm": dattri_llm,
    "dattri-llm hooks": dattri_hooks,
    "autograd loop": loop,
    "kronfluence": kronfluence,
    "pioneer": pioneer,
}
