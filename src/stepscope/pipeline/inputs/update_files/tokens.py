"""From what was logged of a response to its token ids: those logged, or those of the text, where it has any.

Trainers log text without special tokens. What is lost of a response is the token that ended it, which is put
back unless the text alone is as long as a response may be: then it was cut there. Special tokens inside of a
response, and a tokenization that is not the tokenizer's own, leave no trace in a text.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stepscope.errors import BatchError, TaskError
from stepscope.pipeline.inputs.update_files.fields import Logged
from stepscope.policy.rollouts import end_tokens, response_text
from stepscope.policy.state import Policy
from stepscope.results import BoolArray
from stepscope.tasks.formats.prompts import Prompt, encode_prompt, render_chat
from stepscope.tasks.problem import Chat

_MARK = "\u2040stepscope\u2040"
"""Stands for the user's words in a rendered template; no prompt holds it."""

LOG_IDS = "log token ids (docs/FORMATS.md, Batches)"


@dataclass(frozen=True)
class Told:
    """One response in tokens.

    Attributes:
        prompt: text and ids.
        question: the user's last words, empty where they are not known.
        response: text.
        ids: of the response.
        mask: (tok,) True where the policy wrote the token; None where it wrote all.
        truncated: whether it was cut.
        from_text: whether the ids of the response are those of a text.
        retold: whether the text gives the ids that were logged; None where it cannot be told.
    """

    prompt: Prompt
    question: str
    response: str
    ids: tuple[int, ...]
    mask: BoolArray | None
    truncated: bool
    from_text: bool
    retold: bool | None


