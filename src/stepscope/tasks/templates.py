"""Prompt templates: from a bare question to the text given to the tokenizer.

``short`` is made for the tiny policy, ``r1`` is the template of DeepSeek-R1-Zero (DeepSeek-AI 2025, table 1).
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.response import ANSWER, END_ANSWER, END_THINK, THINK

FIELD = "{question}"
CHAT = "chat:"

_R1 = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it. The "
    "assistant first thinks about the reasoning process in the mind and then provides the user with the "
    f"answer. The reasoning process and answer are enclosed within {THINK} {END_THINK} and {ANSWER} "
    f"{END_ANSWER} tags, respectively, i.e., {THINK} reasoning process here {END_THINK} {ANSWER} answer here "
    f"{END_ANSWER}. User: {FIELD} Assistant:"
)
_R1_MESSAGE = (
    f"{FIELD}\n\nFirst think about the reasoning process, then give the final answer. Enclose the reasoning "
    f"process in {THINK} {END_THINK} tags and the answer in {ANSWER} {END_ANSWER} tags, i.e., "
    f"{THINK} reasoning process here {END_THINK} {ANSWER} answer here {END_ANSWER}."
)


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt, and how a demonstration is laid out.

    Attributes:
        name: ``short``, ``r1``, ``r1-text``, or the text it was made from.
        text: prompt with ``{question}``, used as it stands; None where only the message exists.
        message: user message with ``{question}``, for the tokenizer's chat template; None means never.
        opens_think: the prompt ends with ``<think>`` and the response begins inside the block.
        compact: demonstrations without line breaks.
    """

    name: str
    text: str | None
    message: str | None = None
    opens_think: bool = False
    compact: bool = False

    def render(self, question: str, tokenizer: Any) -> str:
        """The prompt.

        A tokenizer with a chat template uses it where the template has a message. A ``<think>`` that the chat
        template itself puts at the end of its prompt is left to the response, unless ``opens_think`` asks for
        it: what a response has to contain then does not depend on the tokenizer.

        Raises:
            TaskError: only a message exists and the tokenizer has no chat template.
        """
        if self.message is not None and getattr(tokenizer, "chat_template", None):
            content = self.message.replace(FIELD, question)
            prompt: str = tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            if prompt.rstrip().endswith(THINK):
                prompt = prompt.rstrip().removesuffix(THINK)
            return prompt + THINK if self.opens_think else prompt
        if self.text is None:
            raise TaskError(
                f"template {self.name!r}: the tokenizer has no chat template; give one without {CHAT!r}"
            )
        return self.text.replace(FIELD, question)

    def lay_out(self, thought: str, answer: str) -> str:
        """The response of a demonstration: think block, answer block, tags included."""
        around, between = ("", "") if self.compact else ("\n", "\n")
        opening = "" if self.opens_think else THINK
        return f"{opening}{around}{thought}{around}{END_THINK}{between}{ANSWER}{answer}{END_ANSWER}"


SHORT = Template("short", f"{FIELD}=", compact=True)
R1 = Template("r1", _R1, message=_R1_MESSAGE)
R1_TEXT = Template("r1-text", _R1)
_NAMED = {t.name: t for t in (SHORT, R1, R1_TEXT)}


def load_template(template: str) -> Template:
    """A template by name or from its text.

    Args:
        template: ``short`` (``{question}=``), ``r1`` (through the tokenizer's chat template if it has one,
            else the text of DeepSeek-R1-Zero), ``r1-text`` (that text always), any text with ``{question}``
            (used as it stands), or ``chat:`` and a text with ``{question}`` (the user message of the chat
            template). A text that ends with ``<think>`` opens the think block for the response.

    Raises:
        TaskError: no such name, and no ``{question}`` in the text.
    """
    if template in _NAMED:
        return _NAMED[template]
    if FIELD not in template:
        close = difflib.get_close_matches(template, _NAMED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TaskError(
            f"unknown prompt template {template[:60]!r}: give one of {', '.join(_NAMED)}, or a text with "
            f"{FIELD}{hint}"
        )
    opens = template.rstrip().endswith(THINK)
    if not template.startswith(CHAT):
        return Template(template, template, opens_think=opens)
    message = template.removeprefix(CHAT).rstrip()
    message = message.removesuffix(THINK).rstrip() if opens else message
    return Template(template, None, message=message, opens_think=opens)
