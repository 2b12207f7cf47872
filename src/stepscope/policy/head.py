"""A model cut in two: the last hidden states, and what its head says of some positions at a time.

Logits of a whole micro-batch at a large vocabulary take many times the memory of everything else. Here the
backbone runs once, and the model's own forward pass makes logits out of a few positions' hidden states, with
the backbone replaced by them: so whatever a model does to its logits (soft-capping, scaling, an adapted or
tied head) is done. In reverse mode each piece is computed again when its gradient is asked for.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedConfig

from stepscope.policy.numerics.differentiation import num_lanes

PIECE_BYTES = 4 * 2**20
"""Logits that are made at a time of a small vocabulary; for second derivatives thirty times that is held."""

LARGE_PIECE_BYTES = 32 * 2**20 + 1
"""Of a vocabulary so large that :data:`FEWEST` positions take more than the former.

Tensors of up to 32 MiB may come from glibc's heap, which gives little of them back: of pieces of 20 MiB the
peak is two to five times that of these.
"""

FEWEST = 64
"""Positions for which the smaller pieces do: with fewer, a product takes as long as reading the head does."""

ON_GPU = 8
"""How many times the larger pieces are made at a time on a GPU, which has no use for little."""

T = TypeVar("T")
Inside = Callable[[], AbstractContextManager[Any]]
_replaying: list[bool] = []
_found: WeakKeyDictionary[nn.Module, type[Any] | None] = WeakKeyDictionary()


def replaying() -> bool:
    """Whether what runs has been run before, or is a trial: nothing that counts calls should count these."""
    return bool(_replaying)


def runs_whole(model: nn.Module) -> bool:
    """Whether a model is known to be one that cannot be cut, so that its logits are all made at once."""
    return model in _found and _found[model] is None


class Replay:
    """A block that counts as :func:`replaying`; it may be entered again and again."""

    def __enter__(self) -> None:
        _replaying.append(True)

    def __exit__(self, *error: object) -> None:
        _replaying.pop()


@dataclass(frozen=True)
class Head:
    """What stands after a model's backbone.

    Attributes:
        whole: the model, an adapter's wrapper included.
        model: the transformers model itself.
        output: class of what its backbone returns.
        size: positions of each sequence that have logits at a time.
        inside: contexts in which the model runs, made anew for each piece.
        params: values to use instead of the model's own, by their name in ``whole``, or None.
    """

    whole: nn.Module
    model: nn.Module
    output: type[Any]
    size: int
    inside: Inside
    params: Mapping[str, Tensor] | None

    def hidden(self, inputs: Mapping[str, Any]) -> Tensor:
        """(seq, pos, hidden) last hidden states of the backbone."""
        accepted = inspect.signature(_backbone(self.model).forward).parameters
        given = {name: value for name, value in inputs.items() if name in accepted}
        with self.inside():
            found: Tensor = self._run(lambda: _backbone(self.model)(**given).last_hidden_state)
        return found

    def in_pieces(
        self, say: Callable[[Tensor, slice], tuple[Tensor, ...]], hidden: Tensor, ids: Tensor
    ) -> tuple[Tensor, ...]:
        """What a function of logits says of every position, a few positions at a time.

        Args:
            say: (seq, some, vocab) logits and which positions they are of to (seq, some) figures.
            hidden: (seq, tok, hidden).
            ids: (seq, tok) the tokens that follow.
        """

        def piece(states: Tensor, at: slice) -> tuple[Tensor, ...]:
            return say(self.logits(states, ids[:, at]), at)

        run: Callable[..., tuple[Tensor, ...]] = piece
        if torch.is_grad_enabled() and self.params is None:
            run = partial(
                checkpoint, piece, use_reentrant=False, preserve_rng_state=False, context_fn=_contexts
            )
        length = ids.shape[1]
        starts = range(0, length, self.size)
        cuts = [slice(start, min(start + self.size, length)) for start in starts]
        parts = [run(*rows) for rows in zip(torch.split(hidden, self.size, 1), cuts, strict=True)]
        return tuple(torch.cat(columns, 1) for columns in zip(*parts, strict=True))

    def logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(seq, some, vocab) of (seq, some, hidden) states before (seq, some) tokens."""
        with self.inside():
            return self._run(lambda: self._logits(states, tokens))

    def _logits(self, states: Tensor, tokens: Tensor) -> Tensor:
        # of what is not contiguous, matmul would multiply each sequence with a copy of the head of its own
        with _returning(_backbone(self.model), self.output(last_hidden_state=states.contiguous())):
            found: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return found

    def _run(self, body: Callable[[], T]) -> T:
        if self.params is None:
            return body()
        values = {f"model.{name}": value for name, value in self.params.items()}
        found: T = torch.func.functional_call(_Called(self.whole, body), values, ())
        return found


