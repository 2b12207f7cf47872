"""Two processes together: what they exchange, and what happens when one of them fails."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing

import cases
from stepscope.errors import PeerError
from stepscope.measure.quantity.kinds.entropy import Entropy
from stepscope.measure.quantity.values import derivatives
from stepscope.policy import group
from stepscope.policy.gradients.derivatives import (
    WeightedLogprobs,
    directional_derivative,
    gradient,
    response_logprob,
)
from stepscope.policy.gradients.gram import grams
from stepscope.policy.gradients.products import (
    paired_dots,
    per_sequence_dot,
    per_sequence_dots,
    weighted_gradients,
)
from stepscope.policy.gradients.projection import Sketch, sketches
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.group import ALONE, Group, current, entered
from stepscope.policy.passes import Budget
from stepscope.policy.rollouts import score_rollouts


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def started(rank: int, size: int, port: int) -> None:
    """What torchrun tells a process."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in told.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_every_item_is_dealt_to_one_process(count: int) -> None:
    items = list(range(count))
    parts = [Group(rank, 3).share(items) for rank in range(3)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert max(map(len, parts)) == Group(0, 3).largest_share(count)


def test_from_more_to_less_work_parts_are_about_equal() -> None:
    work = sorted(torch.rand(100, generator=torch.Generator().manual_seed(0)).tolist(), reverse=True)
    parts = [sum(Group(rank, 4).share(work)) for rank in range(4)]
    assert max(parts) - min(parts) < work[0]


def test_alone_an_exchange_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with entered() as alone:
        assert alone is current() is ALONE
        assert not torch.distributed.is_initialized()
        assert alone.is_main
        assert alone.gather("a") == ["a"]
        assert alone.from_main(lambda: 3) == 3
        assert list(alone.merge({2: "b", 0: "a"})) == [0, 2]
        assert alone.share([1, 2]) == [1, 2]
        value = torch.ones(2)
        alone.sum_([value])
        assert value.tolist() == [1, 1]
        assert alone.scatter(torch.tensor([5.0, 6.0]), [1, 0], 2).tolist() == [6, 5]
        assert alone.rows({1: value, 0: value[:1]})[0].tolist() == [1]
        alone.barrier()


ROUND_OFF = {torch.float64: 1e-9, torch.float32: 1e-4}


def numbers(folder: Path, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Whatever runs over the sequences of a batch, for whoever measures: alone or together."""
    policy = cases.policy(dtype=dtype)
    update, probe = cases.batch(policy), cases.batch(policy, num_prompts=4, group_size=2, seed=1)
    rng = np.random.default_rng(0)
    weights = tuple(rng.normal(size=n) * (i != 2) for i, n in enumerate(update.num_tokens))  # one has none
    own, theirs = SequenceGradients(update, response_logprob), SequenceGradients(probe, response_logprob)
    weighted = SequenceGradients(update, WeightedLogprobs(weights))
    u = {
        n: torch.rand(p.shape, generator=torch.Generator().manual_seed(1))
        for n, p in policy.parameters.items()
    }
    u = {n: t.to(policy.dtype) for n, t in u.items()}
    metrics = {"raw": None, "preconditioned": u}
    per_sequence = sum(p.element_size() * p.numel() for p in policy.parameters.values())
    found: dict[str, torch.Tensor] = {}
    for name, budget in (
        ("one block", Budget(max_sequences=2)),
        ("three blocks", Budget(max_sequences=2, memory_bytes=3 * per_sequence)),
        ("files", Budget(max_sequences=2, scratch=folder)),
    ):
        kernels = grams(policy, own, metrics=metrics, other=theirs, budget=budget)
        for metric in metrics:
            found[f"square {metric} {name}"] = kernels.square[metric]
            found[f"cross {metric} {name}"] = kernels.cross[metric]
            found[f"norms {metric} {name}"] = kernels.other_norms[metric]
        found[f"blocks {name}"] = torch.tensor(kernels.blocks)
    found["kernel"] = grams(policy, weighted, metrics={"raw": None}).square["raw"]
    found |= {f"gradient {n}": g for n, g in gradient(policy, update, WeightedLogprobs(weights)).items()}
    along = directional_derivative(policy, update, response_logprob, u)
    found |= {f"derivative {i}": row for i, row in enumerate(along)}
    found["dots"] = torch.from_numpy(per_sequence_dot(policy, weighted, u))
    stack = {n: torch.stack([t, 2 * t]) for n, t in u.items()}
    found["many dots"] = torch.from_numpy(per_sequence_dots(policy, own, stack))
    paired = paired_dots(policy, own, weighted, metrics, budget=Budget(max_sequences=2))
    found |= {f"paired {m}": torch.from_numpy(row) for m, row in paired.items()}
    sums = weighted_gradients(policy, own, rng.normal(size=(2, len(update))))
    found |= {f"sums {n}": t for n, t in sums.items()}
    found |= sketches(policy, own, Sketch(64), metrics=metrics)
    logprobs, entropies = score_rollouts(policy, update, budget=Budget(max_sequences=2))
    found["scored"] = torch.from_numpy(np.concatenate([*logprobs, *entropies]))
    first, second = derivatives(policy, update, [Entropy()], u, order=2)
    found |= {"slopes": torch.from_numpy(first.prefix), "curvatures": torch.from_numpy(second.logprobs)}
    return found


def together(rank: int, folder: Path, port: int) -> None:
    """All exchanges, in each of two processes."""
    started(rank, 2, port)
    assert current() is ALONE
    alone = {dtype: numbers(folder, dtype) for dtype in ROUND_OFF}
    with entered() as pair:
        assert current() is pair
        for dtype, close in ROUND_OFF.items():
            shared = numbers(folder, dtype)
            assert alone[dtype].keys() == shared.keys()
            for name, value in alone[dtype].items():
                about = close * max(1.0, float(value.abs().max()))
                torch.testing.assert_close(shared[name], value, rtol=close, atol=about, msg=f"{name} {dtype}")
            mine = [value.numpy().tobytes() for value in shared.values()]
            assert len(set(pair.gather(tuple(mine)))) == 1  # to the bit
        assert (pair.rank, pair.size, pair.is_main) == (rank, 2, rank == 0)
        assert pair.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
        assert pair.merge({1 - rank: str(rank)}) == {0: "1", 1: "0"}
        assert (pair.least(rank), pair.most(rank)) == (0, 1)
        assert pair.from_main(lambda: f"of {rank}") == "of 0"
        a, b = torch.full((2, 3), rank + 1.0), torch.arange(6.0).view(2, 3).T * (rank + 1)
        pair.sum_([a, b])
        assert a.tolist() == [[3.0] * 3] * 2
        assert torch.equal(b, 3 * torch.arange(6.0).view(2, 3).T)
        places = pair.share([3, 1, 0, 2])
        own = torch.tensor([[float(i), torch.pi * i] for i in places], dtype=torch.float64)
        expected = torch.stack(
            [torch.arange(4.0, dtype=torch.float64), torch.pi * torch.arange(4.0).double()]
        )
        assert torch.equal(pair.scatter(own, places, 4), expected.T)
        rows = pair.rows({i: torch.full((i, 2), float(i)) for i in places})
        assert [tuple(row.shape) for row in rows.values()] == [(0, 2), (1, 2), (2, 2), (3, 2)]
        assert all(bool((row == i).all()) for i, row in rows.items())
        assert pair.rows({0: torch.ones(1)} if rank else {})[0].tolist() == [1]
        (folder / str(rank)).touch()
        pair.barrier()
        assert (folder / str(1 - rank)).exists()

        def refuse() -> int:
            raise ValueError("no such file")

        with pytest.raises(ValueError if rank == 0 else PeerError, match=r"no such|first process"):
            pair.from_main(refuse)
    assert torch.distributed.is_initialized()  # as in a training: nothing is collective until one enters
    assert current().gather(rank) == [rank]
    with entered() as again:
        assert again.gather(rank) == [0, 1]
    if rank == 1:
        with entered():
            os._exit(0)
    begin = time.monotonic()
    with pytest.raises(PeerError, match="has ended"), entered() as pair:
        pair.barrier()
    assert time.monotonic() - begin < 30


def test_two_processes_hold_the_same(tmp_path: Path) -> None:
    multiprocessing.spawn(together, (tmp_path, free_port()), nprocs=2)


def test_processes_without_a_gpu_each_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(group.ConfigError, match=r"2 processes or more on a machine with 1 GPU"):
        group._place(None)
