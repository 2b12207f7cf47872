"""What has gone to a tracker that takes nothing back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stepscope.runs import write_yaml
from stepscope.yaml_text import parse_yaml


class Sent:
    """The steps that a run of a tracker has of a source, in a file beside the results.

    Servers only add: a point sent again would be there twice. So the steps are written down before they are
    sent; a process killed in between leaves a point out, and no resumed one doubles it. A whole point can be
    sent again after its line is deleted.

    Args:
        path: of the file; it need not exist.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._runs: dict[str, Any] = {}
        if path.is_file():
            found = parse_yaml(path.read_text(encoding="utf-8"), str(path))
            self._runs = found if isinstance(found, dict) else {}

    def last_run(self, tracker: str) -> str | None:
        """The run of a tracker that was written to last."""
        return next(reversed(self._runs.get(tracker) or {}), None)

    def count(self, tracker: str, run: str) -> int:
        """How many entries a run has."""
        return sum(map(len, self._runs.get(tracker, {}).get(str(run), {}).values()))

    def claim(self, tracker: str, run: str, source: str, step: int) -> bool:
        """Whether a step of a source is still to be sent to a run; from now on it is not."""
        steps = self._runs.setdefault(tracker, {}).setdefault(str(run), {}).setdefault(source, [])
        if step in steps:
            return False
        steps.append(step)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_yaml(self.path, self._runs)
        return True