class _Called(nn.Module):
    """A function of a model's parameters that is not its forward pass, as a module."""

    def __init__(self, model: nn.Module, body: Callable[[], Any]) -> None:
        super().__init__()
        self.model, self.body = model, body

    def forward(self) -> Any:
        return self.body()


def head_of(
    whole: nn.Module,
    model: nn.Module,
    ids: Tensor,
    *,
    inside: Inside,
    params: Mapping[str, Tensor] | None = None,
) -> Head | None:
    """The head of a model, to be run on pieces of a batch.

    Cut and whole model are compared on a short row when a model is first seen.

    Args:
        whole: the model, an adapter's wrapper included.
        model: the transformers model itself.
        ids: (seq, tok) positions of which logits are needed.
        inside: contexts in which it has to run.
        params: values to use instead of its own.

    Returns:
        None where all logits are one piece, and where cut and whole model do not say the same.
    """
    config = getattr(model, "config", None)
    if not isinstance(config, PreTrainedConfig):
        return None
    itemsize = torch.promote_types(next(model.parameters()).dtype, torch.float32).itemsize
    each = config.get_text_config().vocab_size * itemsize
    most = PIECE_BYTES if FEWEST * each <= PIECE_BYTES else LARGE_PIECE_BYTES
    if ids.device.type != "cpu":
        most = ON_GPU * LARGE_PIECE_BYTES
    size = -(-most // (len(ids) * each * num_lanes()))
    if size >= ids.shape[1]:
        return None
    if whole not in _found:
        _found[whole] = _cut(whole, model, ids[:1, :5], inside)
    output = _found[whole]
    return None if output is None else Head(whole, model, output, size, inside, params)


def _backbone(model: nn.Module) -> nn.Module:
    found: nn.Module = getattr(model, str(model.base_model_prefix))
    return found


def _cut(whole: nn.Module, model: nn.Module, ids: Tensor, inside: Inside) -> type[Any] | None:
    """The class of what a model's backbone returns, where the model can be cut; tried on a row of tokens."""
    prefix = str(getattr(model, "base_model_prefix", ""))
    if not prefix or not isinstance(getattr(model, prefix, None), nn.Module):
        return None
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "use_cache": False}
    with torch.no_grad(), Replay(), inside():
        expected = whole(**inputs).logits
        states = _backbone(model)(**inputs)
        hidden = getattr(states, "last_hidden_state", None)
        if hidden is None or hidden.shape[:2] != ids.shape:
            return None
        said = Head(whole, model, type(states), 1, inside, None)._logits(hidden[:, 1:], ids[:, 1:])
    expected = expected[:, 1:]
    same = said.shape == expected.shape and torch.allclose(said, expected, rtol=1e-4, atol=1e-4)
    return type(states) if same else None


@contextmanager
def _returning(module: nn.Module, value: Any) -> Iterator[None]:
    """A block in which a module returns a value, whatever it is called with."""
    own = vars(module).get("forward")
    module.forward = lambda *args, **kwargs: value
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _contexts() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), Replay()
