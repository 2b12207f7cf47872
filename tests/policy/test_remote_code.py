"""A folder may bring Python code for its model and tokenizer; nothing of it runs, and nothing is asked."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
from pathlib import Path
Path({marker!r}).touch()
from transformers import {base}
class Theirs({base}):
    model_type = "theirs"
"""


def changed(file: Path, **fields: object) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "code-has-run"


@pytest.fixture
def hostile(checkpoint: Path, tmp_path: Path, marker: Path) -> Path:
    """A checkpoint whose configuration, model and tokenizer are to come from its own code."""
    folder = tmp_path / "hostile"
    shutil.copytree(checkpoint, folder)
    for name, base in [
        ("config", "PretrainedConfig"),
        ("model", "Qwen2ForCausalLM"),
        ("tokens", "PreTrainedTokenizerFast"),
    ]:
        (folder / f"{name}_theirs.py").write_text(CODE.format(marker=str(marker), base=base))
    auto = {"AutoConfig": "config_theirs.Theirs", "AutoModelForCausalLM": "model_theirs.Theirs"}
    changed(folder / "config.json", model_type="theirs", auto_map=auto)
    changed(
        folder / "tokenizer_config.json",
        tokenizer_class="Theirs",
        auto_map={"AutoTokenizer": [None, "tokens_theirs.Theirs"]},
    )
    return folder


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from stepscope.cli import main; raise SystemExit(main())", *command],
        input="y\n" * 20,
        capture_output=True,
        text=True,
    )


def test_code_of_a_model_does_not_run(hostile: Path, marker: Path) -> None:
    found = run(["eval", str(hostile), "--task", "arithmetic"])
    assert found.returncode == 2, found.stderr
    assert "stepscope runs none that a checkpoint brings" in found.stderr
    assert "[y/N]" not in found.stdout + found.stderr
    assert not marker.exists()


def test_code_of_a_tokenizer_does_not_run(hostile: Path, checkpoint: Path, marker: Path) -> None:
    shutil.copy(checkpoint / "config.json", hostile / "config.json")
    found = run(["check", str(hostile)])
    assert found.returncode in (0, 2), found.stderr
    assert "[y/N]" not in found.stdout + found.stderr
    assert not marker.exists()
