"""A ledger by two processes under torchrun: the numbers of one, and the same bytes after a kill."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from stepscope.cli import main
from stepscope.pipeline import run_ledger
from stepscope.results.ledger import LEDGER
from test_ledger_kills import same_artifacts as same_bytes
from test_ledger_pipeline import settings
from test_together import TORCHRUN, content, different, environment

CALLS = """
import json, os, signal, sys
from stepscope.cli import main
from stepscope.pipeline.ledger import places

settle, calls = places._settle, []


def killed(*args):
    calls.append(args)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    settle(*args)


for argv, kill in json.loads(sys.argv[1]):
    places._settle = killed if kill and os.environ["RANK"] == "1" else settle
    sys.argv[1:] = argv
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise
"""


def together(folder: Path, *calls: tuple[list[str], bool]) -> subprocess.CompletedProcess[str]:
    """The command line as often as asked, by two processes; the second is killed at its third place."""
    script = folder / "calls.py"
    script.write_text(CALLS)
    return subprocess.run(
        [*TORCHRUN, str(script), json.dumps(calls)],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )


def same_numbers(one: Path, two: Path) -> None:
    """Every artifact; columns of tables to 1e-9 of their largest entry, or 1e-16."""
    names = sorted(str(p.relative_to(one)) for p in one.rglob("*") if p.is_file())
    assert names == sorted(str(p.relative_to(two)) for p in two.rglob("*") if p.is_file())
    for name in names:
        if Path(name).name in ("provenance.json", "config.yaml"):
            continue
        first, second = content(one / name), content(two / name)
        assert not different(first, second, name)[:3]
        if name.endswith(("parquet", "safetensors")):
            for column in first:
                same_column(first[column], second[column], f"{name}/{column}")


def same_column(one: Any, two: Any, where: str) -> None:
    first, second = np.asarray(one), np.asarray(two)
    if first.dtype.kind == "f" and first.size:
        largest = np.nanmax(np.abs(first), initial=0.0)
        bound = max(1e-9 * largest, 1e-16)
        np.testing.assert_allclose(second, first, rtol=0, atol=bound, err_msg=where)


def test_two_processes_make_the_ledger_of_one(recorded: Path, tmp_path: Path) -> None:
    config = tmp_path / "ledger.yaml"
    fewer: dict[str, Any] = {"start": 2, "num_folds": 2, "end_samples": 1, "probe": {"num_prompts": 8}}
    fewer |= {"kinship": None}
    chosen = settings(recorded, tmp_path, **fewer)
    config.write_text(yaml.safe_dump(chosen.model_dump(mode="json", exclude={"out"})))
    one, two, killed = (tmp_path / name for name in ("one", "two", "killed"))
    run_ledger(settings(recorded, one, **fewer))
    call = ["ledger", str(recorded), "--config", str(config), "--out"]

    done = together(tmp_path, ([*call, str(two)], False), ([*call, str(killed)], True))
    assert done.returncode == 1
    assert "exitcode  : -9" in done.stderr
    said = done.stdout + done.stderr
    assert said.count("entropy, steps 3 to 5: ") == 1, said[-4000:]
    same_numbers(one, two)
    assert not (killed / LEDGER).exists()
    parts = {p.name for p in (killed / "ledger_parts").iterdir()}
    assert {"000005.json", "000004.json", "carry-000004.safetensors"} <= parts
    assert "000003.json" not in parts

    alone = tmp_path / "alone"
    shutil.copytree(killed, alone)
    run_ledger(settings(recorded, alone, **fewer), resume=True)
    same_numbers(one, alone)
    done = together(tmp_path, ([*call, str(killed), "--resume"], False))
    assert done.returncode == 0, done.stderr[-4000:]
    same_bytes(two, killed)


def test_a_ledger_is_not_sharded(
    recorded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["stepscope", "ledger", str(recorded), "--shard"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.startswith("stepscope: error: --shard: a ledger holds whole states")
