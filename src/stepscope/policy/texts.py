"""From token ids to text: what a response says, and which part of it each of its tokens wrote."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from stepscope.results.tables import TextArray
from stepscope.rules.token_classes import kinds, token_names
from stepscope.tasks.problem import ANSWER, END_ANSWER, END_THINK, THINK

_UNFINISHED = "\ufffd"
"""What a decoder shows for bytes that are no character, or not one yet."""


class ResponseText:
    """Decodes the responses of a policy.

    The tokens that end, begin or pad a sequence have no text. Every other token has, special tokens too: a
    tag is read whether or not the tokenizer calls it special.

    Args:
        tokenizer: decodes.
        ends: ids of the tokens that end a response.
    """

    def __init__(self, tokenizer: Any, ends: Collection[int]) -> None:
        around = {*ends, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}
        tags = {tokenizer.convert_tokens_to_ids(tag) for tag in (THINK, END_THINK, ANSWER, END_ANSWER)}
        tags.discard(tokenizer.unk_token_id)
        self._tokenizer = tokenizer
        self._alone: dict[int, str] = {}
        self._ends = frozenset(ends)
        self._silent = frozenset(around & set(tokenizer.all_special_ids) - tags)

    def whole(self, ids: Sequence[int]) -> str:
        """The text of a response."""
        return self._decode([token for token in ids if token not in self._silent])

    def by_token(self, ids: Sequence[int]) -> list[str]:
        """The text of every token; joined up, they are the text of the response.

        A character that several tokens write belongs to the last of them; the others, and the tokens that end
        a response, have an empty text.
        """
        heard = [token for token in ids if token not in self._silent]
        whole = self._decode(heard)
        for token in set(heard) - self._alone.keys():
            self._alone[token] = self._decode([token])
        found = [self._alone[token] for token in heard]
        if "".join(found) != whole:  # what a token says depends on its neighbours
            found = self._in_windows(heard)
        if "".join(found) != whole:  # and on more than these
            found = self._by_prefixes(heard, whole)
        texts = iter(found)
        return ["" if token in self._silent else next(texts) for token in ids]

    def facts(self, responses: Sequence[Sequence[int]]) -> dict[str, TextArray]:
        """``token`` and ``kind`` of every token of some responses, as rules look at them.

        Args:
            responses: ids of whole responses.
        """
        names: list[str] = []
        found: list[str] = []
        for ids in responses:
            texts, ended = self.by_token(ids), bool(ids) and ids[-1] in self._ends
            names += token_names(texts, ended)
            found += kinds(texts, ended)
        return {"token": np.array(names, dtype=object), "kind": np.array(found, dtype=object)}

    def _in_windows(self, ids: list[int]) -> list[str]:
        """What each token adds to the whole characters just before it; linear in the number of tokens."""
        found = []
        start = read = told = 0
        for k in range(1, len(ids) + 1):
            now = self._decode(ids[start:k])
            unfinished = k < len(ids) and now.endswith(_UNFINISHED)
            settled = now.rstrip(_UNFINISHED) if unfinished else now
            found.append(settled[told:])
            told = max(told, len(settled))
            if found[-1] and not unfinished:
                start, read = read, k
                told = len(self._decode(ids[start:read]))
        return found

    def _by_prefixes(self, ids: list[int], whole: str) -> list[str]:
        """What each token adds to the part of the response that is settled; quadratic, always joins up."""
        found, done = [], 0
        for k in range(1, len(ids) + 1):
            now = whole if k == len(ids) else self._decode(ids[:k])
            same = next((i for i, (a, b) in enumerate(zip(now, whole, strict=False)) if a != b), len(now))
            reached = max(done, min(same, len(whole)))
            found.append(whole[done:reached])
            done = reached
        return found

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))
