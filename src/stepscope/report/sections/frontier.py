"""Exploration against performance: what other weights of the batch's responses would buy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stepscope.reading.measurement import Measurement
from stepscope.report import style, text
from stepscope.report.parts import Room, Section
from stepscope.report.tables import Table, Value, interval_cell, table, trust_cell
from stepscope.report.units import Unit, unit_beside
from stepscope.results.criteria import Pareto
from stepscope.results.frontier import Frontier, FrontierPoint, Place
from stepscope.stats import Estimate

_NAMES = {
    "same_entropy": "most reward at the step\u2019s own change of the entropy",
    "same_reward": "most entropy at the step\u2019s own change of the reward",
}

_RULES = {"clip_cov": "Clip-Cov", "kl_cov": "KL-Cov"}

_ORDER = {1: "first", 2: "second"}


def section(measurement: Measurement, room: Room) -> Section | None:
    """The frontier with the batch's own point and published rules; None where it was not made."""
    found = measurement.frontier
    if found is None:
        return None
    unit = unit_beside(measurement.change, found.lr, found.entropy, "entropy")
    return Section(
        "frontier",
        "Exploration against performance",
        intro=_sentence(found, unit),
        figures=[_figure(found, measurement.pareto, unit)],
        tables=[_table(found, unit)],
    )


def _sentence(found: Frontier, unit: Unit) -> str:
    reward = found.point("same_entropy").predicted.reward_gain
    entropy = found.point("same_reward").predicted.entropy_gain

    def said(gain: Estimate, shown: str, what: str, at: str) -> str:
        verb = "would buy" if gain.low > 0 else "are not known to buy"
        return f"Other weights of the same responses {verb} {what} at the step\u2019s own {at} ({shown})."

    return " ".join(
        [
            said(reward, _bare(reward), "reward", "change of the entropy"),
            said(entropy, _bare(unit.change(entropy)), f"entropy ({unit.times})", "change of the reward"),
            "Chosen by one half of the probe\u2019s prompts and judged on the other.",
        ]
    )


def _bare(value: Estimate) -> str:
    return text.bare(value)


def _label(point: FrontierPoint) -> str:
    if point.name != "frontier":
        return _NAMES[point.name]
    ends = {0.0: "most reward", 1.0: "most entropy"}
    return ends.get(point.level, f"{text.percent(point.level)} of the way to most entropy")


def _rule(name: str) -> str:
    return f"{_RULES.get(name, name.replace('_', ' '))}, its tokens left out"


def _figure(found: Frontier, pareto: Pareto | None, unit: Unit) -> style.Figure:
    curve = [point for point in found.points if point.name == "frontier"]
    traces = [
        _curve("frontier, predicted", [p.predicted for p in curve], [_label(p) for p in curve], unit, 0),
        _curve(
            "the same, on the prompts that chose",
            [p.in_sample for p in curve],
            [_label(p) for p in curve],
            unit,
            5,
            bars=False,
        ),
    ]
    taken = [(p, p.realised) for p in curve if p.realised is not None]
    if taken:
        labels = [_label(p) for p, _ in taken]
        traces.append(_curve("frontier, realised", [r for _, r in taken], labels, unit, 1))
    special = [p for p in found.points if p.name != "frontier"]
    for number, point in enumerate(special):
        place = point.realised or point.predicted
        traces.append(_curve(_NAMES[point.name], [place], [""], unit, 6 + number, mode="markers"))
    for number, rule in enumerate(found.rules):
        label = f"{rule.num_tokens} tokens"
        traces.append(_curve(_rule(rule.name), [rule.realised], [label], unit, 2 + number, mode="markers"))
    if pareto is not None and pareto.points and pareto.lr == found.lr:
        places = [
            Place(p.entropy_change, p.reward_change, p.entropy_kept, p.reward_given_up.scaled(-1.0))
            for p in pareto.points
        ]
        labels = [f"{p.rule.replace('_', ' ')}, {p.num_dropped} tokens" for p in pareto.points]
        traces.append(_curve("rules that drop tokens", places, labels, unit, 4, mode="markers", bars=False))
    own = [e for e in (found.realised_entropy, found.realised_reward) if e is not None]
    caption = (
        "How much more the entropy rises than by the step as it is, which is the origin, against how much "
        f"more the reward rises, at learning rate {text.lr_text(found.lr)}: weights between 0 and "
        f"{text.number(found.most)} for each of {found.num_units} {found.units}, in steps no longer than the "
        f"batch\u2019s own. Predicted to {_ORDER[found.order]} order; realised in steps made anew. "
        "Weights are chosen by one half of the probe\u2019s prompts and judged on the other. "
        "Error bars: 95 %, over probe prompts."
    )
    if len(own) == 2:
        caption += (
            f" The step itself changes the entropy by {text.bare(unit.change(own[0]))} {unit.times} and the "
            f"reward by {text.bare(own[1])}."
        )
    return style.figure(
        "frontier",
        "Reward against entropy: what other weights of the batch buy",
        caption,
        traces,
        height=480,
        xaxis=style.axis(f"entropy against the step as it is, {unit.label}", zeroline=True),
        yaxis=style.axis("reward against the step as it is", zeroline=True),
    )


def _curve(
    name: str,
    places: Sequence[Place],
    labels: Sequence[str],
    unit: Unit,
    number: int,
    *,
    mode: str = "lines+markers",
    bars: bool = True,
) -> object:
    entropy = [unit.change(p.entropy_gain) for p in places]
    reward = [p.reward_gain for p in places]
    hover = [
        f"{words}<br>entropy {_bare(e)}<br>reward {_bare(r)}"
        for words, e, r in zip(labels, entropy, reward, strict=True)
    ]
    x, y = (entropy, reward) if bars else ([e.value for e in entropy], [r.value for r in reward])
    return style.curve(name, x, y, style.look(number), "%{customdata}", mode=mode, width=1, details=hover)


def _table(found: Frontier, unit: Unit) -> Table:
    rows: list[Mapping[str, Value]] = []
    for point in found.points:
        for how, place in (("predicted", point.predicted), ("realised", point.realised)):
            if place is not None:
                left = f"{text.percent(point.left_out)}, {text.percent(point.at_most)}"
                rows.append(_row(_label(point), how, place, left, unit))
    rows += [_row(_rule(r.name), "realised", r.realised, f"{r.num_tokens} tokens", unit) for r in found.rules]
    return table(
        "frontier",
        "Other weights of the batch, against the step as it is",
        f"Gains over the step as it is, on the same probe samples. Predicted to "
        f"{_ORDER[found.order]} order with preconditioner and clipping held, realised in steps made anew. "
        "Weights: share left out, share at the largest weight; of a rule the tokens left out. "
        "± one standard error.",
        rows,
    )


def _row(label: str, how: str, place: Place, weights: str, unit: Unit) -> Mapping[str, Value]:
    entropy = unit.change(place.entropy_gain)
    return {
        "Step": label,
        "Figure": how,
        f"Entropy gained, {unit.label}": entropy,
        "95 % interval": interval_cell(entropy),
        "Reward gained": place.reward_gain,
        "95 % interval of reward": interval_cell(place.reward_gain),
        "Weights": weights,
        "Trust": trust_cell(place.reward_gain),
    }
