"""``step.json``: the optimizer step of a checkpoint, its components, its rounding and its lifetime."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

from stepscope.results.frames import flat, frame
from stepscope.results.records import Record
from stepscope.results.views import Parts, Plotted
from stepscope.stats import Number

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Component(Record):
    """One of the vectors that add up to a step.

    Attributes:
        norm: its Euclidean norm per unit of lr.
        share: <it, direction> / |direction|^2; the shares add up to 1 (one may be negative).
        cosine: of it and the direction; nan where one of them is 0.
    """

    norm: Number
    share: Number
    cosine: Number


@dataclass(frozen=True)
class Rounding(Record):
    """How a step as a training in a half type takes it differs from params + lr * direction.

    Attributes:
        kept_in: the half types, by name.
        kernel: which of torch's implementations took the step, ``fused``, ``foreach`` or ``single tensor``.
        lr: learning rate of the step.
        share_moved: share of the coordinates with theta' != theta.
        cosine: of theta' - theta and the direction before rounding; nan where nothing moves.
        norm_ratio: |theta' - theta| / |lr * direction|.
    """

    kept_in: str
    kernel: str
    lr: float
    share_moved: Number
    cosine: Number
    norm_ratio: Number


@dataclass(frozen=True)
class StoredTensor(Record):
    """What keeping a tensor in 8 bits lost of it, of the norm of what the codes stand for.

    Attributes:
        typical: norm of a deviation that is uniform in the interval of each code.
        worst: norm of the farthest ends of the intervals.
        zeros: share of its elements that were stored as 0 in a block that has others.
    """

    typical: Number
    worst: Number
    zeros: Number


@dataclass(frozen=True)
class Storage(Record):
    """How far the step of the same optimizer in 32 bits may be from that of one with moments in 8 bits.

    Attributes:
        kept_in: how the moments are kept.
        share: of the coordinates whose moments are kept so.
        tensors: by key of the optimizer's state.
        gradient_part: deviation of P g, for moments drawn from their intervals, of its norm.
        direction: the same of the whole direction.
        direction_worst: the same for every coordinate at the farthest corner of its intervals.
        cosine: of the direction and that for the moments drawn.
    """

    kept_in: str
    share: Number
    tensors: Mapping[str, StoredTensor]
    gradient_part: Number
    direction: Number
    direction_worst: Number
    cosine: Number


@dataclass(frozen=True)
class Routing(Record):
    """What a step does to the experts that a mixture's routers choose, on its own batch.

    Attributes:
        lr: learning rate at which it is taken.
        num_tokens: tokens counted, of prompts and responses.
        experts_per_token: experts that a router chooses for a token.
        share_choices: share of the chosen experts, over tokens and layers, that are not chosen after it.
        share_tokens: share of the tokens for which some layer chooses others.
        share_by_layer: ``share_choices`` of each layer.
    """

    lr: float
    num_tokens: int
    experts_per_token: int
    share_choices: Number
    share_tokens: Number
    share_by_layer: tuple[Number, ...]


@dataclass(frozen=True)
class SequenceShares(Record):
    """Whose gradient it is.

    Attributes:
        share: of each sequence of the update batch, <g_i, g>/|g|^2; with those of the loss's further terms
            they add up to 1.
        norm: |g_i| of each.
        largest: number of the sequence with the largest share, from 0.
        effective: (sum of shares)^2 / sum of their squares: as many sequences of one share would do it.
    """

    share: tuple[Number, ...]
    norm: tuple[Number, ...]
    largest: int
    effective: Number


@dataclass(frozen=True)
class Lifetime(Record):
    """A batch's effect beyond its own step, and its share of that step against two kinds of gradients.

    Attributes:
        step: t, the number of the step; of the parameter with most steps.
        effect: steps in all to the displacement so far over that of the own step.
        share: <sequences, direction> / |direction|^2.
        white_noise_share: what independent gradients of constant size would give.
        constant_share: what a gradient that never changes would give.
        relative_share: the share in units of the share under white noise.
    """

    step: int
    effect: Mapping[int, Number]
    share: Number
    white_noise_share: Number
    constant_share: Number
    relative_share: Number


_PARTS = ("norm", "share", "cosine")


@dataclass(frozen=True, repr=False)
class StepReport(Plotted, Record):
    """The figures of a step; in the file ``norm_NAME``, ``share_NAME``, ``cosine_NAME`` for each component.

    Attributes:
        lr: learning rate of the checkpoint.
        grad_norm: norm of the gradient before clipping.
        clip_coefficient: by which clipping multiplied it.
        norm_direction: norm of the whole direction, per unit of lr.
        norm_displacement: the same times the lr.
        num_parameters: coordinates of the direction.
        num_sequences: sequences of the update batch.
        num_prompts: its prompts.
        num_tokens: its response tokens that the policy wrote.
        components: name to component.
        initial_lr: the first learning rate of the schedule, where ``lr`` is 0; else None.
        stored_dtypes: types of the weights as stored.
        doubt: why the step is not the training's; empty where nothing speaks against it.
        rounding: of a training in a half type, else None.
        storage: of an optimizer with moments in 8 bits, else None.
        routing: of a mixture of experts, else None.
        gradient: shares of the sequences in it; None where it is 0.
        lifetime: of the update batch; None for an optimizer whose step is no sum over gradients.
    """

    lr: float
    grad_norm: Number
    clip_coefficient: Number
    norm_direction: Number
    norm_displacement: Number
    num_parameters: int
    num_sequences: int
    num_prompts: int
    num_tokens: int
    components: Mapping[str, Component]
    initial_lr: float | None
    stored_dtypes: tuple[str, ...]
    doubt: str
    rounding: Rounding | None
    storage: Storage | None
    routing: Routing | None
    gradient: SequenceShares | None
    lifetime: Lifetime | None

    def to_pandas(self) -> pd.DataFrame:
        """A row per component."""
        return frame({"component": name, **flat(part)} for name, part in self.components.items())

    def _viewed(self) -> Parts:
        return Parts("Optimizer step", {"step": self})

    def to_plain(self) -> dict[str, Any]:
        """The components spread over the file's names."""
        plain = super().to_plain()
        components = plain.pop("components")
        return plain | {f"{key}_{name}": part[key] for name, part in components.items() for key in _PARTS}

    @classmethod
    def from_plain(cls, data: Any, where: str) -> Self:
        """The components gathered from the file's names; a component is what has a share."""
        if not isinstance(data, Mapping):
            return super().from_plain(data, where)
        names = [key.removeprefix("share_") for key in data if str(key).startswith("share_")]
        spread = {f"{key}_{name}": (name, key) for name in names for key in _PARTS}
        components: dict[str, dict[str, Any]] = {name: {} for name in names}
        for full, (name, key) in spread.items():
            if full in data:
                components[name][key] = data[full]
        kept = {key: value for key, value in data.items() if key not in spread}
        return super().from_plain({**kept, "components": components}, where)
