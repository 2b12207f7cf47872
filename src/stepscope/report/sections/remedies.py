"""What could be done about it: leaving out the tokens that a rule names, and what that gives up."""

from __future__ import annotations

from collections.abc import Mapping

from stepscope.reading.measurement import Measurement
from stepscope.report import text
from stepscope.report.parts import Room, Section
from stepscope.report.sections.criteria import PRIMARY, agrees, pareto_figure
from stepscope.report.tables import Value, table
from stepscope.report.units import unit_beside
from stepscope.results.criteria import AblatedStep
from stepscope.stats import Estimate


def section(measurement: Measurement, room: Room) -> Section | None:
    """Captured share against reward given up, by rule; None where no step was made again without tokens."""
    pareto = measurement.pareto
    if pareto is None or not pareto.points:
        return None
    unit = unit_beside(measurement.change, pareto.lr, pareto.full_entropy_change, "entropy")
    share = max(point.share for point in pareto.points)
    chosen = [point for point in pareto.points if point.share == share]
    captured = _captured(measurement, share)
    full = abs(pareto.full_entropy_change.value)
    rows: list[Mapping[str, Value]] = [
        {
            "Rule": point.rule.replace("_", " "),
            "Tokens dropped": point.num_dropped,
            "Captured share of |influence|": captured.get(point.rule),
            f"Entropy kept, {unit.label}": unit.change(point.entropy_kept),
            "Reward given up": point.reward_given_up,
            "Resolved": _resolved(point),
        }
        for point in sorted(chosen, key=lambda point: -point.entropy_kept.value)
    ]
    title = "What leaving tokens out keeps, and what it gives up"
    caption = (
        f"The step made again without the {text.percent(share)} of the batch's tokens that a rule names, on "
        f"the same probe: how much less the entropy changes (the full step: "
        f"{text.bare(unit.change(pareto.full_entropy_change))}), and how much less the reward rises. "
        "Captured: the share of all |influence| on the tokens that a criterion puts first, as many of them. "
        "± one standard error."
    )
    best = max(chosen, key=lambda point: point.entropy_kept.value)
    sentence = (
        f"Dropping {best.num_dropped} tokens by {best.rule.replace('_', ' ')} keeps "
        f"({text.bare(unit.change(best.entropy_kept))}) {unit.times} of entropy"
        + (f" and gives up {text.bare(best.reward_given_up)} of reward." if full else ".")
    )
    return Section(
        "remedies",
        "Remedies",
        intro=sentence,
        figures=[pareto_figure(pareto, unit)],
        tables=[table("remedies", title, caption, rows)],
    )


def _captured(measurement: Measurement, share: float) -> dict[str, Estimate]:
    """The captured share of each criterion against the primary truth at a share of the tokens."""
    rows = measurement.criteria.rows if measurement.criteria else ()
    primary = {name: value for name, value in PRIMARY.items() if name != "target"}
    found = {}
    for row in rows:
        if agrees(row, primary):
            for known, value in row.captured.items():
                if abs(float(known) - share) < 1e-9:
                    found[row.criterion] = value
    return found


def _resolved(point: AblatedStep) -> str:
    known = {"entropy": point.entropy_kept, "reward": point.reward_given_up}
    return ", ".join(name for name, value in known.items() if value.resolved) or "neither"
