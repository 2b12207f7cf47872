"""``stepscope demo``: train a tiny policy, evaluate it, measure an early and a late checkpoint, report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stepscope.config import EvalConfig, MeasureConfig, build_config
from stepscope.console import say
from stepscope.pipeline.evaluate import evaluate_all
from stepscope.pipeline.inputs.policies import checkpoints_in
from stepscope.pipeline.measure import measure
from stepscope.pipeline.preset import DemoConfig, demo_config
from stepscope.pipeline.report import run_report
from stepscope.processes import is_main_process
from stepscope.runs import PROVENANCE, RunFolder, locked


def run_demo(out: Path, overrides: Sequence[str] = ()) -> Path:
    """The whole story in one folder; parts that an earlier call finished are not repeated.

    Of several processes all train, and the first one does the rest.

    Returns:
        The page.

    Raises:
        RunFolderError: the folder holds something else, or another process is at work in it.
    """
    config = demo_config(out, overrides)
    plain = config.model_dump(mode="json", exclude={"train": {"out"}})
    if not is_main_process():
        _train_along(config, RunFolder(out))
        return out / "report.html"
    with locked(out):
        run = RunFolder.open(out, plain, verb="demo", resume=True)
        if not run.is_done("train"):
            from stepscope.training import train  # TRL takes seconds to import: only where it is needed

            with run.stage("train", [], invalidates=["eval", "report"]):
                train(config.train, out, resume=True)
        say(f"train: {run.seconds('train'):.1f} s")
        if not run.is_done("eval"):
            with run.stage("eval", ["eval.parquet"], invalidates=["report"], sealed=False):
                evaluation = EvalConfig(**config.eval.model_dump(), source=str(out))
                evaluate_all(evaluation, out / "eval.parquet", resume=True)
        say(f"eval: {run.seconds('eval'):.1f} s")
        trained = [c for c in checkpoints_in(out) if c.name != "step-0"]
        for checkpoint in dict.fromkeys([trained[0], trained[-1]]):
            say(f"measure {checkpoint.name}:")
            target = out / "measure" / checkpoint.name
            changes = {"checkpoint": str(checkpoint.resolve()), "out": str(target)}
            measure(build_config(MeasureConfig, config.measure.model_dump() | changes), resume=True)
        return run_report(out)


def _train_along(config: DemoConfig, run: RunFolder) -> None:
    """What a further process of a torchrun does: its share of the training, where that is not done."""
    if run.file(PROVENANCE).is_file() and run.is_done("train"):
        return
    from stepscope.training import train

    train(config.train, run.path, resume=True)
