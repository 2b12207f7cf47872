"""``summary.json``: the figures of all stages, in the order of the stages."""

from __future__ import annotations

from collections.abc import Mapping

from stepscope import runs
from stepscope.config import Stage
from stepscope.errors import MeasurementError
from stepscope.pipeline.stages import PLANS
from stepscope.results.summary import Summary
from stepscope.runs import PROVENANCE, RunFolder, write_json
from stepscope.stats import NOT_FINITE, Estimate

FIGURES = "figures"
"""Key of the provenance: names of the figures that each stage gave."""


def write_summary(run: RunFolder, stage: Stage, figures: Mapping[str, Estimate]) -> None:
    """Put a stage's figures in place of those it gave before, and bring ``wall_seconds`` up to date.

    Raises:
        MeasurementError: a figure is not finite, and none of the known reasons explains it.
    """
    for name, figure in figures.items():
        if NOT_FINITE in figure.reason:
            raise MeasurementError(
                f"{name} is {figure.value} +- {figure.stderr} {figure.unit}, expected finite numbers "
                f"({figure.method}); measure with --precision float64, other seeds or an earlier checkpoint"
            )
    path = run.file("summary.json")
    known = dict(runs.read_record(Summary, path).figures) if path.exists() else {}
    known |= figures
    provenance = run.provenance()
    names = provenance.get(FIGURES, {}) | {stage: list(figures)}
    write_json(run.file(PROVENANCE), {**provenance, FIGURES: names})
    clock = Estimate(float(provenance["wall_seconds"]), float("nan"), 1, "s", "sum over the finished stages")
    kept = {name: known[name] for owner in PLANS for name in names.get(owner, ()) if name in known}
    run.write_sealed("summary.json", Summary({**kept, "wall_seconds": clock}))
