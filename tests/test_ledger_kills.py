"""A ledger that is killed (SIGKILL), wherever it is, goes on to the bytes of one that was not."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from stepscope.results.ledger import LEDGER
from test_ledger_pipeline import settings

FORKING = """
import fnmatch, json, os, signal, sys, time, traceback
from pathlib import Path
from stepscope.config import LedgerConfig, load_config
from stepscope.pipeline import run_ledger

rename = Path.replace


def work(job):
    def killing(path, target):
        if fnmatch.fnmatch(Path(target).name, job.get("at", "")):
            if job["renamed"]:
                rename(path, target)
            os.kill(os.getpid(), signal.SIGKILL)
        return rename(path, target)

    Path.replace = killing
    sys.stdout = open(os.devnull, "w")
    run_ledger(load_config(LedgerConfig, Path(job["config"]), [], {"out": job["out"]}), resume=True)


for line in sys.stdin:
    job, begin = json.loads(line), time.perf_counter()
    child = os.fork()
    if not child:
        code = 1
        try:
            work(job)
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(code)
    if "after" in job:
        time.sleep(job["after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    print(json.dumps([os.waitstatus_to_exitcode(status), time.perf_counter() - begin]), flush=True)
"""
"""Imports once and forks a process for every ledger, killed where a file is renamed or after some seconds."""


class Ledgers:
    """Ledgers of one record, each call in a process of its own."""

    def __init__(self, process: subprocess.Popen[str], config: Path) -> None:
        self.process = process
        self.config = config

    def __call__(self, out: Path, **kill: Any) -> tuple[int, float]:
        """Exit code and seconds."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        job = {"config": str(self.config), "out": str(out), **kill}
        print(json.dumps(job), file=self.process.stdin, flush=True)
        code, seconds = json.loads(self.process.stdout.readline())
        return code, seconds


@contextmanager
def forking(run: Path, folder: Path, **changes: Any) -> Iterator[Ledgers]:
    config = folder / "ledger.yaml"
    config.write_text(yaml.safe_dump(settings(run, folder, **changes).model_dump(mode="json")))
    process = subprocess.Popen(
        [sys.executable, "-c", FORKING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    try:
        yield Ledgers(process, config)
    finally:
        process.communicate(timeout=60)


def artifacts(out: Path) -> dict[str, bytes]:
    """The bytes of every file but what says when; where it is, which the page says, is left out."""
    files = {str(p.relative_to(out)): p for p in out.rglob("*") if p.is_file()}
    told = ("provenance.json", "config.yaml")
    here = str(out).encode()
    return {name: p.read_bytes().replace(here, b"") for name, p in files.items() if p.name not in told}


def same_artifacts(one: Path, two: Path) -> None:
    first, second = artifacts(one), artifacts(two)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_kills_at_chosen_places_leave_the_bytes_of_an_undisturbed_ledger(
    recorded: Path, tmp_path: Path
) -> None:
    """Amid a place, before one is recorded that is whole, amid the last tables, at the page."""
    once, often = tmp_path / "once", tmp_path / "often"
    fewer = {"start": 3, "num_folds": 2, "end_samples": 1, "probe": {"num_prompts": 8}, "kinship": None}
    with forking(recorded, tmp_path, **fewer) as ledgers:
        assert ledgers(once)[0] == 0
        kills = [("000004_folds.parquet", False), ("000004.json", True)]
        kills += [("ledger_steps.parquet", False), ("ledger.html", False)]
        for at, renamed in kills:
            code, _ = ledgers(often, at=at, renamed=renamed)
            assert code == -signal.SIGKILL, at
            assert (often / "ledger_parts" / "carry-000004.safetensors").exists() == (at == "000004.json")
            assert (often / LEDGER).exists() == (at == "ledger.html")
            assert not (often / "ledger.html").exists()
        assert ledgers(often)[0] == 0
    assert len(list((often / "ledger_parts").glob("carry-*"))) == 1
    same_artifacts(once, often)


@pytest.mark.slow
def test_ten_kills_at_random_moments_leave_the_bytes_of_an_undisturbed_ledger(
    recorded: Path, tmp_path: Path
) -> None:
    once, often = tmp_path / "once", tmp_path / "often"
    moments, kills, finished = random.Random(0), 0, 0
    with forking(recorded, tmp_path) as ledgers:
        code, seconds = ledgers(once)
        assert code == 0
        while kills < 10:
            code, _ = ledgers(often, after=moments.uniform(0.0, seconds / 3))
            kills += code == -signal.SIGKILL
            finished += code == 0
            assert code in (0, -signal.SIGKILL)
            assert finished < 10
        assert ledgers(often)[0] == 0
    same_artifacts(once, often)