class TokenReader:
    """Reads the rows of a dump with the tokenizer and the settings of a policy.

    Args:
        policy: with a tokenizer.
        stripped: prompts were logged as text without their special tokens, as verl does.
    """

    def __init__(self, policy: Policy, *, stripped: bool) -> None:
        self._tokenizer = policy.tokenizer
        self._settings = policy.settings
        self._ends = frozenset(end_tokens(policy))
        self._read = response_text(policy)
        self._stripped = stripped
        self._variables = policy.settings.chat_template_kwargs or {}

    def tell(self, row: Logged) -> Told:
        """The tokens of a row.

        Raises:
            BatchError: a text cannot be tokenized back, or ids hold padding.
        """
        try:
            prompt, question = self._prompt(row)
            ids, mask, truncated = self._response(row, prompt)
        except TaskError as error:
            raise BatchError(f"{row.where}: {error}") from error
        retold = None
        if row.response_ids is not None and isinstance(row.response, str):
            if self._spoken(ids) != row.response:
                raise BatchError(
                    f"{row.where}: the response's text is not what its token ids say with this tokenizer; is "
                    "the dump of a run of this model?"
                )
            body = [token for token in ids if token not in self._ends]
            retold = self._ids_of(row.response) == tuple(body)
        return Told(
            prompt=prompt,
            question=question,
            response=self._read.whole(ids),
            ids=ids,
            mask=mask,
            truncated=truncated if row.truncated is None else row.truncated,
            from_text=row.response_ids is None,
            retold=retold,
        )

    def _prompt(self, row: Logged) -> tuple[Prompt, str]:
        """The prompt, cut as the run cuts it, and the user's last words."""
        asked = row.prompt
        question = asked if isinstance(asked, str) else _last_words(asked)
        if row.prompt_ids is not None:
            self._refuse_padding(row, row.prompt_ids[0], "begins")
            text = self._tokenizer.decode(list(row.prompt_ids))
            return Prompt(text, row.prompt_ids), question or text
        if isinstance(asked, str) and self._stripped and getattr(self._tokenizer, "chat_template", None):
            prompt, question = self._unstripped(row, asked)
        else:
            prompt = encode_prompt(asked if isinstance(asked, str) else self._chat(asked), self._tokenizer)
        limit = self._settings.max_prompt_tokens
        return replace(prompt, token_ids=prompt.token_ids[-limit:] if limit else prompt.token_ids), question

    def _unstripped(self, row: Logged, text: str) -> tuple[Prompt, str]:
        """The prompt of one user message whose rendered form, without its special tokens, is the text."""
        system = self._settings.system_prompt
        before = [{"role": "system", "content": system}] if system else []
        rendered = render_chat(self._chat([*before, {"role": "user", "content": _MARK}]), self._tokenizer)
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        head, mark, tail = self._spoken(ids).partition(_MARK)
        if mark and text.startswith(head) and text.endswith(tail) and len(text) > len(head) + len(tail):
            words = text[len(head) : len(text) - len(tail)]
            prompt = encode_prompt(self._chat([*before, {"role": "user", "content": words}]), self._tokenizer)
            if self._spoken(prompt.token_ids) == text:
                return prompt, words
        raise BatchError(
            f"{row.where}: the prompt was logged without its special tokens, and {text[:60]!r} is not what "
            f"the chat template makes of one user message; {LOG_IDS}, or give loss.system_prompt if the run "
            "had one"
        )

    def _response(self, row: Logged, prompt: Prompt) -> tuple[tuple[int, ...], BoolArray | None, bool]:
        """Ids, mask and whether it was cut."""
        if row.response_ids is not None:
            if row.response_ids[-2:-1] and row.response_ids[-2] in self._ends:
                self._refuse_padding(row, row.response_ids[-1], "ends")
            return row.response_ids, row.mask, row.response_ids[-1] not in self._ends
        if isinstance(row.response, str):
            ids, truncated = self._ended(row, self._body(row, row.response))
            return ids, None, truncated
        (first, *others) = row.response
        plain = set(first) <= {"role", "content"} and isinstance(first.get("content"), str)
        if plain and not others and not isinstance(row.prompt, str):
            ids, truncated = self._ended(row, self._body(row, first["content"]))
            return ids, None, truncated
        return self._turns(row, prompt)

    def _body(self, row: Logged, text: str) -> tuple[int, ...]:
        """Ids of a text that say the text again."""
        ids = self._ids_of(text)
        if (found := self._spoken(ids)) != text:
            at = next((i for i, (a, b) in enumerate(zip(found, text, strict=False)) if a != b), 0)
            raise BatchError(
                f"{row.where}: the response cannot be tokenized back: its text reads {text[at : at + 40]!r} "
                f"where its tokens say {found[at : at + 40]!r}; {LOG_IDS}"
            )
        return ids

    def _ended(self, row: Logged, ids: tuple[int, ...]) -> tuple[tuple[int, ...], bool]:
        """With the token that ended it, unless it was cut at the longest length."""
        most = self._settings.max_response_tokens
        cut = len(ids) == most if row.truncated is None else row.truncated
        if (count := len(ids) + (not cut)) > most:
            raise BatchError(
                f"{row.where}: the response has {count} tokens when tokenized back, its end among them, and "
                f"the run allows {most}: its tokens were others; {LOG_IDS}, or mend loss.max_response_tokens"
            )
        if cut:
            return ids, True
        if self._tokenizer.eos_token_id is None:
            raise BatchError(f"{row.where}: the tokenizer has no end token to put back; {LOG_IDS}")
        return (*ids, int(self._tokenizer.eos_token_id)), False

    def _turns(self, row: Logged, prompt: Prompt) -> tuple[tuple[int, ...], BoolArray | None, bool]:
        """Several turns, as the chat template renders them; the assistant's are the policy's.

        What follows an assistant's end token, up to the start of its next turn, is context, as in TRL.
        """
        if isinstance(row.prompt, str) or row.prompt is None:
            raise BatchError(f"{row.where}: a response in messages to a prompt that is none; {LOG_IDS}")
        ids, said, mask = list(prompt.token_ids), list(row.prompt), [False] * len(prompt.token_ids)
        for i, message in enumerate(row.response):
            said.append(message)
            mine = message["role"] == "assistant"
            if not mine and i + 1 < len(row.response) and row.response[i + 1]["role"] != "assistant":
                continue
            whole = self._rendered(said, then_policy=not mine)
            if whole[: len(ids)] != ids:
                raise BatchError(
                    f"{row.where}: the chat template renders what came before turn {i} otherwise once it is "
                    f"there, so that its tokens were others; {LOG_IDS}"
                )
            new = whole[len(ids) :]
            if mine:
                last = max((k for k, token in enumerate(new) if token in self._ends), default=len(new) - 1)
                new = new[: last + 1]
            ids += new
            mask += [mine] * len(new)
        start = len(prompt.token_ids)
        most = self._settings.max_response_tokens
        if len(ids) - start > most and len(ids) - start - 1 == most and ids[-1] in self._ends:
            del ids[-1], mask[-1]
        if len(ids) - start > most:
            raise BatchError(
                f"{row.where}: the response has {len(ids) - start} tokens when rendered again, and the run "
                f"allows {most}: its tokens were others; {LOG_IDS}"
            )
        return tuple(ids[start:]), np.array(mask[start:], dtype=np.bool_), ids[-1] not in self._ends

    def _rendered(self, messages: Sequence[dict[str, Any]], *, then_policy: bool) -> list[int]:
        chat = self._chat(messages)
        if then_policy:
            return list(encode_prompt(chat, self._tokenizer).token_ids)
        text = render_chat(chat, self._tokenizer, then_policy=False)
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _chat(self, messages: Sequence[dict[str, Any]]) -> Chat:
        return Chat(list(messages), self._variables)

    def _ids_of(self, text: str) -> tuple[int, ...]:
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _spoken(self, ids: Sequence[int]) -> str:
        """As trainers log it."""
        text: str = self._tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _refuse_padding(self, row: Logged, token: int, where: str) -> None:
        pads = {self._tokenizer.pad_token_id} - {self._tokenizer.bos_token_id, None}
        if token in pads and (where == "begins" or token not in self._ends):
            raise BatchError(
                f"{row.where}: its token ids {where[:-1]} with the padding token {token}; leave padding out"
            )


def _last_words(messages: Any) -> str:
    said = [m.get("content") for m in messages or () if m.get("role") == "user"]
    return said[-1] if said and isinstance(said[-1], str) else ""
