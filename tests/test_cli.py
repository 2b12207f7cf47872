"""The command line: fast, free of torch until it is needed, and clear about what the user can mend."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import shlex
import subprocess
import sys
import webbrowser
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from typer.testing import CliRunner

from stepscope import cli, pipeline
from stepscope.cli.checkpoints import COMMAND
from stepscope.cli.examples import EXAMPLES
from stepscope.config import EvalConfig, MeasureConfig, build_config
from stepscope.errors import CheckpointError, ConfigError
from stepscope.pipeline.check.run import kind_of_config
from stepscope.pipeline.early import refuse_early, table_of

VERBS = (
    "demo",
    "train",
    "eval",
    "measure",
    "explain",
    "study",
    "ledger",
    "report",
    "export",
    "check",
    "convert",
)
ROOT = Path(__file__).parents[1]


@pytest.fixture
def unseen(monkeypatch):
    """Paths of a command are not looked at, as in one of several processes."""
    monkeypatch.setenv("WORLD_SIZE", "2")


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


def test_help_cuts_no_verb_short():
    said = " ".join(run("--help").output.partition("Commands:")[2].split())
    assert "..." not in said
    for command in cli.app.registered_commands:
        first = (command.callback.__doc__ or "").splitlines()[0]
        assert f"{command.name} {first}" in said


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


def test_options_reach_the_configuration(monkeypatch, unseen):
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


def test_configuration_file_may_stand_for_every_argument(tmp_path, monkeypatch, unseen):
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
    assert mendable("report", ".") == "stepscope: error: two lines"


def test_bugs_keep_their_traceback(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(ZeroDivisionError("bug")))
    result = run("report", ".")
    assert result.exit_code == 1
    assert isinstance(result.exception, ZeroDivisionError)


def test_interrupt_ends_with_130(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(KeyboardInterrupt()))
    assert run("report", ".").exit_code == 130


def test_misfit_checkpoint_fails_the_check(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_check", lambda target, overrides, own: False)
    assert "not fit" in mendable("check", ".")
    monkeypatch.setitem(vars(pipeline), "run_check", lambda target, overrides, own: True)
    assert run("check", ".").exit_code == 0


WRONG_SETTINGS = (
    ["train", "configs/objectives.yaml", "rl.stepz=3"],
    ["eval", "tests", "num_promts=3"],
    ["measure", "tests", "--out", "y", "--precision", "float65"],
    ["measure", "tests", "--out", "y", "lrs=[-1]"],
    ["measure", "update.seeed=1"],
    ["explain", "--config", "configs/measure.yaml"],
    ["study", "configs/study.yaml", "repeats=-1"],
    ["ledger", "tests", "quantities=[entropi]"],
    ["ledger", "tests", "--without", "quadrant=nowhere"],
    ["demo", "train.rl.stepz=3"],
    ["check", "tests", "probe.num_prompt=3"],
)
NOT_THERE = {
    ("train", "no.yaml"): "no such configuration file",
    ("train", "configs/objectives.yaml", "task=arithmetics"): "did you mean",
    ("eval", "nowhere"): "no such folder",
    ("eval", "tests", "--task", "jsonl:nowhere.jsonl"): "task jsonl:nowhere.jsonl: no such file",
    ("measure", "nowhere"): "no such checkpoint folder",
    ("measure", "tests", "--update", "nowhere"): "no such file",
    ("measure", "tests", "--out", "docs"): "holds no run",
    ("measure", "tests", "--stages", "step", "--open"): "the stage report",
    ("explain", "nowhere"): "no such checkpoint folder",
    ("explain", "tests", "--config", "nowhere.yaml"): "no such configuration file",
    ("study", "configs/study.yaml", "checkpoints=[nowhere]"): "no such folder",
    ("ledger", "tests"): "not recorded",
    ("ledger", "tests", "--dose", "1"): "belong to --without",
    ("report", "nowhere"): "no such folder",
    ("check", "nowhere"): "no such checkpoint",
    ("check", "tests", "--task", "arithmetics"): "did you mean",
    ("check", "tests", "--prompts", "nowhere.jsonl"): "prompts nowhere.jsonl: no such file",
    ("check", "tests", "--prompts", "README.md"): "prompts README.md",
    ("ledger", "nowhere"): "no such folder",
    ("convert", "nowhere", "there"): "no such checkpoint folder",
}
WRONG_OPTIONS = (["measure", "--no-such-option"], ["frobnicate"], ["explain", "x", "--minutes", "soon"])


def test_what_is_wrong_is_refused_before_torch_is_imported():
    """All in one process, from the root of the repository; what is not imported takes no time."""
    given = [*WRONG_OPTIONS, *WRONG_SETTINGS, *map(list, NOT_THERE)]
    code = (
        "import json, sys\nfrom stepscope import cli\nfrom typer.testing import CliRunner\n"
        f"for args in {given!r}:\n"
        "    result = CliRunner().invoke(cli.app, args)\n"
        "    heavy = [m for m in ('torch', 'transformers', 'trl', 'scipy', 'plotly') if m in sys.modules]\n"
        "    print(json.dumps([args, result.exit_code, result.stderr, heavy]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True, cwd=ROOT
    )
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(given)
    for args, code, said, heavy in found:
        assert (code, heavy) == (2, []), (args, said)
        if tuple(args) in NOT_THERE:
            assert NOT_THERE[tuple(args)] in said, args
        elif args not in list(WRONG_OPTIONS):
            assert "wrong setting" in said, args


def test_a_missing_path_is_refused_before_anything_is_imported():
    """Not even what reads settings: that takes most of a second."""
    given = [list(args) for args in NOT_THERE if args[1] in ("no.yaml", "nowhere")]
    assert {args[0] for args in given} > {"train", "eval", "measure", "explain", "ledger", "check", "convert"}
    code = (
        "import sys\nfrom stepscope import cli\nfrom typer.testing import CliRunner\n"
        f"print([CliRunner().invoke(cli.app, args).exit_code for args in {given!r}])\n"
        "print([m for m in ('stepscope.config', 'numpy') if m in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.splitlines() == [str([2] * len(given)), "[]"]


def test_check_refuses_cheap_mistakes_before_it_starts_a_process(monkeypatch):
    """Which takes as long as importing torch."""
    monkeypatch.setattr("stepscope.cli.checkpoints.run_bounded", lambda *_, **__: 0)
    for args, expected in (
        (["probe.num_prompt=3"], "unknown key"),
        (["--task", "arithmetics"], "did you mean"),
        (["--task", "jsonl:nowhere.jsonl"], "no such file"),
        (["--prompts", "nowhere.jsonl"], "no such file"),
        ([], None),
    ):
        result = CliRunner().invoke(cli.app, ["check", str(ROOT / "tests"), *args], obj=COMMAND)
        assert result.exit_code == (0 if expected is None else 2)
        assert expected is None or expected in result.stderr


def test_of_several_processes_none_looks_for_itself(unseen):
    """A path that only one of them misses must fail where the others learn of it."""
    refuse_early(build_config(MeasureConfig, {"checkpoint": "nowhere", "out": "o"}))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("WORLD_SIZE")
        with pytest.raises(CheckpointError, match="no such checkpoint folder"):
            refuse_early(build_config(MeasureConfig, {"checkpoint": "nowhere", "out": "o"}))


@pytest.mark.parametrize(
    ("verb", "command"), [(verb, command) for verb, both in EXAMPLES.items() for command in both]
)
def test_help_ends_with_two_examples_that_can_be_given(verb, command, monkeypatch, unseen):
    """Options and settings are read as the verb reads them; only the work is left out."""
    called = []
    for name in pipeline.__all__:
        monkeypatch.setitem(vars(pipeline), name, lambda *args, **kwargs: called.append(args) or Path("page"))
    monkeypatch.setattr(webbrowser, "open", lambda address: True)
    monkeypatch.chdir(ROOT)
    lines = run(verb, "--help").output.rstrip().splitlines()
    assert lines[-3].strip() == "Examples:"
    assert command in [line.strip() for line in lines[-2:]]
    program, name, *rest = shlex.split(command)
    assert (program, name) == ("stepscope", verb)
    result = run(name, *rest)
    assert result.exit_code == 0, result.output
    assert called


@pytest.mark.parametrize(
    ("out", "table"),
    [
        (None, "run/eval.parquet"),
        ("there", "there/eval.parquet"),
        ("new", "new/eval.parquet"),
        ("my.parquet", "my.parquet"),
    ],
)
def test_an_evaluation_goes_to_a_file_or_a_folder(out, table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("there").mkdir()
    assert table_of(build_config(EvalConfig, {"source": "run", "out": out})) == Path(table)


def test_every_verb_has_examples():
    assert EXAMPLES.keys() == {command.name for command in cli.app.registered_commands}


@pytest.mark.parametrize(
    ("checkpoint", "measured", "explained"),
    [
        ("runs/demo/checkpoints/step-60", "runs/demo/measure/step-60", "runs/explain/demo-step-60"),
        ("out/checkpoint-500/", "out/measure/checkpoint-500", "runs/explain/out-checkpoint-500"),
        ("/data/mine/global_step_7", "/data/mine/measure/global_step_7", "runs/explain/mine-global_step_7"),
        ("models/final", "runs/measure/models-final", "runs/explain/models-final"),
    ],
)
def test_where_a_measurement_goes_by_default(checkpoint, measured, explained, monkeypatch, unseen):
    seen = {}
    for name in ("run_measure", "run_explain"):
        monkeypatch.setitem(vars(pipeline), name, lambda config, **_: seen.update(config=config))
    for verb, folder in (("measure", measured), ("explain", explained)):
        assert run(verb, checkpoint).exit_code == 0
        assert seen["config"].out == folder
        assert run(verb, checkpoint, "out=mine").exit_code == 0
        assert seen["config"].out == "mine"


def test_a_page_is_opened_in_the_browser(tmp_path, checkpoint, monkeypatch):
    """A browser of the user's own (BROWSER), which writes down what it is to show."""
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-4").symlink_to(checkpoint)
    browser, shown = tmp_path / "browser", tmp_path / "shown"
    browser.write_text(f'#!/bin/sh\necho "$1" > {shown}\n')
    browser.chmod(0o755)
    monkeypatch.setenv("BROWSER", f"{browser} %s")
    monkeypatch.setattr(webbrowser, "_browsers", {})
    monkeypatch.setattr(webbrowser, "_tryorder", None)
    result = run("report", str(tmp_path), "--open")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[-1] == f"report: {tmp_path / 'report.html'}"
    assert shown.read_text().strip() == (tmp_path / "report.html").resolve().as_uri()
    monkeypatch.setattr(webbrowser, "_tryorder", [])
    assert "no browser was found here" in run("report", str(tmp_path), "--open").stderr


