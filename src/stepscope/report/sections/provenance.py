"""What was measured: checkpoint, batches, seeds, versions, and all settings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stepscope.reading.measurement import Measurement
from stepscope.report.parts import Room, Section

_FIRST: Mapping[str, str] = {
    "checkpoint": "checkpoint",
    "checkpoint digest": "digest",
    "task": "task",
    "precision": "precision",
    "update num_prompts": "update prompts",
    "update group_size": "responses per prompt",
    "probe num_prompts": "probe prompts",
    "seeds update": "seed of the update batch",
    "seeds probe": "seed of the probe batch",
    "versions stepscope": "stepscope",
    "versions torch": "torch",
    "versions transformers": "transformers",
    "started": "started",
    "command": "command",
}


def section(measurement: Measurement, room: Room) -> Section | None:
    """Settings and provenance as names and values, the usual ones first."""
    record = _flat({**(measurement.config or {}), **(measurement.provenance or {})})
    if not record:
        return None
    rest = [
        (key.replace("_", " "), value)
        for key, value in record.items()
        if key not in _FIRST and not key.startswith("stages ")
    ]
    return Section(
        "provenance",
        "What was measured",
        facts=[(name, record[key]) for key, name in _FIRST.items() if key in record],
        more_title="All settings and versions" if rest else "",
        more_facts=rest,
    )


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Entries of nested mappings as text; what is not set is left out."""
    found: dict[str, str] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key} ")
        elif value is not None and value != "":
            found[f"{prefix}{key}"] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return found
