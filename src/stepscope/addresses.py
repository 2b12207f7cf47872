"""Addresses of servers, and what they may not hold."""

from __future__ import annotations

import re

NO_ADDRESS = (
    "expected the address of a server as http://HOST:PORT, without user, password or query, which would "
    "stand in messages and records; name the environment variable of its key in sampler.key_variable"
)


def is_address(url: str) -> bool:
    """Whether this is scheme, host, port and path alone."""
    return re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", url) is not None
