"""Prompt templates: from a bare question to the text given to the tokenizer.

``short`` is made for the tiny policy, ``r1`` is the template of DeepSeek-R1-Zero (DeepSeek-AI 2025, table 1).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from stepscope.errors import TaskError
from stepscope.tasks.formats.prompts import render_chat
from stepscope.tasks.formats.response import MARK
from stepscope.tasks.problem import ANSWER, END_ANSWER, END_THINK, THINK, Chat

FIELD = "{question}"
CHAT = "chat:"

_LONGEST_OPENING = 200
_OPENING = re.compile(rf"{THINK}\s*(?:{END_THINK}\s*)?\Z")

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
_BOXED = f"{FIELD}\n\nReason step by step, and put the final answer within \\boxed{{}}."
_HASH = f"{FIELD}\n\nReason step by step, and put the final answer on the last line, after {MARK}."
_LAST_NUMBER = f"{FIELD}\n\nReason step by step, and end with the final answer."


@dataclass(frozen=True)
class Template:
    """How a question becomes a prompt.

    Attributes:
        name: ``short``, ``r1``, ``r1-text``, ..., or the text it was made from.
        text: prompt with ``{question}``, used as it stands; None where only the message exists.
        message: user message with ``{question}``, for the tokenizer's chat template; None means never.
        compact: demonstrations without line breaks.
        system: system message before the user's; empty for none.
        prefill: what the response's turn begins with, at the end of the prompt.
        variables: further variables of the chat template.
        chat_template: a chat template in place of the tokenizer's; empty for the tokenizer's own.
    """

    name: str
    text: str | None
    message: str | None = None
    compact: bool = False
    system: str = ""
    prefill: str = ""
    variables: Mapping[str, Any] = field(default_factory=dict, hash=False)
    chat_template: str = ""

    def ask(self, question: str, tokenizer: Any) -> str | Chat:
        """The prompt: messages where the template has one and the tokenizer a chat template, else a text.

        Raises:
            TaskError: only a message exists and the tokenizer has no chat template, or there is a system
                prompt and no chat template to put it in.
        """
        if self.message is not None and (self.chat_template or getattr(tokenizer, "chat_template", None)):
            messages = [{"role": "system", "content": self.system}] if self.system else []
            messages.append({"role": "user", "content": self.message.replace(FIELD, question)})
            return self.pass_on(messages)
        if self.text is None:
            raise TaskError(
                f"template {self.name!r}: the tokenizer has no chat template; give one without {CHAT!r}"
            )
        if self.system:
            raise TaskError(
                f"template {self.name!r}: system_prompt needs a chat template, and this prompt is a text; "
                f"give a template that starts with {CHAT!r}, or write the system prompt into the text"
            )
        return self.text.replace(FIELD, question) + self.prefill

    def pass_on(self, messages: Sequence[Mapping[str, Any]]) -> Chat:
        """The prompt of messages that are whole already."""
        return Chat(messages, self.variables, self.prefill, self.chat_template)

    def opening(self, tokenizer: Any = None, example: str | Chat | None = None) -> str:
        """The think block that the prompt ends with, opened or closed already; mostly empty.

        It is the chat template's (``<think>`` and a line break; an empty block where thinking is switched
        off), this template's own, or the prefill's. A response goes on from there. Without a tokenizer
        nothing is known of the chat template.

        Args:
            tokenizer: with the chat template.
            example: a prompt to look at; None for one that is made up.

        Raises:
            TaskError: as :func:`~stepscope.tasks.formats.prompts.encode_prompt`, or the chat template leaves
                the system message out.
        """
        if tokenizer is None:
            text = (self.text or "") + self.prefill
        else:
            asked = self.ask("1 + 1", tokenizer) if example is None else example
            text = asked if isinstance(asked, str) else render_chat(asked, tokenizer)
            if self.system.strip() not in text:
                raise TaskError(
                    "the tokenizer's chat template has no place for a system message and leaves it out; "
                    f"write the system prompt into the prompt template instead, ahead of {FIELD}"
                )
        found = _OPENING.search(text[-_LONGEST_OPENING:])
        return "" if found is None else found[0]


SHORT = Template("short", f"{FIELD}=", compact=True)
R1 = Template("r1", _R1, message=_R1_MESSAGE)
R1_TEXT = Template("r1-text", _R1)
BOXED, HASH, LAST_NUMBER = (
    Template(name, message + "\n", message=message)
    for name, message in (("boxed", _BOXED), ("hash", _HASH), ("last_number", _LAST_NUMBER))
)
PLAIN = Template("plain", FIELD, message=FIELD)
_NAMED = {t.name: t for t in (SHORT, R1, R1_TEXT, BOXED, HASH, LAST_NUMBER, PLAIN)}


def load_template(
    template: str,
    *,
    system_prompt: str = "",
    prefill: str = "",
    chat_template_kwargs: Mapping[str, Any] | None = None,
    chat_template: str = "",
) -> Template:
    """A template by name or from its text.

    Args:
        template: ``short`` (``{question}=``), ``r1`` (through the tokenizer's chat template if it has one,
            else the text of DeepSeek-R1-Zero), ``r1-text`` (that text always), ``boxed``, ``hash`` and
            ``last_number`` (which ask for the answer format of that name), ``plain`` (the question alone;
            these four through the chat template if there is one), any text with ``{question}``
            (used as it stands), or ``chat:`` and a text with ``{question}`` (the user message of the chat
            template). A ``<think>`` at the end of that message is a prefill.
        system_prompt: system message of the chat template; empty for none.
        prefill: text that the response's turn begins with, for example ``<think>`` and a line break.
        chat_template_kwargs: further variables of the chat template, for example ``enable_thinking``.
        chat_template: a chat template in place of the tokenizer's, as text.

    Raises:
        TaskError: no such name, and no ``{question}`` in the text.
    """
    chosen = _named(template)
    return replace(
        chosen,
        system=system_prompt,
        prefill=chosen.prefill + prefill,
        variables=dict(chat_template_kwargs or {}),
        chat_template=chat_template,
    )


def names_template(text: str) -> bool:
    """Whether a template has this name."""
    return text in _NAMED


def _named(template: str) -> Template:
    if template in _NAMED:
        return _NAMED[template]
    if FIELD not in template:
        close = difflib.get_close_matches(template, _NAMED, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise TaskError(
            f"unknown prompt template {template[:60]!r}: give one of {', '.join(_NAMED)}, or a text with "
            f"{FIELD}{hint}"
        )
    if not template.startswith(CHAT):
        return Template(template, template)
    message = template.removeprefix(CHAT)
    prefill = ""
    if message.rstrip().endswith(THINK):
        cut = message.rindex(THINK)
        message, prefill = message[:cut].rstrip(), message[cut:]
    return Template(template, None, message=message, prefill=prefill)
