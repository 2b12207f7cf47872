"""What is published: the wheel has every file of the package and runs alone; versions agree."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import stepscope

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def run(*words: str | Path, **more: object) -> str:
    done = subprocess.run([*map(str, words)], capture_output=True, text=True, **more)  # type: ignore[call-overload]
    assert done.returncode == 0, done.stdout + done.stderr
    return str(done.stdout)


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with wheel and source distribution, made of the tracked files."""
    copy, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    files = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in files:
        if name.startswith(("src/", "pyproject", "README", "LICENSE")) and (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, copy)
    return out


def test_versions_agree() -> None:
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == PROJECT["version"] == stepscope.__version__
    assert cited["license"] == PROJECT["license"]
    assert re.search(
        rf"^## (Unreleased|{re.escape(PROJECT['version'])})", (ROOT / "CHANGELOG.md").read_text(), re.M
    )


def test_the_index_would_take_both(published: Path) -> None:
    found = sorted(path.name for path in published.iterdir())
    version = PROJECT["version"]
    assert found == [f"stepscope-{version}-py3-none-any.whl", f"stepscope-{version}.tar.gz"]
    assert run(sys.executable, "-m", "twine", "check", "--strict", *published.iterdir()).count("PASSED") == 2


def test_the_wheel_has_every_file_of_the_package(published: Path) -> None:
    (wheel,) = published.glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("stepscope/")}
    tracked = run(
        "git", "ls-files", "--cached", "--others", "--exclude-standard", "src", cwd=ROOT
    ).splitlines()
    assert packed == {name.removeprefix("src/") for name in tracked if (ROOT / name).exists()}


@pytest.mark.parametrize("words", [("--version",), pytest.param(("demo",), marks=pytest.mark.slow)])
def test_an_installed_wheel_runs(published: Path, tmp_path: Path, words: tuple[str, ...]) -> None:
    """In a folder of its own, in an empty home, with no way back to the sources."""
    (wheel,) = published.glob("*.whl")
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", tmp_path / "site", wheel)
    (tmp_path / "home").mkdir()
    clean = {"PATH": os.environ["PATH"], "HOME": str(tmp_path / "home"), "PYTHONPATH": str(tmp_path / "site")}
    where = "import stepscope; print(stepscope.__file__)"
    assert run(sys.executable, "-c", where, env=clean, cwd=tmp_path).startswith(str(tmp_path))
    said = run(tmp_path / "site" / "bin" / "stepscope", *words, env=clean, cwd=tmp_path)
    if words == ("demo",):
        assert (tmp_path / "runs/demo/report.html").exists()
    else:
        assert said == f"stepscope {PROJECT['version']}\n"
