"""Sampling by a server that speaks OpenAI's completions with token ids (vLLM, SGLang), or SGLang's own."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import httpx2

from stepscope.addresses import NO_ADDRESS, is_address
from stepscope.errors import BatchError, ConfigError, shown
from stepscope.policy.forward import vocabulary_size
from stepscope.policy.passes import Budget, track
from stepscope.policy.sampling.base import (
    Convention,
    Request,
    Response,
    Sampler,
    Truncation,
    plain,
)
from stepscope.policy.sampling.protocols import PROTOCOLS, Protocol
from stepscope.policy.sampling.weights import how_to_serve
from stepscope.policy.state import Policy

TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses after which the same request may succeed."""

LARGEST_ANSWER = 1 << 28
"""Bytes of an answer at most: some thousand for each of the longest response's tokens."""

LONGEST_WAIT = 30.0
"""Seconds between two tries at most."""


@dataclass(frozen=True, kw_only=True)
class ServerSampler(Sampler):
    """A request per response, each with a seed of its own: a server that honours seeds repeats itself.

    Attributes:
        url: of the server, with or without ``/v1``.
        model: name it serves the policy under; None for the only one that it has.
        api: ``completions`` for OpenAI's (vLLM, SGLang from 0.5 on), ``sglang`` for SGLang's ``/generate``.
        key_variable: environment variable with the server's key, or None where it needs none.
        concurrency: requests at a time.
        timeout: seconds that an answer may take.
        retries: times a request is sent again after an error that may pass.
        wait: seconds before the first of them; each further wait is twice as long.
    """

    url: str
    model: str | None = None
    api: Literal["completions", "sglang"] = "completions"
    key_variable: str | None = None
    concurrency: int = 32
    timeout: float = 600.0
    retries: int = 4
    wait: float = 0.5

    conventions: ClassVar[tuple[Convention, ...]] = ("processed", "tempered", "raw")

    def __post_init__(self) -> None:
        """Refuse an address that holds more than one, or none.

        Raises:
            ConfigError: naming what is expected.
        """
        if not is_address(self.url):
            raise ConfigError(f"sampler.url: {NO_ADDRESS}")
        try:
            httpx2.URL(self.url)
        except httpx2.InvalidURL as error:
            raise ConfigError(f"sampler.url: {self.url!r} is no URL ({error}); {NO_ADDRESS}") from error

    @property
    def order(self) -> tuple[Truncation, ...]:  # type: ignore[override]
        """In which the server truncates."""
        return self._protocol.order

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return f"server {self._base}"

    def sample(self, policy: Policy, request: Request, budget: Budget) -> list[Response]:
        """The responses, in the order of the request.

        Raises:
            BatchError: the server cannot be reached, refuses, or gave no usable answer.
            ConfigError: it serves several models and none is named, or not the one that is.
        """
        plain(self.decoding, self.name)
        vocabulary = vocabulary_size(policy.model)
        limits = httpx2.Limits(max_connections=self.concurrency)
        timeout = httpx2.Timeout(self.timeout, connect=min(self.timeout, 10.0))
        with (
            httpx2.Client(
                base_url=self._base, headers=self._headers(), limits=limits, timeout=timeout
            ) as http,
            ThreadPoolExecutor(self.concurrency) as pool,
        ):
            model = self._served(http)

            def one(i: int) -> Response:
                body = self._protocol.body(request, i, self.decoding, model)
                answer = self._sent(http, "POST", self._protocol.path, body)
                where = f"{self.name}: response {i}"
                return self._protocol.read(answer, request, i, where=where, vocabulary=vocabulary)

            futures = {pool.submit(one, i): i for i in range(len(request))}
            found: dict[int, Response] = {}
            try:
                for future in track(as_completed(futures), "sampling", budget, total=len(futures)):
                    found[futures[future]] = future.result()
            finally:
                for future in futures:
                    future.cancel()
        return [found[i] for i in range(len(request))]

    def advice(self, policy: Policy) -> str:
        """What to do where it turns out to have another policy."""
        return how_to_serve(policy)

    @property
    def _protocol(self) -> Protocol:
        return PROTOCOLS[self.api]

    @property
    def _base(self) -> str:
        return self.url.rstrip("/").removesuffix("/v1")

    def _headers(self) -> dict[str, str]:
        if self.key_variable is None:
            return {}
        key = os.environ.get(self.key_variable)
        if not key:
            raise ConfigError(
                f"{self.name}: the environment variable {self.key_variable} is not set; set it to the key"
            )
        return {"Authorization": f"Bearer {key}"}

    def _served(self, http: httpx2.Client) -> str:
        """The name under which the policy is served."""
        listed = self._sent(http, "GET", "/v1/models", None)
        rows = listed.get("data")
        names = (
            [str(row.get("id")) for row in rows if isinstance(row, Mapping)] if isinstance(rows, list) else []
        )
        if self.model is not None:
            if self.model not in names:
                raise ConfigError(
                    f"{self.name}: serves {', '.join(names) or 'nothing'}, and not {self.model}; give the "
                    "name under which it serves this policy"
                )
            return self.model
        if len(names) != 1:
            raise ConfigError(
                f"{self.name}: serves {', '.join(names) or 'nothing'}; name the one that is this policy "
                "(sampler.model)"
            )
        return names[0]

    def _sent(
        self, http: httpx2.Client, method: str, path: str, body: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """The answer to a request, sent again while that may help.

        Raises:
            BatchError: it never came, or is none.
        """
        for attempt in range(self.retries + 1):
            pause = min(LONGEST_WAIT, self.wait * 2**attempt)
            try:
                answer = self._answer(http, method, path, body)
            except httpx2.RequestError as error:
                trouble = f"{type(error).__name__}: {error}"
            else:
                if answer.status_code not in TRANSIENT:
                    return self._accepted(answer, path)
                trouble = f"status {answer.status_code}: {shown(answer.text)}"
                pause = _asked_to_wait(answer, pause)
            if attempt < self.retries:
                time.sleep(pause)
        raise BatchError(
            f"{self.name}: {path} failed {self.retries + 1} times, last with {trouble}; see whether it runs "
            f"and what it logs (sampler.timeout is {self.timeout:g} s)"
        )

    def _answer(
        self, http: httpx2.Client, method: str, path: str, body: Mapping[str, Any] | None
    ) -> httpx2.Response:
        """What is answered to one request, read whole; httpx times each piece of it alone.

        Raises:
            httpx2.RequestError: nothing comes, or not within the time.
            BatchError: it does not end.
        """
        latest = time.monotonic() + self.timeout
        with http.stream(method, path, json=body) as answer:
            pieces, size = [], 0
            for piece in answer.iter_bytes():
                pieces.append(piece)
                size += len(piece)
                if size > LARGEST_ANSWER:
                    raise BatchError(
                        f"{self.name}: {path} answers more than {LARGEST_ANSWER >> 20} MiB, expected one "
                        "response; is this the address of the server?"
                    )
                if time.monotonic() > latest:
                    raise httpx2.ReadTimeout("the answer has not ended in time")
        kept = [(k, v) for k, v in answer.headers.raw if k.lower() in (b"content-type", b"retry-after")]
        return httpx2.Response(answer.status_code, headers=kept, content=b"".join(pieces))

    def _accepted(self, answer: httpx2.Response, path: str) -> dict[str, Any]:
        if answer.status_code != 200:
            raise BatchError(
                f"{self.name}: {path} refuses with status {answer.status_code}: {shown(answer.text)}; see "
                "whether it serves this API and takes these settings"
            )
        try:
            said = answer.json()
        except (ValueError, RecursionError) as error:
            raise BatchError(
                f"{self.name}: {path} answers {shown(answer.text)}, expected JSON; is this the address of "
                "the server?"
            ) from error
        if not isinstance(said, dict):
            raise BatchError(f"{self.name}: {path} answers {shown(said)}, expected an object")
        return said


def _asked_to_wait(answer: httpx2.Response, otherwise: float) -> float:
    said = answer.headers.get("retry-after", "")
    return min(LONGEST_WAIT, float(said)) if said.isdecimal() else otherwise
