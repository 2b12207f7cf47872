"""What the step is made of: its components, rounding, and how long a batch's part lasts."""

from __future__ import annotations

import math
from collections.abc import Mapping

import plotly.graph_objects as go

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.results.change import Taken
from stepscope.results.step import Lifetime, Rounding, Routing, SequenceShares, StepReport, Storage

_LOOKS: Mapping[str, tuple[str, str]] = {
    "momentum": ("momentum", style.OCHRE),
    "decay": ("weight decay", style.PURPLE),
    "bonus": ("entropy bonus", style.GREEN),
    "divergence": ("KL divergence", style.GREEN),
    "router": ("router loss", style.MUTED),
    "sequences": ("this batch", style.BROWN),
    "direction": ("whole step", style.INK),
}

_FACTS: Mapping[str, str] = {
    "lr": "learning rate",
    "grad_norm": "gradient norm before clipping",
    "clip_coefficient": "clip coefficient",
    "num_parameters": "trainable parameters",
    "num_sequences": "sequences",
    "num_tokens": "tokens",
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Norms and shares of the components, and in words what rounding and momentum do."""
    step = measurement.step
    if step is None:
        return None
    known = {words: getattr(step, key) for key, words in _FACTS.items()}
    sentences = [_lifetime_sentence(step.lifetime)] if step.lifetime else []
    if step.storage:
        sentences.append(_storage_sentence(step.storage))
    if step.gradient:
        sentences.append(_gradient_sentence(step.gradient))
    if step.routing:
        sentences.append(_routing_sentence(step.routing))
    if step.rounding:
        sentences.append(_rounding_sentence(step.rounding))
        if measurement.change and measurement.change.taken:
            sentences.append(_rounded_change_sentence(measurement.change.quantity, measurement.change.taken))
        sentences.append("Components, shares and influences are those of the step before rounding.")
    return Section(
        "step",
        "What the step is made of",
        intro=" ".join(sentences),
        facts=[
            (words, text.number(value, 4) if isinstance(value, float) else f"{value:,}")
            for words, value in known.items()
            if value is not None
        ],
        figures=[
            _bars(
                step,
                "norm",
                "Size of the components",
                "Euclidean norm per unit learning rate",
                "Euclidean norm, over all trainable parameters, of each component of the step per unit of "
                "learning rate. Exact given the update batch: no sampling error. Norms do not add up; shares "
                "do.",
            ),
            _bars(
                step,
                "share",
                "Shares of the step",
                "share of the squared length",
                "Projection of each component on the whole step, divided by the step's squared length; the "
                "shares add up to 1. Exact given the update batch: no sampling error. A negative share "
                "points against the step.",
            ),
        ],
    )


def _bars(step: StepReport, kind: str, title: str, unit: str, caption: str) -> style.Figure:
    """One number of every component as a bar."""
    found = {name: getattr(part, kind) for name, part in step.components.items()}
    if kind == "norm":
        found["direction"] = step.norm_direction
    known = {**_LOOKS, **{name: (name, style.MUTED) for name in found if name not in _LOOKS}}
    rows = [(*known[name], found[name]) for name in known if name in found]
    values = [value for _, _, value in rows]
    low, high = min(0.0, *values), max(0.0, *values)
    room = high - low or 1.0
    bars = go.Bar(
        y=[label for label, _, _ in rows],
        x=style.rounded(values),
        orientation="h",
        marker={"color": [color for _, color, _ in rows]},
        text=[text.percent(value) if kind == "share" else text.number(value) for value in values],
        textposition="outside",
        cliponaxis=False,
        hovertemplate="%{y}: %{x:.5g}<extra></extra>",
    )
    ends = style.rounded([low - 0.3 * room * (low < 0), high + 0.14 * room], 3)
    return style.figure(
        f"step-{kind}",
        title,
        caption + (f" Not to be relied on: {step.doubt}." if step.doubt else ""),
        [bars],
        wide=False,
        xaxis=style.axis(unit, zeroline=True, nticks=6, range=ends),
        yaxis={"autorange": "reversed", "automargin": True},
        showlegend=False,
    )


def _rounding_sentence(rounding: Rounding) -> str:
    """What rounding does to the step of a training in a half type."""
    shape = (
        f"the rounded step has cosine {text.number(rounding.cosine)} to the step before rounding and "
        f"{text.number(rounding.norm_ratio)} times its length"
        if math.isfinite(rounding.cosine)
        else "so that the step changes nothing"
    )
    return (
        f"The training keeps its weights in {rounding.kept_in}, and every step is rounded to that: "
        f"at learning rate {text.lr_text(rounding.lr)}, {text.percent(rounding.share_moved)} of the weights "
        f"move at all; {shape}."
    )


def _storage_sentence(storage: Storage) -> str:
    """What keeping moments in 8 bits made of the step."""
    return (
        f"The training keeps the moments of {text.percent(storage.share)} of its weights in "
        f"{storage.kept_in}, and this is the step it takes with them. With moments as they were before their "
        f"last encoding it would differ by {text.percent(storage.direction)} of its norm typically, and by "
        f"{text.number(storage.direction_worst, 2)} times its norm at most."
    )


def _gradient_sentence(gradient: SequenceShares) -> str:
    """Whose gradient it is."""
    one = gradient.largest
    return (
        f"The gradient is made by as many as {text.number(gradient.effective, 3)} of the batch's "
        f"{len(gradient.share)} sequences; the largest share has sequence {one}, "
        f"{text.percent(gradient.share[one])} (norm {text.number(gradient.norm[one], 3)})."
    )


def _routing_sentence(routing: Routing) -> str:
    """What the step does to the choices of the routers."""
    if not routing.share_choices:
        return "The step flips no choice of an expert on its own batch."
    layer = max(range(len(routing.share_by_layer)), key=lambda i: routing.share_by_layer[i])
    return (
        f"At learning rate {text.lr_text(routing.lr)} the step flips {text.percent(routing.share_choices)} "
        f"of the routers' choices on its own batch, most of them in layer {layer} of those with experts "
        f"({text.percent(routing.share_by_layer[layer])}); {text.percent(routing.share_tokens)} of the "
        "tokens go to other experts somewhere. The first-order change knows nothing of flips, the true "
        "change has them."
    )


def _rounded_change_sentence(quantity: str, taken: Taken) -> str:
    """The change by the rounded step beside that by the step before rounding."""
    left = f"; {text.bare(taken.ratio)} of it is left" if taken.ratio and taken.ratio.reliable else ""
    return (
        f"It changes the policy's {text.quantity_name(quantity)} by {text.estimate(taken.true)}; "
        f"without rounding it would be {text.estimate(taken.unrounded)}{left}."
    )


def _lifetime_sentence(found: Lifetime) -> str:
    """In words: what momentum's share says, and what a batch does after its own step."""
    share, white, constant = map(text.percent, (found.share, found.white_noise_share, found.constant_share))
    later = [(n, value) for n, value in found.effect.items() if n != 1]
    effects = " and ".join(f"{text.number(value, 2)} times after {n} steps" for n, value in later)
    return (
        f"This batch is {share} of its step. At step {found.step} momentum alone would make it {white} were "
        f"gradients white noise and {constant} were they all the same, so that most of a step is momentum is "
        f"arithmetic; this batch's share is {text.number(found.relative_share, 2)} times white noise's. "
        "What it does not do in this step it does later, through the momentum: with later gradients, "
        f"preconditioner and learning rate held, its effect grows to {effects}, its own the first."
    )
