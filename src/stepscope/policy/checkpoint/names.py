"""Names of tensors as wrappers and libraries write them, and which of a model's own they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from peft import PeftModel
from peft.utils import get_peft_model_state_dict
from torch import nn

WRAPPERS = frozenset(
    {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module"}
)
"""What DDP, DeepSpeed, ``torch.compile``, FSDP and activation checkpointing put into a name."""

ADAPTED = "base_model.model."
"""What PEFT puts before the names of the model that it adapts."""


def unwrapped(name: str) -> str:
    """A name without the parts that wrappers have put into it."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)


class Names:
    """A model's own names, found again under the names that a training has written.

    A name is looked up as it stands, then without wrappers, then as one of the other names of a tensor. Two
    own names that become one without wrappers are found as they stand only.

    Args:
        own: names of the model.
        others: further names of its tensors, such as those of an adapter's file, with the model's own.
    """

    def __init__(self, own: Iterable[str], others: Mapping[str, str] | None = None) -> None:
        self._own = frozenset(own)
        pairs = [(unwrapped(name), name) for name in self._own]
        known = dict(pairs)
        clashing = {short for short, name in pairs if known[short] != name}
        self._by_short = {short: name for short, name in known.items() if short not in clashing}
        for other, name in (others or {}).items():
            self._by_short.setdefault(unwrapped(other), name)

    @classmethod
    def of(cls, model: nn.Module) -> Names:
        """The names of a model's parameters and buffers; a tied weight is found under each of its names.

        An adapter's tensors are also found as its file names them (without the adapter's own name), and those
        of an adapted model without ``base_model.model.``.
        """
        first = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
        others = {n: first[id(p)] for n, p in model.named_parameters(remove_duplicate=False)}
        if isinstance(model, PeftModel):
            kept = dict(model.state_dict(keep_vars=True))
            in_file = get_peft_model_state_dict(model, state_dict=kept, save_embedding_layers=False)
            others |= {name: first[id(t)] for name, t in in_file.items() if id(t) in first}
            bare = {name.removeprefix(ADAPTED): own for name, own in others.items()}
            others = bare | others
        return cls(first.values(), others)

    def own(self, name: str) -> str | None:
        """The model's own name of what a training calls ``name``; None where it has no such tensor."""
        return name if name in self._own else self._by_short.get(unwrapped(name))
