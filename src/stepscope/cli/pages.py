"""The page that a verb has made, shown in a browser where that is asked for."""

from __future__ import annotations

from pathlib import Path

from stepscope.console import say
from stepscope.processes import is_main_process


def show_page(page: Path, wanted: bool) -> None:
    """Open a page, or say where it is if this machine has no browser."""
    if not wanted or not is_main_process():
        return
    import webbrowser

    if not webbrowser.open(page.resolve().as_uri()):
        say(f"--open: no browser was found here; the page is {page}")
