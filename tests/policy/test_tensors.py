"""Models made of given tensors: the same as from files, whatever wrappers put into names, or an error."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

import cases
from stepscope.errors import CheckpointError
from stepscope.policy.checkpoint.adapters import load_adapter
from stepscope.policy.checkpoint.models import load_model, model_of_tensors
from stepscope.policy.checkpoint.names import Names
from stepscope.policy.checkpoint.tensors import trained_types


def saved(model: Any, tokenizer: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Late:
    """A tensor that is read when it is asked for, and then only once."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self.shape, self.dtype, self.read = tensor.shape, tensor.dtype, 0

    def __getitem__(self, index: Any) -> Tensor:
        self.read += 1
        return self._tensor[index]


def wrapped(name: str) -> str:
    first, _, rest = name.partition(".")
    return f"module._fsdp_wrapped_module.{first}._orig_mod._checkpoint_wrapped_module.{rest}"


def test_a_model_of_tensors_is_that_of_its_files(architecture: str, tokenizer: Any, tmp_path: Path) -> None:
    made = cases.model(architecture)
    made.generation_config = GenerationConfig(eos_token_id=[1, 5])
    folder = saved(made, tokenizer, tmp_path)
    late = {wrapped(name): Late(t) for name, t in made.state_dict().items()}
    (folder / "model.safetensors").rename(tmp_path / "aside")
    found, _ = model_of_tensors(folder, late, dtype=torch.float64)
    (tmp_path / "aside").rename(folder / "model.safetensors")
    expected, _ = load_model(folder, dtype=torch.float64)
    assert found.generation_config.eos_token_id == [1, 5]
    assert [n for n, _ in found.named_parameters()] == [n for n, _ in expected.named_parameters()]
    ids = torch.arange(2, 9)[None]
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert max(t.read for t in late.values()) == 1


def test_a_tied_weight_need_be_there_once(tokenizer: Any, tmp_path: Path) -> None:
    made = cases.model("qwen2")
    folder = saved(made, tokenizer, tmp_path)
    tensors = dict(made.state_dict())
    assert tensors.pop("lm_head.weight") is not None
    found, _ = model_of_tensors(folder, tensors, dtype=torch.float32)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, made.lm_head.weight)


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing": (lambda t: t.pop("model.norm.weight"), r"are missing, model\.norm\.weight among them"),
    "too much": (
        lambda t: t.update(more=torch.ones(2)),
        "have no place in Qwen2ForCausalLM, more among them",
    ),
    "another shape": (
        lambda t: t.update({"model.norm.weight": torch.ones(3)}),
        r"model\.norm\.weight among them: got \(3,\), expected \(16,\)",
    ),
    "twice": (
        lambda t: t.update({"module.model.norm.weight": torch.ones(16)}),
        r"two stored weights are model\.norm\.weight",
    ),
    "not finite": (lambda t: t["model.norm.weight"].fill_(float("nan")), r"weight model\.norm\.weight"),
    "nothing": (lambda t: t.clear(), "there are no weights"),
    "little": (lambda t: [t.pop(n) for n in [*t][3:]], "layers|parameters, and the files hold|are missing"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_tensors_of_another_model_are_named(fault: str, tokenizer: Any, tmp_path: Path) -> None:
    made = cases.model("qwen2")
    folder = saved(made, tokenizer, tmp_path)
    tensors = {name: t.clone() for name, t in made.state_dict().items()}
    change, said = FAULTS[fault]
    change(tensors)
    with pytest.raises(CheckpointError, match=said):
        model_of_tensors(folder, tensors, dtype=torch.float32)


@pytest.fixture
def adapter(tokenizer: Any, tmp_path: Path) -> tuple[Any, Path]:
    """An adapted model and its folder, without the weights that the tests give."""
    saved(cases.model(seed=1), tokenizer, tmp_path / "base")
    base, _ = load_model(tmp_path / "base", dtype=torch.float32)
    made = cases.adapted(base, modules_to_save=["lm_head"], use_dora=True, task_type="CAUSAL_LM")
    folder = saved(made, tokenizer, tmp_path / "adapter")
    return made, folder


def kept(made: Any, folder: Path, form: str) -> dict[str, Tensor]:
    """Weights of an adapted model under the names that a training writes."""
    whole = made.state_dict()
    trained = {n for n, p in made.named_parameters() if p.requires_grad}
    if form == "trained":
        return {wrapped(n): t for n, t in whole.items() if n in trained}
    if form == "all":
        return dict(whole)
    from safetensors.torch import load_file

    return dict(load_file(folder / "adapter_model.safetensors"))


@pytest.mark.parametrize("form", ["trained", "all", "file"])
def test_an_adapter_of_tensors_is_that_of_its_file(adapter: tuple[Any, Path], form: str) -> None:
    made, folder = adapter
    tensors = kept(made, folder, form)
    expected, _ = load_adapter(folder, dtype=torch.float64)
    (folder / "adapter_model.safetensors").unlink()
    found, _ = load_adapter(folder, dtype=torch.float64, tensors=tensors)
    ids = torch.arange(2, 9)[None]
    assert torch.equal(found(input_ids=ids).logits, expected(input_ids=ids).logits)
    assert {n for n, p in found.named_parameters() if p.requires_grad} == {
        n for n, p in expected.named_parameters() if p.requires_grad
    }


def test_weights_of_the_base_are_those_given(adapter: tuple[Any, Path]) -> None:
    made, folder = adapter
    name = "base_model.model.model.norm.weight"
    tensors = kept(made, folder, "all") | {name: torch.full((16,), 3.0)}
    found, _ = load_adapter(folder, dtype=torch.float32, tensors=tensors)
    assert torch.equal(found.get_parameter(name), torch.full((16,), 3.0))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.popitem(), "1 trained weights are missing"),
        (lambda t: t.update(more=torch.ones(2)), "weight more has no place in the model"),
        (lambda t: t.update({next(iter(t)): torch.ones(2, 3, 4)}), r"has shape \(2, 3, 4\), expected"),
        (
            lambda t: t.update({f"module.{name}": w + 1 for name, w in [*t.items()][:1]}),
            "are one weight of the model and not the same",
        ),
    ],
)
def test_an_adapter_of_other_tensors_is_refused(
    adapter: tuple[Any, Path], change: Callable[[dict[str, Tensor]], Any], said: str
) -> None:
    made, folder = adapter
    tensors = kept(made, folder, "trained")
    change(tensors)
    with pytest.raises(CheckpointError, match=said):
        load_adapter(folder, dtype=torch.float32, tensors=tensors)


def test_types_are_those_of_what_was_trained() -> None:
    tensors = {
        "base_model.model.a.base_layer.weight": torch.ones(1).bfloat16(),
        "n": torch.ones(1, dtype=torch.int8),
    }
    assert trained_types(tensors) == ("bfloat16",)
    assert trained_types(tensors | {"base_model.model.a.lora_A.default.weight": torch.ones(1)}) == (
        "float32",
    )


def test_a_name_that_is_the_models_own_is_left() -> None:
    names = Names(["a.module.w", "module.b", "b"])
    assert names.own("a.module.w") == "a.module.w"
    assert names.own("_orig_mod.a.w") == "a.module.w"
    assert (names.own("module.b"), names.own("b")) == ("module.b", "b")
    assert names.own("_orig_mod.b") is None  # module.b and b alike
    assert names.own("c") is None
