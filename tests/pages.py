"""What is packed into a page, read back."""

from __future__ import annotations

import base64
import gzip
import json
import re
from typing import Any


def unpacked(source: str, name: str) -> str:
    """A packed text of a page by the id of its element."""
    found = re.search(rf'<script type="text/plain" id="{name}">([^<]*)</script>', source)
    assert found is not None, f"the page holds no packed text {name!r}"
    return gzip.decompress(base64.b64decode(found[1])).decode()


def held(source: str) -> list[Any]:
    """The figures, boards and excerpts of a page."""
    found: list[Any] = json.loads(unpacked(source, "data"))
    return found
