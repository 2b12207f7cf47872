"""The command line: verbs, options and ``section.field=value`` overrides. Never imports torch by itself.

A verb is imported after its settings are checked, since most of them load torch.

Exit code 0: done. 2: the user can mend it (one line on standard error). 130: interrupted. 1: a bug, with its
traceback.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from stepscope.bounded import INSIDE, run_bounded
from stepscope.errors import ConfigError, mendable_line, printable
from stepscope.processes import said_once

_P = ParamSpec("_P")
_R = TypeVar("_R")

COMMAND = "command"
"""The context of a call from a shell; a call from Python stays in its process."""

app = typer.Typer(
    name="stepscope",
    help="One reinforcement-learning step of a language model under the microscope.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="[section.field=value]...", help="Settings that win over the configuration file."),
]
TaskSpec = Annotated[
    str | None,
    typer.Option(
        "--task",
        metavar="TASK",
        help="arithmetic, gsm8k, gsm8k:DIR, rg:NAME or jsonl:FILE; default: the task of the training.",
    ),
]
Precision = Annotated[
    str | None,
    typer.Option("--precision", help="float32 (default), float64 or bfloat16.", show_default=False),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Torch device; default: a GPU where there is one.")
]
ConfigFile = Annotated[Path | None, typer.Option("--config", metavar="FILE", help="Settings as YAML.")]
Resume = Annotated[bool, typer.Option("--resume", help="Go on with the run that the folder already holds.")]


def _mendable(command: Callable[_P, _R]) -> Callable[_P, _R]:
    """Turn what the user can mend into one line and exit code 2, and an interrupt into 130."""

    @wraps(command)
    def wrapped(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            return command(*args, **kwargs)
        except Exception as error:  # what is no refusal goes on as it came
            if not (line := mendable_line(error)):
                raise
            print(f"stepscope: error: {line}", file=sys.stderr)
            raise typer.Exit(2) from error
        except KeyboardInterrupt as interrupt:
            print("stepscope: interrupted; what is finished is kept", file=sys.stderr)
            raise typer.Exit(130) from interrupt

    return wrapped


def _split(text: str | None) -> list[str] | None:
    """``a,b`` as a list."""
    return None if text is None else [part.strip() for part in text.split(",") if part.strip()]


def _numbers(text: str | None, option: str) -> list[float] | None:
    """``0.5,1`` as a list."""
    parts = _split(text)
    try:
        return None if parts is None else [float(part) for part in parts]
    except ValueError as error:
        raise ConfigError(f"{option}: expected numbers such as 0.25,0.5,1, got {text!r}") from error


def _first_or_override(first: str | None, overrides: list[str] | None) -> tuple[str | None, list[str]]:
    """A leading ``section.field=value`` belongs to the overrides, not to the first argument."""
    rest = overrides or []
    if first is not None and "=" in first and not Path(first).exists():
        return None, [first, *rest]
    return first, rest


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        print(f"stepscope {version('stepscope')}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and stop.")
    ] = False,
) -> None:
    """One reinforcement-learning step of a language model under the microscope."""


@app.command()
@_mendable
def demo(
    overrides: Overrides = None,
    out: Annotated[Path, typer.Option("--out", metavar="DIR", help="Run folder.")] = Path("runs/demo"),
) -> None:
    """The whole story on a tiny policy: train, evaluate, measure, report. Offline, CPU, minutes.

    Goes on where an earlier call was stopped.
    """
    from stepscope.pipeline.preset import demo_config

    demo_config(out, overrides or [])
    from stepscope.pipeline import run_demo

    run_demo(out, overrides or [])


@app.command()
@_mendable
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML).")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Run folder.")] = None,
    resume: Resume = False,
) -> None:
    """Supervised warm-up and/or reinforcement learning; checkpoints under OUT/checkpoints/step-N."""
    from stepscope.config import TrainConfig, load_config

    settings = load_config(TrainConfig, config, overrides or [], {"out": out})
    from stepscope.pipeline import run_train

    run_train(settings, resume=resume)


@app.command("eval")
@_mendable
def evaluate(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="CHECKPOINT|RUN", help="A checkpoint, or a run folder for all of its checkpoints."
        ),
    ] = None,
    overrides: Overrides = None,
    task: TaskSpec = None,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="FILE", help="Parquet file; default: eval.parquet in the run folder."),
    ] = None,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    resume: Resume = False,
) -> None:
    """pass@k, format, length and entropy with their errors, one row per checkpoint; and a page of curves."""
    from stepscope.config import EvalConfig, load_config

    source, rest = _first_or_override(source, overrides)
    values = {"source": source, "task": task, "out": out, "precision": precision, "device": device}
    with said_once():
        settings = load_config(EvalConfig, config, rest, values)
    from stepscope.pipeline import run_eval

    run_eval(settings, resume=resume)


@app.command()
@_mendable
def measure(
    checkpoint: Annotated[
        str | None, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder with its optimizer state.")
    ] = None,
    overrides: Overrides = None,
    task: TaskSpec = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Run folder.")] = None,
    stages: Annotated[
        str | None,
        typer.Option(
            "--stages",
            metavar="A,B",
            help="Only these stages, on the run that the folder already holds: rollouts, step, change, "
            "influence, validation, kernel, curvature, noise, criteria, report.",
        ),
    ] = None,
    validate: Annotated[
        bool,
        typer.Option("--validate", help="Also hold influence against steps re-made without some sequences."),
    ] = False,
    quantity: Annotated[
        str | None,
        typer.Option(
            "--quantity",
            metavar="A,B",
            help="entropy (default), reward, length, kl, logprob; the first is primary.",
        ),
    ] = None,
    update: Annotated[
        str | None,
        typer.Option(
            "--update",
            metavar="FILE",
            help="The step's batch as the training dumped it: TRL's completions, verl's rollouts, a table.",
        ),
    ] = None,
    memory: Annotated[
        float | None,
        typer.Option("--memory", metavar="GIB", help="Budget for gradients that are kept (default 4)."),
    ] = None,
    profile: Annotated[
        bool,
        typer.Option("--profile", help="Also write where time and memory go, pass by pass, and print it."),
    ] = False,
    shard: Annotated[
        bool,
        typer.Option(
            "--shard", help="Each of several processes (torchrun) holds a part of the parameters and moments."
        ),
    ] = False,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
    resume: Resume = False,
) -> None:
    """Measure what a checkpoint's next optimizer step does to its policy, and who did it."""
    from stepscope.config import MeasureConfig, load_config

    checkpoint, rest = _first_or_override(checkpoint, overrides)
    values: dict[str, Any] = {
        "checkpoint": checkpoint,
        "task": task,
        "out": out,
        "stages": _split(stages),
        "quantities": _split(quantity),
        "update.file": update,
        "memory": memory,
        "profile": profile or None,
        "shard": shard or None,
        "precision": precision,
        "device": device,
    }
    with said_once():
        settings = load_config(MeasureConfig, config, rest, values)
    if validate and "validation" not in settings.stages:
        settings = settings.model_copy(update={"stages": [*settings.stages, "validation"]})
    from stepscope.pipeline import run_measure

    run_measure(settings, resume=resume or stages is not None)


