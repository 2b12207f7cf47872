"""``stepscope ledger``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from stepscope.cli.options import (
    ConfigFile,
    Device,
    DryRun,
    Open,
    Overrides,
    Precision,
    Resume,
    TaskSpec,
    numbers,
    split,
)
from stepscope.cli.pages import show_page
from stepscope.errors import ConfigError

PAGE = "ledger.html"


def ledger(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Run folder of a recorded training.")],
    overrides: Overrides = None,
    start: Annotated[
        int | None, typer.Option("--from", metavar="A", help="Begin after this step (default: the first).")
    ] = None,
    stop: Annotated[
        int | None, typer.Option("--to", metavar="B", help="End after this step (default: the last).")
    ] = None,
    every: Annotated[
        int | None,
        typer.Option("--every", metavar="K", help="Gradients at every K-th step, interpolated between."),
    ] = None,
    quantity: Annotated[
        str | None,
        typer.Option(
            "--quantity",
            metavar="A,B",
            help="entropy (default), entropy_fixed_prefix, reward, length, kl (to the start); the first is "
            "the headline.",
        ),
    ] = None,
    through: Annotated[
        str | None,
        typer.Option(
            "--through", metavar="A,B", help="fixed (default) and optimizer: what entries go through."
        ),
    ] = None,
    kinship: Annotated[
        int | None,
        typer.Option(
            "--kinship",
            metavar="K",
            help="Split it at every K-th step by what the tokens acted on: own position, response, prompt.",
        ),
    ] = None,
    task: TaskSpec = None,
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Where the ledger goes; default: RUN.")
    ] = None,
    without: Annotated[
        str | None,
        typer.Option(
            "--without",
            metavar="RULE",
            help="What if these tokens had been left out? WAY=CLASS of a finished ledger, for example "
            '"quadrant=wrong, rare" or "kind=digits|operators".',
        ),
    ] = None,
    dose: Annotated[
        str | None,
        typer.Option(
            "--dose", metavar="A,B", help="Shares of their weight to take away (default 0.25,0.5,1)."
        ),
    ] = None,
    retrain: Annotated[
        bool, typer.Option("--retrain", help="Also train again without them, from the same start and seeds.")
    ] = False,
    shard: Annotated[bool, typer.Option("--shard", hidden=True)] = False,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    resume: Resume = False,
    show: Open = False,
    dry: DryRun = False,
) -> None:
    """What every token of every batch of a recorded training did to its entropy, added up and closed.

    With --without the curves of entropy and reward without some tokens: predicted from the record, and with
    --retrain held against training again. Steps, task and probe are those of the ledger that is there.
    """
    if shard:
        raise ConfigError(
            "--shard: a ledger holds whole states of the training on every process and cuts none; leave "
            "--shard out (several processes share its sequences), or take a device with more memory"
        )
    from stepscope.pipeline.paths import need_file, need_run

    need_file(config)
    need_run(run)
    if without is not None:
        own = {"--from": start, "--to": stop, "--quantity": quantity, "--through": through, "--task": task}
        given = [name for name, value in (own | {"--precision": precision}).items() if value is not None]
        if given:
            raise ConfigError(
                f"{given[0]} is a setting of the ledger that is there; leave it out of --without"
            )
        from stepscope.config import WhatIfConfig, load_config

        settings_of = {"run": run, "out": out, "rule": without, "every": every, "device": device}
        more = {"doses": numbers(dose, "--dose"), "retrain": retrain or None}
        what_if = load_config(WhatIfConfig, config, overrides or [], settings_of | more)
        from stepscope.pipeline.early import refuse_early

        refuse_early(what_if)
        if dry:
            from stepscope.pipeline import run_dry

            return run_dry(what_if)
        from stepscope.pipeline import run_what_if

        run_what_if(what_if)
        show_page(Path(out or run) / PAGE, show)
        return
    if dose is not None or retrain:
        raise ConfigError("--dose and --retrain belong to --without RULE; say which tokens to leave out")
    from stepscope.config import LedgerConfig, load_config

    values: dict[str, Any] = {
        "run": run,
        "start": start,
        "stop": stop,
        "every": every,
        "quantities": split(quantity),
        "through": split(through),
        "kinship.every": kinship,
        "task": task,
        "out": out,
        "precision": precision,
        "device": device,
    }
    settings = load_config(LedgerConfig, config, overrides or [], values)
    from stepscope.pipeline.early import refuse_early

    refuse_early(settings, resume=resume, dry=dry)
    if dry:
        from stepscope.pipeline import run_dry

        return run_dry(settings, resume=resume)
    from stepscope.pipeline import run_ledger

    run_ledger(settings, resume=resume)
    show_page(Path(settings.out or settings.run) / PAGE, show)
