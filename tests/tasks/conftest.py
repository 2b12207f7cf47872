from __future__ import annotations

import os
from pathlib import Path

import pytest

# The scorers are tested on systems without Landlock too; what isolates them has test_jail.py.
os.environ.setdefault("STEPSCOPE_UNISOLATED", "1")

GSM8K = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k"


@pytest.fixture(scope="session")
def gsm8k_folder() -> Path:
    if not (GSM8K / "train.jsonl").is_file():
        pytest.skip(f"GSM8K is not at {GSM8K}")
    return GSM8K


@pytest.fixture
def jsonl_file(tmp_path: Path) -> Path:
    path = tmp_path / "capitals.jsonl"
    rows = [
        f'{{"prompt": "What is {i} halves?", "answer": "{i}/2", "solution": "{i} over 2"}}'
        for i in range(200)
    ]
    path.write_text("\n".join(rows) + "\n\n", encoding="utf-8")
    return path
