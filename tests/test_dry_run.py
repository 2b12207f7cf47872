"""``--dry-run``: settings that are a configuration again, what is to do and what is finished; no trace."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from stepscope import cli
from stepscope.config import EvalConfig, LedgerConfig, MeasureConfig, StudyConfig, TrainConfig, build_config
from stepscope.results.ledger import LEDGER
from stepscope.runs import RunFolder

FEW = ("update.num_prompts=4", "update.group_size=4", "probe.num_prompts=16", "lrs=[1e-5]")


def dry(*args: object) -> tuple[dict, dict[str, list[str]]]:
    """The settings, and the lines below each title."""
    result = CliRunner().invoke(cli.app, [*map(str, args), "--dry-run"])
    assert result.exit_code == 0, result.output
    found: dict[str, list[str]] = {}
    title = ""
    lines = [line for line in result.stdout.splitlines() if line.startswith("#")]
    assert lines[0] == "# dry run: nothing is computed or written"
    for line in lines[1:]:
        if line.startswith("#   "):
            found[title].append(line[4:])
        else:
            title = line[2:]
            found[title] = []
    return yaml.safe_load(result.stdout), found


def tree(folder: Path) -> Mapping[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_a_measurement_that_is_new_begun_and_finished(checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "m"
    command = ["measure", checkpoint, "--out", out, *FEW]
    settings, found = dry(*command, "--stages", "rollouts,step,change")
    config = build_config(MeasureConfig, settings)
    assert (config.checkpoint, config.update.num_prompts) == (str(checkpoint), 4)
    assert found["stages"] == ["rollouts: to do", "step: to do", "change: to do"]
    assert found["reads"] == [str(checkpoint)]
    assert found["writes"][0] == f"{out}/"
    assert "update.parquet" in found["writes"][1]
    assert "4 x 4 responses make the step, 16 x 1 measure it: at most 768 tokens of 24 each" in found["sizes"]
    assert not out.exists()
    done = CliRunner().invoke(cli.app, [*map(str, command), "--stages", "rollouts,step"])
    assert done.exit_code == 0, done.output
    size = (out / "direction.safetensors").stat().st_size
    (said,) = [line for line in found["sizes"] if "trained parameters" in line]
    numbers = int(said.split()[0].replace(",", ""))
    assert 4 * numbers == pytest.approx(size, rel=0.05), "the header of the file, and tied weights"
    before = tree(tmp_path)
    _, found = dry(*command, "--stages", "rollouts,step,change")
    assert found["stages"] == ["rollouts: finished", "step: finished", "change: to do"]
    assert tree(tmp_path) == before
    _, found = dry(*command)
    assert "already holds a run (finished stages: rollouts, step)" in found["note"][0]
    assert {line.partition(": ")[2] for line in found["stages"]} == {"to do"}
    assert tree(tmp_path) == before


def test_a_place_that_is_taken_is_a_note_of_every_verb(
    checkpoint: Path, small_training: Path, trained_run: Path, recorded: Path, tmp_path: Path
) -> None:
    """Nothing is written, so nothing is refused; with --resume, too, where what stands there is another's."""
    table, ledger, other = tmp_path / "eval.parquet", tmp_path / "ledger", tmp_path / "other"
    table.touch()
    ledger.mkdir()
    (ledger / LEDGER).touch()
    other.mkdir()
    (other / "thesis.tex").touch()
    before = tree(tmp_path)
    for expected, command in (
        ("already holds a run", ("train", small_training, "--out", trained_run)),
        ("another configuration", ("train", small_training, "--out", trained_run, "--resume", "seed=7")),
        ("is not empty", ("train", small_training, "--out", other)),
        ("exists already", ("eval", trained_run, "--out", table, "num_prompts=4", "samples_per_prompt=8")),
        ("exists already", ("ledger", recorded, "--out", ledger)),
        ("is not empty", ("explain", checkpoint, "--out", other)),
        ("is not empty", ("measure", checkpoint, "--out", other, "--quick")),
    ):
        _, found = dry(*command)
        assert expected in found["note"][0], command
        assert found["note"][1] == "below: what would be done in an empty place"
        assert not any("finished" in line for line in found["stages"]), command
    assert tree(tmp_path) == before


def test_what_is_given_nowhere_is_not_printed(small_training: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        cli.app, ["train", str(small_training), "--out", str(tmp_path / "r"), "--dry-run"]
    )
    assert result.exit_code == 0
    assert "null" not in result.stdout
    _, found = dry("train", small_training, "--out", tmp_path / "r", "rl=null", "hypo.steps=7")
    assert found["stages"][1].startswith("hypo")