def test_the_shell_completes_verbs_and_options():
    """The script that is shown is one that bash takes, and what it calls answers."""
    assert "--install-completion" in run("--help").output
    shown = CliRunner().invoke(cli.app, ["--show-completion", "bash"], prog_name="stepscope")
    taken = subprocess.run(
        ["bash", "--norc", "-c", f"{shown.output}\ncomplete -p stepscope"], capture_output=True, text=True
    )
    assert taken.stdout.strip() == "complete -o default -F _stepscope_completion stepscope", taken.stderr
    for words, place, completed in (("me", 1, ["measure"]), ("explain --min", 2, ["--minutes"])):
        asked = {
            "_STEPSCOPE_COMPLETE": "complete_bash",
            "COMP_WORDS": f"stepscope {words}",
            "COMP_CWORD": str(place),
        }
        found = CliRunner().invoke(cli.app, [], prog_name="stepscope", env=asked)
        assert found.output.split() == completed


REFUSED = {
    errno.ENOSPC: "make room",
    errno.EROFS: "can be written",
    errno.ENAMETOOLONG: "shorter name",
    errno.ENOENT: "removed meanwhile",
}


@pytest.mark.parametrize("number", REFUSED)
def test_what_the_system_refuses_is_one_line(monkeypatch, number):
    error = OSError(number, os.strerror(number), "/some/file")
    monkeypatch.setitem(vars(pipeline), "run_report", failing(error))
    line = mendable("report", ".")
    assert REFUSED[number] in line
    assert "/some/file" in line


