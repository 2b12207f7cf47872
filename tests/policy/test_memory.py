"""Memory at hand, within control groups of both versions, and what a token is said to take of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

import cases
from stepscope.policy import memory
from stepscope.policy.forward import base_model
from stepscope.policy.state import Policy


def kept(model: nn.Module, length: int) -> float:
    """Bytes per token that the backbone keeps for its backward pass of two sequences."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    seen: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            seen[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    ids = torch.randint(2, 12, (2, length))
    whole = base_model(model)
    backbone = getattr(whole, str(whole.base_model_prefix))
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        states = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    assert states.last_hidden_state.requires_grad
    return sum(tensor.untyped_storage().nbytes() for tensor in seen.values()) / ids.numel()


@pytest.mark.parametrize("architecture", [*cases.ARCHITECTURES, "qwen3_moe"])
@pytest.mark.parametrize("kind", ["full", "adapter", "eager"])
def test_a_token_takes_no_more_than_it_is_said_to(architecture: str, kind: str) -> None:
    if architecture == "qwen3_moe" and kind == "adapter":
        pytest.skip("adapters on experts make whole matrices, which no token pays for")
    model = cases.model(architecture, **({"n_embd": 64} if architecture == "gpt2" else {"hidden_size": 60}))
    if kind == "adapter":
        model = cases.adapted(model, target_modules="all-linear")
    if kind == "eager":
        model.set_attn_implementation("eager")
    said = memory.cost(model, "passes")
    for length in (20, 60):
        own = kept(model, length)
        assert own <= said.per_token(length, length) <= 6 * own


def test_keys_and_values_are_counted_for_generation() -> None:
    model = cases.model("llama")
    ids = torch.randint(2, 12, (2, 40))
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True).past_key_values
    held = sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)) / ids.numel()
    said = memory.cost(model, "generation")
    assert 2 * held <= said.token
    assert said.sequence == memory.PER_LOGIT * model.config.vocab_size


def group(folder: Path, limit: str, used: str, *, version: int, files: int = 0) -> None:
    folder.mkdir(parents=True)
    names = (
        ("memory.max", "memory.current")
        if version == 2
        else ("memory.limit_in_bytes", "memory.usage_in_bytes")
    )
    for name, value in zip(names, (limit, used), strict=True):
        (folder / name).write_text(value + "\n")
    name = "inactive_file" if version == 2 else "total_inactive_file"
    (folder / "memory.stat").write_text(f"cache 7\n{name} {files}\n")


@pytest.mark.parametrize("version", [1, 2])
def test_control_groups_limit_the_memory_at_hand(tmp_path: Path, version: int) -> None:
    own, top = tmp_path / "own", tmp_path / "groups" / ("" if version == 2 else "memory")
    own.write_text("3:cpu:/else\n0::/job/step\n" if version == 2 else "4:memory:/job/step\n3:cpu:/else\n")
    group(top / "job", "1000", "700", version=version, files=50)
    group(top / "job/step", "max" if version == 2 else str(2**62), "10", version=version)
    assert min(memory._left_in_groups(tmp_path / "groups", own)) == 350
    assert memory._left_in_groups(tmp_path / "nothing", own) == []
    assert memory._left_in_groups(tmp_path, tmp_path / "nothing") == []


def test_memory_at_hand_is_below_that_of_the_machine() -> None:
    assert 2**20 < memory.available_bytes(torch.device("cpu")) < 2**46


def test_room_is_half_of_what_is_left_beside_what_is_kept(
    tiny_policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    each, vector = (
        memory.cost(tiny_policy.model, "passes").token,
        sum(p.nbytes for p in tiny_policy.parameters.values()),
    )
    for bytes_kept in (0, 10**7):
        at_hand = int(bytes_kept + vector + 2 * 1.4 * 2**20 * each)
        monkeypatch.setattr(memory, "available_bytes", lambda device, found=at_hand: found)
        found = memory.room(tiny_policy, "passes", narrowest=10, widest=20, kept_bytes=bytes_kept)
        assert found == 2**20
    nothing = Policy(nn.Identity(), None, tiny_policy.settings)
    assert memory.room(nothing, "passes", narrowest=10, widest=20, kept_bytes=0) is None
