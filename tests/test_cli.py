"""The command line: fast, free of torch until it is needed, and clear about what the user can mend."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
from typer.testing import CliRunner

from stepscope import cli, pipeline
from stepscope.errors import ConfigError

VERBS = ("demo", "train", "eval", "measure", "study", "report", "check")


def run(*args: str):
    return CliRunner().invoke(cli.app, list(args))


def mendable(*args: str) -> str:
    """The error line of a command that ends with exit code 2."""
    result = run(*args)
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.strip()]
    assert len(lines) == 1
    assert lines[0].startswith("stepscope: error: ")
    assert "Traceback" not in result.output
    return lines[0]


def test_help_names_every_verb_in_under_half_a_second():
    """Processor time of the command: the wall clock of a busy machine says nothing about it."""

    def used() -> float:
        usage = resource.getrusage(resource.RUSAGE_CHILDREN)
        return usage.ru_utime + usage.ru_stime

    seconds = []
    for _ in range(3):
        begin = used()
        done = subprocess.run(
            [sys.executable, "-c", "from stepscope.cli import main; main()", "--help"],
            capture_output=True,
            text=True,
            check=True,
        )
        seconds.append(used() - begin)
    assert all(verb in done.stdout for verb in VERBS)
    assert min(seconds) < 0.5


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb(verb):
    result = run(verb, "--help")
    assert result.exit_code == 0
    assert verb in result.output


def test_no_torch_before_it_is_needed():
    code = (
        "import sys, stepscope, stepscope.config, stepscope.runs, stepscope.pipeline\n"
        "from stepscope import cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cli.app, ['train', 'no.yaml']).exit_code == 2\n"
        "assert stepscope.Estimate and stepscope.load_task('arithmetic')\n"
        "print([m for m in ('torch', 'transformers', 'trl') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version():
    result = run("--version")
    assert result.exit_code == 0
    assert result.output.startswith("stepscope 0.")


@pytest.mark.parametrize(
    "args", [("frobnicate",), ("measure", "--no-such-option"), ("train",), ("report",), ("demo", "--out")]
)
def test_wrong_usage_ends_with_exit_code_2(args):
    result = run(*args)
    assert result.exit_code == 2
    assert "Traceback" not in result.output


def test_wrong_settings_are_all_named_in_one_line(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("modle: {}\nrl: {stepz: 1}\n")
    line = mendable("train", str(config), "sft.batch_sise=3")
    for wrong in ("modle", "rl.stepz", "sft.batch_sise"):
        assert wrong in line
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c.yaml"]


def test_options_reach_the_configuration(monkeypatch):
    seen = {}

    def measure(config, resume):
        seen.update(config=config, resume=resume)

    monkeypatch.setitem(vars(pipeline), "run_measure", measure)
    args = ["measure", "ck", "--task", "arithmetic", "--out", "o", "probe.num_prompts=5", "lrs=[1e-6]"]
    assert (
        run(
            *args, "--stages", "step,change", "--quantity", "entropy,reward", "--precision", "float64"
        ).exit_code
        == 0
    )
    config = seen["config"]
    assert (config.checkpoint, config.task, config.out) == ("ck", "arithmetic", "o")
    assert (config.stages, config.quantities) == (["step", "change"], ["entropy", "reward"])
    assert (config.precision, config.probe.num_prompts, config.lrs) == ("float64", 5, [1e-6])
    assert seen["resume"] is True, "single stages go on with the run in the folder"
    assert run(*args).exit_code == 0
    assert seen["resume"] is False


def test_configuration_file_may_stand_for_every_argument(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setitem(vars(pipeline), "run_measure", lambda c, resume: seen.update(config=c))
    file = tmp_path / "m.yaml"
    file.write_text("checkpoint: a\nout: b\nupdate: {seed: 3}\n")
    assert run("measure", "--config", str(file)).exit_code == 0
    assert (seen["config"].checkpoint, seen["config"].update.seed) == ("a", 3)
    assert run("measure", "update.seed=4", "--config", str(file)).exit_code == 0
    assert (seen["config"].checkpoint, seen["config"].update.seed) == ("a", 4)


def failing(error: BaseException) -> Callable[..., None]:
    def fail(*args, **kwargs):
        raise error

    return fail


def test_errors_the_user_can_mend_give_one_line(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(ConfigError("two\nlines")))
    assert mendable("report", "x") == "stepscope: error: two lines"


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(ZeroDivisionError("bug")))
    result = run("report", "x")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_interrupt_ends_with_130(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(KeyboardInterrupt()))
    assert run("report", "x").exit_code == 130


def test_misfit_checkpoint_fails_the_check(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_check", lambda target, overrides, task: False)
    assert "not fit" in mendable("check", "x")
    monkeypatch.setitem(vars(pipeline), "run_check", lambda target, overrides, task: True)
    assert run("check", "x").exit_code == 0
