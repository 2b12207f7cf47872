"""Reads back what trackers wrote, by their own readers where they have one."""

from __future__ import annotations

import html
import json
import re
import struct
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_accumulator import EventAccumulator as AsTensorBoard

with warnings.catch_warnings():  # of a package that tensorboard brings along
    warnings.simplefilter("ignore", DeprecationWarning)
    from tensorboard.plugins.text.text_plugin import text_array_to_html

BLOCK = 32768


def events_of(folder: Path) -> EventAccumulator:
    """All points of a folder, none thinned out."""
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "histograms": 0, "tensors": 0})
    return found.Reload()


def texts_of(events: EventAccumulator, name: str) -> dict[int, str]:
    """Step to the HTML that TensorBoard's text plugin makes of a text.

    The older accumulator keeps texts of steps that a resumed training takes again; TensorBoard does not.
    """
    shown: dict[int, str] = {}
    seen = AsTensorBoard(events.path, size_guidance={"tensors": 0}).Reload()
    for event in seen.Tensors(f"{name}/text_summary"):
        assert event.step not in shown
        text = np.array([value.decode() for value in event.tensor_proto.string_val])
        shown[event.step] = text_array_to_html(text, enable_markdown=True)
    return shown


def read(page: str) -> str:
    """What a reader of HTML reads, white space evened out."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", "", page.replace("<br>", "\n"))).split())


def wandb_offline(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have W&B write to a folder alone, whatever it was told before."""
    import wandb

    for name, value in (("MODE", "offline"), ("SILENT", "true"), ("DIR", str(folder))):
        monkeypatch.setenv(f"WANDB_{name}", value)
    wandb.teardown()


def wandb_history(folder: Path) -> list[dict[str, Any]]:
    """The rows of the history of every offline run in a folder, as its ``.wandb`` file has them.

    W&B's process closes the file of a run some time after it is finished, and surely before it ends itself.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()
    rows: list[dict[str, Any]] = []
    row: dict[str, Any]
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in _records(file.read_bytes()):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "history":
                rows.append(row := {})
                for item in record.history.item:
                    first, *rest = item.nested_key or [item.key]
                    if rest:
                        row.setdefault(first, {})["/".join(rest)] = json.loads(item.value_json)
                    else:
                        row[first] = json.loads(item.value_json)
    return rows


def _records(content: bytes) -> Iterator[bytes]:
    """The records of a log of LevelDB's format, which W&B writes behind a header of seven bytes."""
    assert content[:4] == b":W&B"
    place, parts = 7, []
    while place < len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        if kind == 0:
            break
        parts.append(content[place + 7 : place + 7 + length])
        place += 7 + length
        if kind in (1, 4):
            yield b"".join(parts)
            parts = []