def test_a_training_is_told_without_torch(small_training: Path) -> None:
    code = (
        "import sys; from stepscope.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'scipy', 'pandas') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "train", str(small_training), "--out", "nowhere", "--dry-run"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_an_explanation(checkpoint: Path, tmp_path: Path) -> None:
    settings, found = dry("explain", checkpoint, "--out", tmp_path / "x", "--minutes", "3", *FEW)
    assert settings["stages"] == ["rollouts", "step", "change", "influence", "report"]
    assert "a trial makes them smaller where 3 minutes do not do" in found["sizes"][-1]
    assert not (tmp_path / "x").exists()


def test_a_training_that_is_new_half_done_and_finished(
    small_training: Path, trained_run: Path, tmp_path: Path
) -> None:
    settings, found = dry("train", small_training, "--out", tmp_path / "run")
    config = build_config(TrainConfig, settings)
    assert config.out == str(tmp_path / "run")
    assert found["stages"] == ["sft: to do", "rl: to do"]
    assert config.rl is not None
    responses = config.rl.steps * config.rl.prompts_per_step * config.rl.group_size
    assert found["sizes"][-1].endswith(f": {responses:,} responses")
    assert not (tmp_path / "run").exists()
    _, found = dry("train", small_training, "--out", trained_run, "--resume")
    assert found["stages"] == ["sft: finished", "rl: finished"]
    part = tmp_path / "part"
    shutil.copytree(trained_run, part)
    shutil.rmtree(part / "checkpoints" / "step-4")
    _, found = dry("train", small_training, "--out", part, "--resume")
    assert found["stages"][1].startswith(f"rl: to do, from step 2 of {config.rl.steps}")


def test_a_training_on_preferences(small_training: Path, tmp_path: Path) -> None:
    settings, found = dry("train", small_training, "--out", tmp_path / "run", "rl=null", "hypo.steps=7")
    assert build_config(TrainConfig, settings).rl is None
    assert found["stages"] == ["sft: to do", "hypo: to do"]
    assert found["sizes"][-1] == "hypo: 7 steps of 32 pairs"


def test_an_evaluation(trained_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "eval.parquet"
    few = ("num_prompts=4", "samples_per_prompt=2", "ks=[1,2]", "temperatures=[0.5,1.0]")
    settings, found = dry("eval", trained_run, "--out", out, *few)
    assert build_config(EvalConfig, settings).num_prompts == 4
    names = [path.name for path in sorted((trained_run / "checkpoints").iterdir())]
    assert found["stages"][0] == f"{names[0]}: to do"
    assert f"{names[0]}--temperature-0.5--top_p-1: to do" in found["stages"]
    assert found["sizes"] == [f"{2 * len(names)} x 4 x 2 = {16 * len(names)} responses"]
    assert list(tmp_path.iterdir()) == []
    one = trained_run / "checkpoints" / names[-1]
    done = CliRunner().invoke(cli.app, ["eval", str(one), "--out", str(out), *few])
    assert done.exit_code == 0, done.output
    _, found = dry("eval", one, "--out", out, "--resume", *few)
    assert all(line.endswith(": finished") for line in found["stages"])
    assert found["sizes"] == ["0 x 4 x 2 = 0 responses"]


def test_a_study_and_a_ledger(checkpoint: Path, recorded: Path, tmp_path: Path) -> None:
    file = tmp_path / "study.yaml"
    file.write_text(yaml.safe_dump({"checkpoints": [str(checkpoint)], "out": "o", "repeats": 2}))
    settings, found = dry("study", file, "--out", tmp_path / "s")
    assert build_config(StudyConfig, settings).repeats == 2
    assert len(found["stages"]) == 2
    assert found["sizes"][0].startswith("2 of 2 measurements of rollouts, step, change, 768 responses")
    before = tree(recorded)
    settings, found = dry("ledger", recorded, "--every", "2", "probe.num_prompts=8", "end_samples=2")
    assert build_config(LedgerConfig, settings).every == 2
    assert found["stages"][:2] == ["ends: to do", "place-000005: to do"]
    assert found["stages"][-1] == "place-000000: to do"
    assert found["sizes"] == ["4 places, 64 responses to 8 prompts"]
    assert tree(recorded) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["study.yaml"]
    refused = CliRunner().invoke(cli.app, ["ledger", str(recorded), "--without", "kind=digits", "--dry-run"])
    assert refused.exit_code == 2
    assert "make it first" in refused.stderr


def test_names_of_a_ledgers_stages_are_those_it_leaves(recorded: Path, tmp_path: Path) -> None:
    out = tmp_path / "ledger"
    few = ["--every", "3", "probe.num_prompts=8", "end_samples=2", "num_folds=2", "--out", str(out)]
    done = CliRunner().invoke(cli.app, ["ledger", str(recorded), *few])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[-1] == f"ledger: {out / 'ledger.json'}, {out / 'ledger.html'}"
    _, found = dry("ledger", recorded, "--resume", *few)
    names = [line.removesuffix(": finished") for line in found["stages"]]
    assert set(names) == set(RunFolder(out / "ledger_parts").provenance()["stages"])
