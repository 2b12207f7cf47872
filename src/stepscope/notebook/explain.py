"""``ss.explain``: ``stepscope explain`` as a function."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stepscope.cli.measuring import apart, sizes_asked
from stepscope.config import MeasureConfig, load_config
from stepscope.pipeline.explain import measure_within
from stepscope.pipeline.stages.report import PAGE
from stepscope.reading.answer import TopToken, Waterfall
from stepscope.reading.measurement import Measurement, load_measurement
from stepscope.report.terminal import Answer, answer_of, printed
from stepscope.results.frames import frame
from stepscope.results.views import Plotted, Readable

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True, repr=False)
class Explanation(Plotted, Readable):
    """Who moves the quantity in a checkpoint's next step: the same as the command prints.

    Shown as the sentence with the largest tokens, drawn as the waterfall, read in its responses.

    Attributes:
        answer: sentences, waterfall and the largest tokens.
        measurement: everything that was measured for it.
    """

    answer: Answer
    measurement: Measurement

    @property
    def sentence(self) -> str:
        """The change by the step, in words."""
        return " ".join(self.answer.sentences)

    @property
    def waterfall(self) -> Waterfall | None:
        """What the change is made of; None where that was not measured."""
        return self.answer.waterfall

    @property
    def lowered(self) -> Sequence[TopToken]:
        """The tokens that lowered the quantity most, the largest first."""
        return self.answer.lowered

    @property
    def raised(self) -> Sequence[TopToken]:
        """Those that raised it."""
        return self.answer.raised

    @property
    def page(self) -> Path:
        """The page."""
        return self.measurement.path / PAGE

    def to_pandas(self) -> pd.DataFrame:
        """A row per part of the change, in the order of the waterfall; they add up to the change."""
        return frame(self.waterfall.parts if self.waterfall else ())

    def _viewed(self) -> Measurement:
        return self.measurement

    def __repr__(self) -> str:
        """What the command prints."""
        text = io.StringIO()
        printed(self.answer, self.page, file=text)
        return text.getvalue()


def explain(
    checkpoint: str | Path,
    task: str | None = None,
    *,
    prompts: str | Path | None = None,
    reward: str | None = None,
    template: str | Path | None = None,
    minutes: float = 5.0,
    out: str | Path | None = None,
    precision: str | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> Explanation:
    """From a checkpoint to who moved the entropy, within a time: ``stepscope explain`` as a function.

    Runs the stages rollouts, step, change, influence and report of ``stepscope measure``, on batches that are
    the default ones or smaller, as the time allows. A folder that holds the explanation already is read, and
    nothing is measured again.

    Args:
        checkpoint: folder with the optimizer's state.
        task: as on the command line, for example ``gsm8k``; by default what the checkpoint says.
        prompts: file of problems in place of a task, as ``--prompts`` takes it.
        reward: ``module:function`` that grades responses, as ``--reward`` takes it.
        template: file with the prompt's template, as ``--template`` takes it.
        minutes: what it may take, loading included.
        out: run folder; by default under ``runs/explain``, named after run and checkpoint.
        precision: of the computation, for example ``float64``.
        device: for example ``cuda``.
        overrides: further settings of a measurement, ``section.field=value`` each; batches whose size is set
            here keep it.

    Returns:
        The answer, and the measurement that it is read from.

    Raises:
        ConfigError: no time, or a setting that does not exist.
        RunFolderError: ``out`` holds something else.
        CheckpointError, TaskError, MeasurementError: as ``stepscope measure``.
    """
    folder = apart("explain", Path(checkpoint)) if out is None else Path(out)
    values = {
        "checkpoint": str(checkpoint),
        "task": task,
        "prompts": None if prompts is None else str(prompts),
        "reward": reward,
        "template": None if template is None else str(template),
        "out": str(folder),
        "precision": precision,
        "device": device,
    }
    config = load_config(MeasureConfig, None, list(overrides), values)
    found = measure_within(config, minutes=minutes, fixed=sizes_asked(overrides))
    return Explanation(answer_of(found), load_measurement(found))
