"""``stepscope demo`` and ``stepscope train``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from stepscope.cli.options import DryRun, Open, Overrides, Resume
from stepscope.cli.pages import show_page


def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder.")] = Path("runs/demo"),
    show: Open = False,
) -> None:
    """The whole story on a tiny policy: train, evaluate, measure, report. Offline, CPU, minutes.

    Goes on where an earlier call was stopped.
    """
    from stepscope.pipeline.preset import demo_config

    demo_config(out, overrides or [])
    from stepscope.pipeline import run_demo

    run_demo(out, overrides or [])
    show_page(out / "report.html", show)


def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML).")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Run folder.")] = None,
    resume: Resume = False,
    dry: DryRun = False,
) -> None:
    """Supervised warm-up and/or reinforcement learning; checkpoints under OUT/checkpoints/step-N."""
    from stepscope.pipeline.paths import need_file

    need_file(config)
    from stepscope.config import TrainConfig, load_config

    settings = load_config(TrainConfig, config, overrides or [], {"out": out})
    from stepscope.pipeline.early import refuse_early

    refuse_early(settings, resume=resume, dry=dry)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings, resume=resume)
    from stepscope.pipeline import run_train

    run_train(settings, resume=resume)
