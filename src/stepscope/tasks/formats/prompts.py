"""From what is asked to the token ids of a prompt: one way for training, evaluation, measurement and probes.

A text is tokenized once, with what the tokenizer puts before it. Messages become the ids of the tokenizer's
own ``apply_chat_template(tokenize=True)``, as in TRL, and are never tokenized as text a second time.
"""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import jinja2

from stepscope.errors import TaskError
from stepscope.tasks.problem import THINK, Chat

RENDERING_SECONDS = 10.0
"""Longest time a chat template may take for one prompt."""

_FAULTS = (
    jinja2.TemplateError,
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What a chat template, which is somebody else's program, may raise."""


@dataclass(frozen=True)
class Prompt:
    """A prompt as the policy gets it: its token ids, and the text they stand for."""

    text: str
    token_ids: tuple[int, ...]


def encode_prompt(asked: str | Chat, tokenizer: Any) -> Prompt:
    """Text and token ids of a prompt.

    A text is tokenized with the special tokens that the tokenizer puts before it (a BOS, unless the text
    brings its own), without those it puts after it: a prompt that ends with an EOS has ended. Messages give
    the ids of ``apply_chat_template(tokenize=True, add_generation_prompt=True)``; with a prefill those of the
    rendered text with the prefill at its end, as if the template had put it there.

    Raises:
        TaskError: the template refuses the messages, fails, or takes too long; or there is no template, or no
            token.
    """
    if isinstance(asked, str):
        prompt = Prompt(asked, _plain_ids(asked, tokenizer))
    else:
        text = render_chat(asked, tokenizer)
        if asked.prefill:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        else:
            ids = _apply_template(asked, tokenizer, tokenize=True)["input_ids"]
        prompt = Prompt(text, tuple(ids))
    if not prompt.token_ids:
        raise TaskError(f"prompt {prompt.text[:60]!r} has no tokens; mend the task's prompt")
    return prompt


def render_chat(chat: Chat, tokenizer: Any, *, then_policy: bool = True) -> str:
    """The text of a prompt in messages, prefill included.

    Args:
        chat: the messages.
        tokenizer: with the chat template.
        then_policy: whether the policy's turn begins at the end.

    Raises:
        TaskError: as :func:`encode_prompt`.
    """
    text: str = _apply_template(chat, tokenizer, tokenize=False, then_policy=then_policy)
    if text.rstrip().endswith(THINK) and chat.prefill.lstrip().startswith(THINK):
        raise TaskError(
            f"the chat template ends the prompt with {THINK} itself; leave {THINK} out of prefill and of the "
            "end of the prompt template"
        )
    return text + chat.prefill


def _apply_template(chat: Chat, tokenizer: Any, *, tokenize: bool, then_policy: bool = True) -> Any:
    """``apply_chat_template`` within the time limit, its faults as a :class:`TaskError`."""
    if not chat.template and not getattr(tokenizer, "chat_template", None):
        raise TaskError(
            "the tokenizer has no chat template for a prompt in messages; give a prompt as text, or a chat "
            "template (template=FILE)"
        )
    own = set(inspect.signature(tokenizer.apply_chat_template).parameters) - {"documents", "kwargs", "tools"}
    if odd := sorted(own & set(chat.variables)):
        raise TaskError(
            f"chat_template_kwargs: {', '.join(odd)} cannot be set; give variables of the template"
        )
    late = TaskError(
        f"the tokenizer's chat template takes more than {RENDERING_SECONDS:g} s for one prompt; mend "
        "chat_template.jinja, or give a prompt template without 'chat:'"
    )
    try:
        with _time_limit(RENDERING_SECONDS, late):
            return tokenizer.apply_chat_template(
                [dict(message) for message in chat.messages],
                add_generation_prompt=then_policy,
                tokenize=tokenize,
                **({"chat_template": chat.template} if chat.template else {}),
                **chat.variables,
            )
    except _FAULTS as error:
        roles = ", ".join(str(message.get("role")) for message in chat.messages)
        words = " ".join(str(error).split())[:160]
        raise TaskError(
            f"the tokenizer's chat template fails on messages of the roles {roles}: {type(error).__name__}: "
            f"{words}; give system_prompt if it wants a system message (or leave it out if it takes none), "
            "chat_template_kwargs if it wants a variable, or a prompt template without 'chat:'"
        ) from error


def tokens_after(tokenizer: Any) -> tuple[int, ...]:
    """Ids that the tokenizer puts after every text, an EOS mostly; none of them is in a prompt here."""
    return _parts("1", tokenizer)[2]


def _plain_ids(text: str, tokenizer: Any) -> tuple[int, ...]:
    """Ids of a text with what the tokenizer adds before it, without what it adds after it."""
    before, body, _ = _parts(text, tokenizer)
    if before and before[-1:] == body[:1] == (tokenizer.bos_token_id,):
        before = before[:-1]
    return before + body


def _parts(text: str, tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """What the tokenizer adds before a text, the ids of the text itself, and what it adds after it."""
    whole = tuple(tokenizer(text)["input_ids"])
    body = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    starts = range(len(whole) - len(body) + 1)
    start = next((i for i in starts if whole[i : i + len(body)] == body), None)
    if start is None:
        raise TaskError(
            f"the tokenizer ({type(tokenizer).__name__}) gives {text[:40]!r} other tokens when it adds its "
            "special tokens, so that what it adds cannot be told; use its fast version"
        )
    return whole[:start], body, whole[start + len(body) :]


@contextmanager
def _time_limit(seconds: float, late: TaskError) -> Iterator[None]:
    """Raise ``late`` once the block has taken this long; only the main thread can be interrupted."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise late

    handler = signal.signal(signal.SIGALRM, stop)
    timer = signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
