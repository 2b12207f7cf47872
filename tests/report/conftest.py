from __future__ import annotations

from pathlib import Path

import pytest
from synthetic_run import write_measurement, write_run


@pytest.fixture
def measure_folder(tmp_path: Path) -> Path:
    return write_measurement(tmp_path / "measurement", step=40, seed=3)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run")
