"""Two processes under torchrun: every artifact is that of one, and all of them end as one."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file

import cases
from policy.test_group import free_port
from stepscope.cli import app
from stepscope.results import read_table

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]

VERBS = """
import io, json, os, signal, sys
from pathlib import Path
import torch
from stepscope.cli import main
from stepscope.policy.gradients import derivatives

folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
plain, refused = derivatives.forward, []


def short_of_memory(model, batch, **options):
    if len(batch) > 2:
        refused.append(len(batch))
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    return plain(model, batch, **options)


def wrong(model, batch, **options):
    raise ValueError("a bug")


def killed(model, batch, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def run(number, job):
    fault = {"memory": short_of_memory, "bug": wrong, "killed": killed}.get(job.get("fault"), plain)
    derivatives.forward = fault if rank == 1 else plain
    refused.clear()
    sys.argv[1:] = [a.replace("{rank}", str(rank)) for a in job["argv"]]
    sys.stderr, sys.stdout, code = io.StringIO(), io.StringIO(), 0
    said = sys.stderr
    try:
        main()
    except SystemExit as done:
        code = done.code
    except ValueError as error:
        code, _ = 1, print("Traceback", error, file=sys.stderr)
    sys.stderr, sys.stdout = sys.__stderr__, sys.__stdout__
    assert bool(refused) == (rank == 1 and job.get("fault") == "memory")
    (folder / f"{number}.{rank}").write_text(json.dumps([code or 0, said.getvalue()]))
    return code


for number, job in enumerate(json.loads((folder / "jobs.json").read_text())):
    run(number, job)
"""
"""Runs the command line as often as asked in one process, which saves the loading of the libraries."""

MEASUREMENT = cases.MEASUREMENT | {
    "stages": [s for s in cases.MEASUREMENT["stages"] if s != "models"],
    "frontier": {"levels": 2, "second_order": True},
    "curvature": {"sketches": 4, "folds": 4},
    "precision": "float64",
    "quantities": ["entropy", "reward"],
    "validation": {"num_subsets": 2, "num_single": 2, "removals": ["zeroed"]},
    "criteria": {"diagonal_tokens": 8, "drop_shares": [0.2]},
    "batch_size": 5,
}
LESS_HELD = {"curvature.json": 1e-6, "frontier.json": 1e-5}
"""Sums that cancel, and weights that a solver ends at, by the file that has them."""

EVALUATION = ["num_prompts=6", "samples_per_prompt=3", "ks=[1,2]", "temperatures=[0.5,1.0]"]

Jobs = Sequence[Mapping[str, Any]]


def environment(**more: object) -> dict[str, str]:
    own = {name: value for name, value in os.environ.items() if not name.startswith("COV_")}
    return own | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | {k: str(v) for k, v in more.items()}


def written(folder: Path, jobs: Jobs) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "verbs.py").write_text(VERBS)
    (folder / "jobs.json").write_text(json.dumps(jobs))
    return str(folder / "verbs.py")


def outcome(folder: Path, number: int) -> list[tuple[int, str]]:
    """Exit code and standard error of both processes."""
    return [tuple(json.loads((folder / f"{number}.{rank}").read_text())) for rank in (0, 1)]


def alone(*argv: object) -> None:
    app([str(a) for a in argv], standalone_mode=False)


def settings(folder: Path, **changes: Any) -> Path:
    path = folder / "measure.yaml"
    path.write_text(yaml.safe_dump(MEASUREMENT | changes))
    return path


def different(one: Any, two: Any, where: str, within: float = 1e-9) -> list[str]:
    """Where two artifacts differ by more than ``within``, or in anything but numbers."""
    if isinstance(one, dict):
        if one.keys() != two.keys():
            return [f"{where}: {one.keys() ^ two.keys()}"]
        return [line for key in one for line in different(one[key], two[key], f"{where}/{key}", within)]
    if isinstance(one, list):
        if len(one) != len(two):
            return [f"{where}: {len(one)} and {len(two)}"]
        return [
            line
            for i, pair in enumerate(zip(one, two, strict=True))
            for line in different(*pair, f"{where}/{i}", within)
        ]
    if isinstance(one, float) and isinstance(two, float):
        same = (
            one == two
            or (math.isnan(one) and math.isnan(two))
            or math.isclose(one, two, rel_tol=within, abs_tol=within)
        )
        return [] if same else [f"{where}: {one!r} and {two!r}"]
    return [] if one == two else [f"{where}: {one!r} and {two!r}"]


def content(file: Path) -> Any:
    match file.suffix:
        case ".json":
            return json.loads(file.read_text())
        case ".parquet":
            return read_table(file).to_pydict()
        case ".safetensors":
            return {name: array.tolist() for name, array in load_file(file).items()}
    return None


def same_artifacts(one: Path, two: Path, *but: str) -> int:
    """How many artifacts a folder has, which have to hold what those of another hold."""
    names = sorted(str(file.relative_to(one)) for file in one.rglob("*") if file.is_file())
    there = sorted(str(file.relative_to(two)) for file in two.rglob("*") if file.is_file())
    assert names == there or (but and set(names) < set(there))
    compared = [name for name in names if Path(name).name not in ("provenance.json", "config.yaml", *but)]
    for name in compared:
        first, second = content(one / name), content(two / name)
        if name == "summary.json":
            first["wall_seconds"] = second["wall_seconds"]
        assert not different(first, second, name, LESS_HELD.get(Path(name).name, 1e-9))[:3]
    return len(compared)


@pytest.fixture(scope="module")
def one(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What one process measures."""
    folder = tmp_path_factory.mktemp("one")
    alone("measure", checkpoint, "--config", settings(folder), "--out", folder / "m")
    return folder


def test_every_artifact_of_two_processes_is_that_of_one(
    one: Path, checkpoint: Path, trained_run: Path, tmp_path: Path
) -> None:
    measure = ["measure", str(checkpoint), "--config", str(settings(tmp_path)), "--out", str(tmp_path / "m")]
    evaluate = ["eval", str(trained_run), *EVALUATION, "--precision", "float64", "--out"]
    few = ["update.num_prompts=8", "probe.num_prompts=16", "own_prompts=false", "second_order=false"]
    explain = ["explain", str(checkpoint), "--out", str(tmp_path / "x"), *few]
    jobs = [
        {"argv": measure, "fault": "memory"},
        {"argv": [*evaluate, str(tmp_path / "e" / "eval.parquet")]},
        {"argv": explain},
    ]
    for folder in (one, tmp_path):
        (folder / "e").mkdir()
    alone(*evaluate, one / "e" / "eval.parquet")
    script = written(tmp_path, jobs)
    done = subprocess.run(
        [*TORCHRUN, script, str(tmp_path)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    for number in (0, 1, 2):
        (code, said), (other_code, other_said) = outcome(tmp_path, number)
        assert (code, other_code, other_said) == (0, 0, ""), said
        assert said.count("rollouts:") == (number != 1)
    assert (tmp_path / "x" / "report.html").is_file()
    assert same_artifacts(one / "m", tmp_path / "m") > 15
    assert same_artifacts(one / "e", tmp_path / "e") > 15


def test_all_end_as_one_and_another_number_goes_on(one: Path, checkpoint: Path, tmp_path: Path) -> None:
    here, there = tmp_path / "0", tmp_path / "1"
    here.symlink_to(checkpoint)  # the other process's machine has no such folder
    few = settings(tmp_path, stages=["rollouts", "step", "noise"])
    whole = ["measure", str(checkpoint), "--config", str(few), "--out", str(tmp_path / "m")]
    jobs = [
        {"argv": [*whole, "batch_size=0"]},
        {"argv": ["measure", str(tmp_path / "{rank}"), *whole[2:]]},
        {"argv": [*whole[:-1], str(one / "m")]},
        {"argv": whole, "fault": "bug"},
        {"argv": [*whole, "--resume"], "fault": "killed"},
    ]
    script = written(tmp_path, jobs)
    meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(), "WORLD_SIZE": 2}
    pair = [
        subprocess.Popen(
            [sys.executable, script, str(tmp_path)], env=environment(**meeting, RANK=r, LOCAL_RANK=r)
        )
        for r in (0, 1)
    ]
    try:
        assert [process.wait(timeout=300) for process in pair] == [0, -9]
    finally:
        for process in pair:
            process.kill()
    assert not there.exists()
    for number, (codes, line) in enumerate(
        [
            ((2, 2), "wrong setting: batch_size"),
            ((2, 2), f"{there}: no such checkpoint folder"),
            ((2, 2), f"{one / 'm'}: already holds a run"),
            ((2, 1), "Traceback a bug"),
        ]
    ):
        (code, said), (other_code, other_said) = outcome(tmp_path, number)
        assert ((code, other_code), said.count("\n") + other_said.count("\n")) == (codes, 1 + (number == 3))
        assert line in said + other_said
    code, said = json.loads((tmp_path / "4.0").read_text())
    assert code == 2
    assert said.endswith("what is finished is kept\n")
    assert "another of the processes" in said.splitlines()[-1]

    alone(*whole, "--resume")
    assert same_artifacts(tmp_path / "m", one / "m", "summary.json") == 8