def test_a_full_disk_and_no_memory_in_the_words_of_libraries(tmp_path, monkeypatch):
    """Those of safetensors and torch themselves, met by asking for what cannot be."""
    (tmp_path / "full.safetensors").symlink_to("/dev/full")
    with pytest.raises(SafetensorError) as full:
        save_file({"a": torch.zeros(4)}, tmp_path / "nowhere" / "a.safetensors")
    with pytest.raises(RuntimeError) as memory:
        torch.empty(2**60, dtype=torch.uint8)
    for error, cure in (
        (full.value, "check the path"),
        (memory.value, "batch_size"),
        (MemoryError(), "batch"),
    ):
        monkeypatch.setitem(vars(pipeline), "run_report", failing(error))
        assert cure in mendable("report", ".")


def test_a_page_on_a_full_disk_is_one_line(tmp_path, checkpoint):
    """The partial file of the page is a device that has no room."""
    (tmp_path / "report.html.partial").symlink_to("/dev/full")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "step-4").symlink_to(checkpoint)
    assert "No space left" in mendable("report", str(tmp_path))


def test_names_that_no_file_system_has(tmp_path):
    for name in ("n" * 5000, str(tmp_path / ("n" * 300))):
        for args in (
            ["report", name],
            ["check", name],
            ["train", name],
            ["eval", name],
            ["measure", name, "--out", name],
        ):
            assert len(mendable(*args)) < 2200


def test_a_message_is_printable_and_bounded(monkeypatch):
    monkeypatch.setitem(vars(pipeline), "run_report", failing(ConfigError("\x1b[31m" + "long " * 10_000)))
    line = mendable("report", ".")
    assert "\x1b" not in line
    assert len(line) < 2200


@pytest.mark.parametrize("file", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda f: f.stem)
def test_the_shipped_configurations_are_of_the_verb_they_name(file):
    """By their own first lines, `stepscope VERB ...`."""
    verb = re.search(r"stepscope (train|measure|study|eval)\b", file.read_text())
    assert verb is not None
    assert kind_of_config(file).__name__.lower() == f"{verb[1]}config"
    assert "../" not in file.read_text()


def test_check_of_a_measurement_without_checkpoint_and_out():
    result = run("check", str(ROOT / "configs" / "measure.yaml"))
    assert result.exit_code == 0
    assert "a valid MeasureConfig, with checkpoint and out to be given" in " ".join(result.stdout.split())
