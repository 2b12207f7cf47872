"""Loading PEFT adapters: on the base they were trained on, as it was when they were."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from peft.utils import get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from stepscope.errors import CheckpointError, shown
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.models import LOADING, brief, load_tokenizer, load_weights, placed, quiet
from stepscope.policy.checkpoint.names import ADAPTED, unwrapped
from stepscope.policy.checkpoint.tensors import Stored, fill
from stepscope.policy.numerics.differentiation import Substituted
from stepscope.policy.numerics.finiteness import refuse_broken_weights

ADAPTER_CONFIG = "adapter_config.json"
"""Present in a folder that holds a PEFT adapter."""

ADAPTER_WEIGHTS = "adapter_model.safetensors"
"""The adapter's weights beside it."""

REFERENCE = "ref"
"""Name of TRL's frozen copy of the starting adapter, and of its subfolder."""

_KEEPING = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
"""``init_lora_weights`` that leave the base as it is."""

_REWRITING = ("pissa", "olora")
"""Those that take their share out of the base, the same share every time: PEFT does it again on loading."""

_originals: WeakKeyDictionary[nn.Module, dict[str, Tensor]] = WeakKeyDictionary()
"""Base weights, by name in the adapted model, as they were before an initialisation rewrote them."""


@reads_foreign
def load_adapter(
    folder: Path,
    *,
    dtype: torch.dtype,
    device: torch.device | str | None = None,
    revision: str | None = None,
    tensors: Mapping[str, Stored] | None = None,
) -> tuple[nn.Module, Any]:
    """Load a PEFT adapter, trainable, on its base model, and its tokenizer (or else the base's).

    The base is what ``adapter_config.json`` names: a hub id, a folder (also relative to the adapter), or a
    GGUF file. Every stored tensor is verified to have arrived. TRL's frozen copy of the starting adapter in
    the subfolder ``ref``, the reference of its KL penalty, is loaded too. Where the initialisation rewrote
    the base (PiSSA, OLoRA), PEFT rewrites it again, in float32 as in training.

    Args:
        folder: the adapter.
        dtype: of the parameters.
        device: where it goes; None for a GPU where there is one.
        revision: of a base on the hub, where ``adapter_config.json`` does not say.
        tensors: the adapter's weights, and what else of the model there is, by name; None for those of
            ``adapter_model.safetensors``.

    Raises:
        CheckpointError: config, weights or base are missing or damaged, do not fit each other, or the base
            the adapter was trained on cannot be had from the files.
    """
    try:
        config = json.loads((folder / ADAPTER_CONFIG).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
        revision = config.get("revision") or revision
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: cannot be read ({brief(error)}); copy it again"
        ) from error
    if not isinstance(base, str) or not base:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: base_model_name_or_path is {shown(base)}, expected the base model's "
            "name or folder; write it in"
        )
    initialisation = config.get("init_lora_weights")
    _refuse_lost_base(folder, initialisation)
    stored = _adapter_weights(folder / ADAPTER_WEIGHTS) if tensors is None else tensors
    beside = folder / base
    source = beside if beside.exists() else base
    # initialisations compute in float32 and refuse float64, so the lifting comes after them
    early = torch.float32 if dtype == torch.float64 else dtype
    model: Any = load_weights(source, dtype=early, device="cpu", revision=revision)
    own = (folder / "tokenizer_config.json").is_file()
    tokenizer = load_tokenizer(folder) if own else load_tokenizer(source, revision=revision)
    _resize(model, stored)
    before = dict(model.state_dict(keep_vars=True)) if initialisation in _REWRITING else {}
    kept = {name: tensor.detach().clone() for name, tensor in before.items()}
    try:
        with quiet():
            peft_config = PeftConfig.from_pretrained(str(folder))
            if peft_config.is_prompt_learning:
                raise ValueError(f"{peft_config.peft_type.value} learns a prompt, not weights")
            adapted: Any = (
                PeftModel.from_pretrained(model, str(folder), config=peft_config, is_trainable=True)
                if tensors is None
                else adapter_on(model, peft_config, tensors, where=str(folder))
            )
            if (folder / REFERENCE / ADAPTER_CONFIG).is_file():
                adapted.load_adapter(str(folder / REFERENCE), REFERENCE)
    except (*LOADING, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{folder}: the adapter does not load onto its base {base} ({brief(error)}); check that this "
            "is the base it was trained on"
        ) from error
    refuse_broken_weights(adapted, str(folder))
    if tensors is None:
        _verify_adapter(folder, adapted, stored)
    _check_vocabulary(folder, model, tokenizer)
    ready = placed(adapted, dtype, device)
    names = {id(tensor): name for name, tensor in adapted.named_parameters()}
    rewritten = {
        names[id(tensor)]: kept[name].to(tensor)
        for name, tensor in before.items()
        if id(tensor) in names and not torch.equal(kept[name].to(tensor), tensor)
    }
    if rewritten:
        _originals[ready] = rewritten
    return ready, tokenizer


