"""The command line: verbs, options and ``section.field=value`` overrides. Never imports torch by itself.

A module per verb or two. A verb is imported after its settings are checked, since most of them load torch; no
module here imports ``stepscope.config`` when it is loaded, so that help and completion come at once.

Exit code 0: done. 2: the user can mend it (one line on standard error). 130: interrupted. 1: a bug, with its
traceback.
"""

from __future__ import annotations

from stepscope.cli.main import app, main

__all__ = ["app", "main"]
