"""What servers are asked for a response, and how their answers are read."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

from stepscope.errors import BatchError, shown
from stepscope.policy.sampling.base import Decoding, Request, Response, Truncation, checked_response


class Protocol(ABC):
    """One way of talking to a server.

    Attributes:
        path: where requests go.
        order: in which servers that speak it truncate.
    """

    path: str
    order: tuple[Truncation, ...]

    @abstractmethod
    def body(self, request: Request, row: int, decoding: Decoding, model: str) -> dict[str, Any]:
        """What to send for one response."""

    @abstractmethod
    def read(
        self, answer: Mapping[str, Any], request: Request, row: int, *, where: str, vocabulary: int
    ) -> Response:
        """The response that came back.

        Raises:
            BatchError: there is none, or not all that is needed of it.
        """


class Completions(Protocol):
    """OpenAI's ``/v1/completions`` with a prompt of token ids, as vLLM and SGLang extend it.

    All settings are sent, because a server's own defaults may come from the model's generation config. vLLM
    gives log-probs before temperature and truncation unless it runs with ``--logprobs-mode
    processed_logprobs``; SGLang those after temperature and before truncation.
    """

    path = "/v1/completions"
    order = ("min_p", "top_k", "top_p")

    def body(self, request: Request, row: int, decoding: Decoding, model: str) -> dict[str, Any]:
        """What to send for one response."""
        return {
            "model": model,
            "prompt": list(request.prompts[row]),
            "max_tokens": request.max_tokens,
            "temperature": decoding.own_temperature(request.temperature),
            "top_p": decoding.top_p,
            "top_k": decoding.top_k or -1,
            "min_p": decoding.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            "n": 1,
            "seed": int(request.randomness[row, 0]),
            "stop_token_ids": list(request.ends),
            "logprobs": 0,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
            "skip_special_tokens": False,
            "add_special_tokens": False,
        }

    def read(
        self, answer: Mapping[str, Any], request: Request, row: int, *, where: str, vocabulary: int
    ) -> Response:
        """The response that came back."""
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], Mapping):
            raise BatchError(f"{where}: choices are {shown(choices)}, expected one")
        choice = choices[0]
        sent, prompt = list(request.prompts[row]), choice.get("prompt_token_ids")
        if prompt is not None and prompt != sent:
            raise BatchError(
                f"{where}: the server read {shown(prompt)} as the prompt, and was sent {shown(sent)}; it "
                "adds or drops tokens"
            )
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, Mapping) or logprobs.get("token_logprobs") is None:
            raise BatchError(
                f"{where}: no log-probs (logprobs: {shown(logprobs)}), which tell whether the server has "
                "this policy; use one that gives them"
            )
        ids = _token_ids(choice, logprobs)
        if ids is None:
            raise BatchError(
                f"{where}: no token ids (neither token_ids nor tokens of the form token_id:N), and text "
                "alone does not say what was sampled; use vLLM, or SGLang with sampler.api=sglang"
            )
        return checked_response(ids, logprobs["token_logprobs"], request, where=where, vocabulary=vocabulary)


def _token_ids(choice: Mapping[str, Any], logprobs: Mapping[str, Any]) -> object:
    """Token ids under the names that vLLM and SGLang give them, or out of their tokens; None without."""
    for name in ("token_ids", "response_token_ids"):
        if choice.get(name) is not None:
            return choice[name]
    tokens = logprobs.get("tokens")
    if not isinstance(tokens, list):
        return None
    read = [re.fullmatch(r"token_id:(\d{1,9})", str(token)) for token in tokens]
    return [int(found[1]) for found in read if found] if all(read) else None


class Sglang(Protocol):
    """SGLang's ``/generate`` with ``input_ids``.

    Seeds are honoured under ``--enable-deterministic-inference``.
    """

    path = "/generate"
    order = ("top_p", "top_k", "min_p")

    def body(self, request: Request, row: int, decoding: Decoding, model: str) -> dict[str, Any]:
        """What to send for one response."""
        return {
            "input_ids": list(request.prompts[row]),
            "sampling_params": {
                "temperature": decoding.own_temperature(request.temperature),
                "top_p": decoding.top_p,
                "top_k": decoding.top_k or -1,
                "min_p": decoding.min_p,
                "repetition_penalty": 1.0,
                "presence_penalty": 0.0,
                "frequency_penalty": 0.0,
                "max_new_tokens": request.max_tokens,
                "stop_token_ids": list(request.ends),
                "sampling_seed": int(request.randomness[row, 0]),
                "skip_special_tokens": False,
            },
            "return_logprob": True,
        }

    def read(
        self, answer: Mapping[str, Any], request: Request, row: int, *, where: str, vocabulary: int
    ) -> Response:
        """The response that came back: triples of log-prob, token id and text."""
        meta = answer.get("meta_info")
        rows = meta.get("output_token_logprobs") if isinstance(meta, Mapping) else None
        if not isinstance(rows, list) or not all(isinstance(r, list | tuple) and len(r) >= 2 for r in rows):
            raise BatchError(
                f"{where}: no log-probs (output_token_logprobs: {shown(rows)}), which tell whether the "
                "server has this policy; use one that gives them"
            )
        ids = [r[1] for r in rows]
        said = answer.get("output_ids")
        if said is not None and said != ids:
            raise BatchError(
                f"{where}: output_ids are {shown(said)}, and the log-probs are of {shown(ids)}; they are not "
                "of one response"
            )
        return checked_response(ids, [r[0] for r in rows], request, where=where, vocabulary=vocabulary)


PROTOCOLS: Mapping[str, Protocol] = {"completions": Completions(), "sglang": Sglang()}