def adapter_on(
    base: nn.Module, config: PeftConfig, tensors: Mapping[str, Stored], *, where: str
) -> nn.Module:
    """An adapter on its base, trainable, with given weights.

    Args:
        base: the model, which becomes a part of the adapted one.
        config: of the adapter.
        tensors: the adapter's weights by name, as the adapted model or the adapter's own file has them, and
            weights of the base, which replace its own.
        where: what to name in an error.

    Raises:
        CheckpointError: a weight of the adapter is missing, or one has another shape or no place.
    """
    named = config.base_model_name_or_path
    config.inference_mode = False
    adapted: nn.Module = get_peft_model(base, config)
    config.base_model_name_or_path = named
    fill(adapted, tensors, where=where)
    return adapted


def is_adapted(model: nn.Module) -> bool:
    """Whether a model is a PEFT adapter on its base, which is then its reference."""
    return isinstance(model, PeftModel)


def base_is_rewritten(model: nn.Module) -> bool:
    """Whether the adapter's initialisation took its share out of the base, so that the base alone is less."""
    return model in _originals


@contextmanager
def reference_adapter(model: nn.Module, *, as_trained: bool = True) -> Iterator[None]:
    """Inside the block an adapted model is its reference: under the adapter ``ref``, or else under none.

    What is trainable stays so: PEFT changes that with every switch, which no ``torch.func`` transform allows.

    Args:
        model: the adapted model.
        as_trained: of a base that the initialisation rewrote, use what is left of it, as TRL's KL penalty
            does; otherwise the base as it was, the model that the training started from.
    """
    adapted: Any = model
    fixed_trainability = Substituted({Tensor.requires_grad_: _unchanged})
    with ExitStack() as stack:
        stack.enter_context(fixed_trainability)
        if REFERENCE not in adapted.peft_config:
            stack.enter_context(adapted.disable_adapter())
            if not as_trained:
                stack.enter_context(_replaced(model, _originals.get(model, {})))
        else:
            stack.callback(adapted.set_adapter, adapted.active_adapter)
            adapted.set_adapter(REFERENCE)
        yield


@contextmanager
def _replaced(model: nn.Module, weights: Mapping[str, Tensor]) -> Iterator[None]:
    """A block in which some parameters are others."""
    places = [(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in weights]
    own = [module._parameters[attribute] for module, attribute in places]
    try:
        for (module, attribute), value in zip(places, weights.values(), strict=True):
            module._parameters[attribute] = nn.Parameter(value, requires_grad=False)
        yield
    finally:
        for (module, attribute), parameter in zip(places, own, strict=True):
            module._parameters[attribute] = parameter


def _unchanged(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    return tensor


def _refuse_lost_base(folder: Path, initialisation: Any) -> None:
    """Refuse adapters whose base, as it was in training, is neither stored nor made again by PEFT."""
    if initialisation in _KEEPING or initialisation in _REWRITING:
        return
    raise CheckpointError(
        f"{folder / ADAPTER_CONFIG}: init_lora_weights is {shown(initialisation)}, which rewrites the base "
        "with what no file keeps (random numbers, data, a quantization), so the trained model "
        "cannot be rebuilt; save the adapter as a plain one from the training (save_pretrained with "
        "path_initial_model_for_weight_conversion)"
    )


def _resize(model: Any, stored: Mapping[str, Stored]) -> None:
    """Give the base as many embedding rows as the adapter stores: it was trained with added tokens."""
    embedding = model.get_input_embeddings()
    path = next((n for n, module in model.named_modules() if module is embedding), "")
    known = {unwrapped(name): tensor for name, tensor in stored.items()}
    for inner in ("", "base_layer.", "modules_to_save.default."):
        name = f"{ADAPTED}{path}.{inner}weight"
        rows = known[name].shape[0] if name in known else embedding.weight.shape[0]
        if rows != embedding.weight.shape[0]:
            model.resize_token_embeddings(rows, mean_resizing=False)
            return


def _check_vocabulary(folder: Path, model: Any, tokenizer: Any) -> None:
    rows = model.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} tokens and the model {rows} embedding rows, so "
            "the training added tokens whose rows are not stored; save the adapter with "
            "save_embedding_layers=True"
        )


def _verify_adapter(folder: Path, adapted: Any, stored: Mapping[str, Stored]) -> None:
    """Every stored tensor must be in the model as it is, and every adapter tensor of the model be stored."""
    arrived = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if set(stored) - set(arrived):
        arrived = get_peft_model_state_dict(adapted, save_embedding_layers=True)
    for name in sorted(set(stored) | set(arrived)):
        if name not in stored or name not in arrived:
            raise CheckpointError(
                f"{folder}: adapter weight {name} is "
                f"{'not stored' if name in arrived else 'unknown to the model'}; check that the base is "
                "the one it was trained on, or copy the adapter again"
            )
        if not torch.equal(stored[name][...].to(arrived[name].dtype), arrived[name].cpu()):
            raise CheckpointError(f"{folder}: adapter weight {name} did not load as stored; copy it again")


def _adapter_weights(path: Path) -> dict[str, torch.Tensor]:
    if not path.is_file():
        raise CheckpointError(
            f"{path}: no adapter weights; save the adapter as safetensors, or copy the checkpoint again"
        )
    try:
        return dict(load_file(str(path)))
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path}: damaged ({brief(error)}); copy the file again") from error