@app.command()
@_mendable
def explain(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CHECKPOINT", help="Checkpoint folder with its optimizer state.")
    ],
    overrides: Overrides = None,
    task: TaskSpec = None,
    minutes: Annotated[
        float, typer.Option("--minutes", help="What it may take; batches are sized for it.", min=0.1)
    ] = 5.0,
    out: Annotated[
        str | None,
        typer.Option("--out", metavar="DIR", help="Run folder; default: runs/explain and its name."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    precision: Precision = None,
    device: Device = None,
    config: ConfigFile = None,
) -> None:
    """Who moves the entropy in a checkpoint's next step, in one command: the sentence, its parts, the tokens.

    The stages of measure that this needs, on batches sized for the time. Examples:

    stepscope explain runs/demo/checkpoints/step-60

    stepscope explain out/checkpoint-500 --task gsm8k --minutes 20 --out runs/why
    """
    from stepscope.config import MeasureConfig, load_config

    where = Path(checkpoint).resolve()
    run = where.parent.parent if where.parent.name == "checkpoints" else where.parent
    out = out or str(Path("runs", "explain", f"{run.name}-{where.name}"))
    values = {"checkpoint": checkpoint, "task": task, "out": out, "precision": precision, "device": device}
    with said_once():
        settings = load_config(MeasureConfig, config, overrides or [], values)
    given = {name for name in ("update", "probe") for text in overrides or [] if text.startswith(f"{name}.")}
    from stepscope.pipeline import run_explain

    run_explain(settings, minutes=minutes, fixed=frozenset(given), as_json=as_json)


@app.command()
@_mendable
def study(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="Configuration (YAML).")],
    overrides: Overrides = None,
    out: Annotated[str | None, typer.Option("--out", metavar="DIR", help="Study folder.")] = None,
    executor: Annotated[
        str | None,
        typer.Option(
            "--executor",
            metavar="local|slurm|ray",
            help="What measures: this process (default), jobs of SLURM, or tasks of Ray.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Many measurements: checkpoints x settings x repeats. Goes on where an earlier call was stopped.

    On a cluster each measurement is a job or task of its own; a killed one is taken again, and the table is
    the same. Examples (more in docs/CLUSTERS.md):

    stepscope study CONFIG --executor slurm slurm.partition=gpu slurm.gpus=1 slurm.time=120 slurm.mem=32GB

    stepscope study CONFIG --executor ray ray.address=auto ray.cpus=4

    stepscope study CONFIG --executor slurm slurm.cluster=local slurm.parallel=4   (processes on this machine)
    """
    from stepscope.config import StudyConfig, load_config

    settings = load_config(StudyConfig, config, overrides or [], {"out": out, "executor": executor})
    from stepscope.pipeline import run_study

    run_study(settings)


@app.command()
@_mendable
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
    if without is not None:
        own = {"--from": start, "--to": stop, "--quantity": quantity, "--through": through, "--task": task}
        given = [name for name, value in (own | {"--precision": precision}).items() if value is not None]
        if given:
            raise ConfigError(
                f"{given[0]} is a setting of the ledger that is there; leave it out of --without"
            )
        from stepscope.config import WhatIfConfig, load_config

        settings_of = {"run": run, "out": out, "rule": without, "every": every, "device": device}
        more = {"doses": _numbers(dose, "--dose"), "retrain": retrain or None}
        what_if = load_config(WhatIfConfig, config, overrides or [], settings_of | more)
        from stepscope.pipeline import run_what_if

        run_what_if(what_if)
        return
    if dose is not None or retrain:
        raise ConfigError("--dose and --retrain belong to --without RULE; say which tokens to leave out")
    from stepscope.config import LedgerConfig, load_config

    values: dict[str, Any] = {
        "run": run,
        "start": start,
        "stop": stop,
        "every": every,
        "quantities": _split(quantity),
        "through": _split(through),
        "kinship.every": kinship,
        "task": task,
        "out": out,
        "precision": precision,
        "device": device,
    }
    settings = load_config(LedgerConfig, config, overrides or [], values)
    from stepscope.pipeline import run_ledger

    run_ledger(settings, resume=resume)


@app.command()
@_mendable
def report(
    run: Annotated[
        Path, typer.Argument(metavar="RUN", help="Run folder, folder of a measurement, or study folder.")
    ],
    others: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[OTHER]...",
            help="A second measurement, or further evaluated runs, whose entropy laws are compared.",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", metavar="FILE", help="Page of the comparison.", show_default=False)
    ] = None,
) -> None:
    """Rebuild a page from its artifacts, or compare runs; nothing is computed again.

    A run or a measurement gets report.html, a study study.html. With further folders the page compares two
    measurements, or the entropy laws of evaluated runs: compare-OTHER.html in RUN, or FILE.
    """
    from stepscope.pipeline import run_comparison, run_report

    if not others:
        if out is not None:
            raise ConfigError("--out names the page of a comparison; give two runs, or leave it out")
        run_report(run)
    else:
        run_comparison(run, others, out)


@app.command()
@_mendable
def check(
    context: typer.Context,
    target: Annotated[Path, typer.Argument(metavar="CHECKPOINT|RUN|CONFIG", help="Folder, or YAML file.")],
    overrides: Overrides = None,
    task: TaskSpec = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", metavar="SECONDS", min=1, help="After which looking is given up.")
    ] = 1800.0,
) -> None:
    """Is this fit to be measured? What is missing, and what to do? Takes the settings of measure.

    On the task, a few responses are sampled from a checkpoint to see which answer format finds answers. Of a
    run's folder it is asked whether the run is healthy: moments kept at resumes, settings, and the log. All
    of it happens in a process of its own, bounded in time and memory.
    """
    if context.obj == COMMAND and INSIDE not in os.environ:
        raise typer.Exit(run_bounded(sys.argv[1:], seconds=time_limit, what=str(target)))
    from stepscope.pipeline import run_check

    if not run_check(target, overrides or [], task=task):
        raise ConfigError(f"{target}: not fit to be measured, or not healthy; see the findings above")


@app.command()
@_mendable
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="Checkpoint of any format that check names.")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="New folder.")],
    merged: Annotated[
        bool, typer.Option(help="Weights alone, adapters merged, for an inference engine to serve.")
    ] = False,
) -> None:
    """A checkpoint of any format (FSDP, torch's shards, verl) in Hugging Face's layout, with its moments.

    The new folder is read back and compared with the source to the bit before it gets its name. Printed is
    what was read, what was written, and what could not be carried over.
    """
    from stepscope.pipeline import run_convert

    run_convert(source, target, merged=merged)


def _one_line(message: Warning | str, *_: Any, **__: Any) -> str:
    """A warning as the user should see it."""
    return f"stepscope: warning: {printable(str(message))}\n"


def main() -> None:
    """Entry point of the ``stepscope`` command."""
    # OpenMP threads spin while they wait: with the cores shared, a training step took ten times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    warnings.formatwarning = _one_line
    # PEFT imports it where it is installed, and on a processor it complains of what nobody asked for.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    app(obj=COMMAND)
