"""How many padded tokens fit the memory at hand, told from a model's sizes.

An estimate on the safe side, that decides how large micro-batches begin: where it was too large all the same,
``policy.passes`` halves them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch
from torch import nn
from transformers import PreTrainedConfig

from stepscope.policy.group import current
from stepscope.policy.head import runs_whole
from stepscope.policy.shards import part
from stepscope.policy.state import Policy

Use = Literal["passes", "generation"]
"""``passes`` may keep a graph of all layers; ``generation`` keeps keys and values of all tokens."""

SHARE = 0.5
"""Of the memory at hand, what a micro-batch may take."""

KEPT = 2.0
"""Numbers that a layer keeps for its backward pass, over those that go in and out of its linear maps."""

NARROW = 8
"""Of a map that is wider by so much on one side, as both of a LoRA pair, half is counted."""

SQUARES = 3
"""Numbers that attention without a kernel of its own keeps for a pair of positions and head."""

PER_LOGIT = 48
"""Bytes for each token of the vocabulary while one is drawn: three float64 and what they are made of."""


@dataclass(frozen=True)
class Cost:
    """Bytes that a micro-batch takes at its peak.

    Attributes:
        token: for each padded token.
        pair: for each pair of padded tokens of a sequence.
        sequence: for each sequence.
    """

    token: float
    pair: float = 0.0
    sequence: float = 0.0

    def per_token(self, narrowest: int, widest: int) -> float:
        """Bytes for each padded token of sequences of such widths, at most."""
        return self.token + self.pair * widest + self.sequence / narrowest


def room(policy: Policy, use: Use, *, narrowest: int, widest: int, kept_bytes: int) -> int | None:
    """Padded tokens that a micro-batch may have; a power of two, so that it hardly changes between runs.

    Args:
        policy: its model is used.
        use: for what.
        narrowest: width of the narrowest sequence, in tokens.
        widest: of the widest one.
        kept_bytes: for what is kept from one micro-batch to the next.

    Returns:
        None where nothing is known of the model.
    """
    each = cost(policy.model, use).per_token(narrowest, widest)
    if not each:
        return None
    left = available_bytes(policy.device)
    if policy.device.type == "cpu":  # which those on one machine share
        left //= current().size
    if use == "passes":
        left = max(left // 4, left - kept_bytes - sum(part(p).nbytes for p in policy.parameters.values()))
    fits = int(SHARE * left / each)
    return 1 << max(0, fits.bit_length() - 1)


def cost(model: nn.Module, use: Use) -> Cost:
    """What a micro-batch of a model takes, from the sizes of its linear maps and its configuration."""
    owner: Any = model
    config = getattr(model, "config", None)
    text: Any = config.get_text_config() if isinstance(config, PreTrainedConfig) else None
    chosen = int(getattr(text, "num_experts_per_tok", None) or 1)
    last = owner.get_output_embeddings() if hasattr(owner, "get_output_embeddings") else None
    numbers = 0.0
    for module in model.modules():
        if module is not last or runs_whole(model):
            numbers += _through(module, chosen)
    layers = int(getattr(text, "num_hidden_layers", None) or 1)
    heads = int(getattr(text, "num_attention_heads", None) or 0)
    itemsize = next((p.itemsize for p in model.parameters() if p.is_floating_point()), 4)
    if use == "generation":
        hidden = int(getattr(text, "hidden_size", None) or 0)
        width = int(getattr(text, "head_dim", None) or hidden // max(1, heads))
        pairs = int(getattr(text, "num_key_value_heads", None) or heads)
        vocabulary = int(getattr(text, "vocab_size", None) or 0)
        return Cost(
            2.5 * layers * pairs * width * itemsize + 2 * numbers / layers, 0.0, PER_LOGIT * vocabulary
        )
    plain = getattr(config, "_attn_implementation", None) == "eager"
    return Cost(KEPT * numbers, SQUARES * layers * heads * itemsize if plain else 0.0)


def _through(module: nn.Module, chosen: int) -> float:
    """Bytes that go in and out of a linear map, or of the chosen of several experts, for a token."""
    if hasattr(module, "base_layer"):
        return 0.0
    size = next((p.itemsize for p in module.parameters(recurse=False) if p.is_floating_point()), 4)
    into, out = getattr(module, "in_features", None), getattr(module, "out_features", None)
    if isinstance(into, int) and isinstance(out, int):
        adapter = NARROW * min(into, out) < max(
            into, out
        )  # keeps its input at most, and that in its own type
        return size * (into + out) * (0.5 if adapter else 1.0)
    if isinstance(module, nn.Embedding):
        return 0.0
    shapes = [p.shape for p in module.parameters(recurse=False)]
    return float(
        sum(size * (s[-2] + s[-1]) * (chosen if len(s) == 3 else 1) for s in shapes if len(s) in (2, 3))
    )


def available_bytes(device: torch.device) -> int:
    """Memory that can still be taken: of a GPU, or of the machine within the limits of its control groups."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return int(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device))
    return min([int(psutil.virtual_memory().available), *_left_in_groups()])


def _left_in_groups(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> list[int]:
    """What the control groups that this process is in still allow, of both versions; pages of files count."""
    if not own.is_file():
        return []
    found = []
    for line in own.read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        top, limit, used = (
            (root / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes")
            if controllers
            else (root, "memory.max", "memory.current")
        )
        group = top / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(top):
                found.append(_left_in(folder, limit, used))
    return [bytes_left for bytes_left in found if bytes_left is not None]


def _left_in(folder: Path, limit: str, used: str) -> int | None:
    """Bytes that one control group still allows; None where it sets no limit."""
    try:
        most, taken = ((folder / name).read_text().strip() for name in (limit, used))
        facts = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None  # a container shows its own group at the top, and no folder for the path outside
    if most == "max":
        return None
    files = int(facts.get("total_inactive_file", facts.get("inactive_file", 0)))
    return max(0, int(most) - int(taken) + files)
