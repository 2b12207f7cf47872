from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from stepscope.errors import CheckpointError
from stepscope.policy import vectors


@pytest.fixture
def pair() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)

    def draw() -> dict[str, Tensor]:
        return {"a": torch.randn(3, 2, generator=generator), "b": torch.randn(4, generator=generator)}

    return draw(), draw()


def flat(v: dict[str, Tensor]) -> Tensor:
    return torch.cat([v["a"].flatten(), v["b"].flatten()]).double()


def test_algebra_is_that_of_the_flattened_vectors(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    x, y = pair
    assert vectors.dot(x, y) == pytest.approx(float(flat(x) @ flat(y)), rel=1e-12)
    assert vectors.norm(x) == pytest.approx(float(flat(x).norm()), rel=1e-12)
    assert vectors.cosine(x, y) == pytest.approx(float(torch.cosine_similarity(flat(x), flat(y), dim=0)))
    torch.testing.assert_close(flat(vectors.add(x, y, x)), 2 * flat(x) + flat(y))
    torch.testing.assert_close(flat(vectors.scale(x, -3.0)), -3 * flat(x))
    torch.testing.assert_close(flat(vectors.multiply(x, y)), flat(x) * flat(y))
    assert math.isnan(vectors.cosine(x, vectors.zeros_like(x)))


def test_sums_are_accumulated_in_float64() -> None:
    large = {"a": torch.tensor([1e8, 1.0, -1e8])}
    assert vectors.dot(large, {"a": torch.ones(3)}) == 1.0


def test_adding_leaves_the_terms_alone(pair: tuple[dict[str, Tensor], dict[str, Tensor]]) -> None:
    x, y = pair
    kept = flat(x).clone()
    vectors.add(x, y)
    assert torch.equal(flat(x), kept)


def test_files_come_back_bit_for_bit(
    pair: tuple[dict[str, Tensor], dict[str, Tensor]], tmp_path: Path
) -> None:
    x = pair[0] | {"c": torch.randn(5, 4, dtype=torch.float64).T}
    vectors.save(x, tmp_path / "v.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["v.safetensors"]
    again = vectors.load(tmp_path / "v.safetensors")
    assert set(again) == set(x)
    assert all(torch.equal(again[n], x[n]) and again[n].dtype == x[n].dtype for n in x)
    (tmp_path / "v.safetensors").write_bytes(b"abc")
    for name in ("v.safetensors", "absent.safetensors"):
        with pytest.raises(CheckpointError, match="cannot be read as safetensors") as caught:
            vectors.load(tmp_path / name)
        assert "\n" not in str(caught.value)


def test_a_shift_is_undone_bitwise_even_after_an_error() -> None:
    layer = nn.Linear(3, 2)
    params = dict(layer.named_parameters())
    before = {n: p.detach().clone() for n, p in params.items()}
    direction = {"weight": torch.full((2, 3), 1e9)}

    def fail_inside() -> None:
        with vectors.shifted(params, direction, 0.1):
            torch.testing.assert_close(layer.weight, before["weight"] + 1e8)
            assert torch.equal(layer.bias, before["bias"])
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_inside()
    assert all(torch.equal(params[n], before[n]) for n in before)
