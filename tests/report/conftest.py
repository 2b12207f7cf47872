from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from folders import hostile, make_run


@pytest.fixture
def measure_folder(tiny_measurement: Path, tmp_path: Path) -> Path:
    """A real measurement whose files a test may change, with text in it that would be markup."""
    folder = tmp_path / "measurement"
    shutil.copytree(tiny_measurement, folder, ignore=shutil.ignore_patterns("report.html"))
    return hostile(folder)


@pytest.fixture
def run_folder(measure_folder: Path, tmp_path: Path) -> Path:
    """A training run with the logs and evaluations of five checkpoints, and two measurements."""
    return make_run(tmp_path / "run", measure_folder)
