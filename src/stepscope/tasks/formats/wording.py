"""How prompts are put to a policy, as the user gives it: a chat template, or a text with the prompt in it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from stepscope.errors import TaskError
from stepscope.tasks.formats.templates import FIELD, names_template

PROMPT = "{prompt}"
"""Where a plain template has the prompt."""

MAX_BYTES = 1 << 20
"""Larger files are no templates."""


@dataclass(frozen=True)
class Wording:
    """One of the two: what goes around a prompt of text, or what renders messages.

    Attributes:
        text: a prompt template of :func:`stepscope.tasks.formats.templates.load_template`; empty for none.
        chat: a chat template (jinja) in place of the tokenizer's; empty for none.
    """

    text: str = ""
    chat: str = ""

    @property
    def digest(self) -> str:
        """SHA-256 of what it says."""
        return hashlib.sha256(f"{self.text}\0{self.chat}".encode()).hexdigest()


def load_wording(given: str) -> Wording:
    """A template as the user gives it.

    Args:
        given: a file, or a text with ``{prompt}`` (after ``chat:`` it is the user message of the chat
            template), or the name of a prompt template. A file with jinja's marks is a chat template, one
            with ``{prompt}`` a text, whose last line break is taken off.

    Raises:
        TaskError: it is none of these, or the file cannot be read.
    """
    if names_template(given):
        return Wording(text=given)
    try:
        file = Path(given) if len(given) < 4096 and Path(given).is_file() else None
    except (OSError, ValueError):  # no path at all
        file = None
    if file is None:
        if PROMPT not in given:
            raise TaskError(
                f"template {given[:80]!r}: there is no such file, and it is no text with {PROMPT}; give a "
                f"chat template's file, or a text with {PROMPT}"
            )
        return Wording(text=given.replace(PROMPT, FIELD))
    text = _content(file)
    if "{%" in text or "{{" in text:
        return Wording(chat=text)
    if PROMPT not in text:
        raise TaskError(
            f"template {file}: it has neither {PROMPT}, as a plain template, nor jinja's marks, as a chat "
            "template; mend it"
        )
    return Wording(text=text.removesuffix("\n").removesuffix("\r").replace(PROMPT, FIELD))


def _content(file: Path) -> str:
    try:
        if (size := file.stat().st_size) > MAX_BYTES:
            raise TaskError(f"template {file}: {size} bytes, expected at most {MAX_BYTES}; is it a template?")
        return file.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TaskError(f"template {file}: cannot be read as UTF-8 text ({error}); mend it") from error
