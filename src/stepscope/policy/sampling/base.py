"""What every sampler is asked for and gives back, and how tokens are drawn from a policy."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import numpy as np
import numpy.typing as npt
from transformers import LogitsProcessor, MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from stepscope.errors import BatchError, ConfigError, shown
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import FloatArray

Convention = Literal["raw", "tempered", "processed"]
"""Which log-probs an engine gives: log softmax(z), log softmax(z/T'), or that of what is left of the second
after truncation, which is what it draws from."""

Truncation = Literal["top_k", "top_p", "min_p"]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """How tokens are drawn: temperature and truncation. Another way is a subclass with warpers of its own.

    Log-probs and entropies of the responses stay those of the policy, whatever they were drawn by.

    Attributes:
        temperature: T'; None for the policy's own T.
        top_p: from the smallest set of tokens that holds so much probability; 1 takes in all.
        top_k: from so many of the likeliest tokens; 0 takes in all.
        min_p: from tokens with at least so much of the largest probability; 0 takes in all.
    """

    temperature: float | None = None
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what no engine takes.

        Raises:
            ConfigError: naming the setting.
        """
        for name, good, expected in (
            ("temperature", self.temperature is None or self.temperature > 0, "above 0, or None"),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("top_k", self.top_k >= 0, "0 for all, or how many"),
            ("min_p", 0 <= self.min_p <= 1, "between 0 and 1"),
        ):
            if not good:
                raise ConfigError(f"decoding: {name} is {getattr(self, name)}, expected {expected}")

    def warpers(self, order: Sequence[Truncation] = ("top_k", "top_p", "min_p")) -> list[LogitsProcessor]:
        """What changes logits / T' before a token is drawn.

        Args:
            order: in which an engine truncates; each acts on what the one before has left.
        """
        found: dict[Truncation, LogitsProcessor] = {}
        if self.top_k > 0:
            found["top_k"] = TopKLogitsWarper(self.top_k)
        if self.top_p < 1:
            found["top_p"] = TopPLogitsWarper(self.top_p)
        if self.min_p > 0:
            found["min_p"] = MinPLogitsWarper(self.min_p)
        return [found[name] for name in order if name in found]

    def own_temperature(self, temperature: float) -> float:
        """T', where the policy has the temperature given."""
        return temperature if self.temperature is None else self.temperature

    def is_policy(self, temperature: float) -> bool:
        """Whether this draws from the policy itself, which has the temperature given."""
        return self.own_temperature(temperature) == temperature and not self.warpers()


@dataclass(frozen=True)
class Request:
    """Responses wanted, one per entry of ``prompts``.

    Attributes:
        prompts: token ids of the prompt of each response.
        randomness: (seq, any) what :meth:`Sampler.randomness` drew, a row for each response: what a response
            is depends on its row and on no other.
        max_tokens: longest response allowed.
        temperature: of the policy.
        ends: ids of the tokens that end a response.
    """

    prompts: Sequence[tuple[int, ...]]
    randomness: npt.NDArray[Any]
    max_tokens: int
    temperature: float
    ends: tuple[int, ...]

    def __len__(self) -> int:
        """Number of responses."""
        return len(self.prompts)

    def part(self, rows: slice) -> Request:
        """Some of the responses."""
        return replace(self, prompts=self.prompts[rows], randomness=self.randomness[rows])


@dataclass(frozen=True)
class Response:
    """One sampled response.

    Attributes:
        token_ids: up to and with the first token that ends it, or ``max_tokens`` of them.
        logprobs: (tok,) as the engine gave them, by its convention; None where it gives none.
    """

    token_ids: tuple[int, ...]
    logprobs: FloatArray | None = None


@dataclass(frozen=True, kw_only=True)
class Sampler(ABC):
    """Who draws responses. One file per engine in :mod:`stepscope.policy.sampling`.

    Attributes:
        decoding: temperature and truncation.
    """

    order: ClassVar[tuple[Truncation, ...]] = ("top_k", "top_p", "min_p")
    """In which it truncates."""

    conventions: ClassVar[tuple[Convention, ...]] = ()
    """Which of them its log-probs may follow; none where it gives no log-probs."""

    decoding: Decoding = field(default_factory=Decoding)

    @property
    def name(self) -> str:
        """What it is called in messages and records."""
        return type(self).__name__

    def randomness(self, generator: np.random.Generator, count: int, length: int) -> npt.NDArray[Any]:
        """(seq, 1) seeds of so many responses of at most ``length`` tokens."""
        return generator.integers(1 << 31, size=(count, 1))

    @abstractmethod
    def sample(self, policy: Policy, request: Request, budget: Budget) -> list[Response]:
        """The responses, in the order of the request.

        Args:
            policy: what is to be sampled from; engines that have their own weights check that they fit.
            request: what is wanted.
            budget: how many sequences are generated at a time, where that is this process's business.

        Raises:
            BatchError: an engine cannot be reached or gave no usable answer.
        """

    def advice(self, policy: Policy) -> str:
        """What to do where it turns out to have another policy."""
        return "sample from this checkpoint"

    def close(self) -> None:
        """Give back what sampling took: memory, connections."""
        return

    def described(self) -> dict[str, Any]:
        """Its settings, for the provenance."""
        return {"engine": self.name, **{k: v for k, v in vars(self.decoding).items() if v is not None}}


def plain(decoding: Decoding, engine: str) -> Decoding:
    """The decoding itself, refused where it has warpers of its own, which engines do not take.

    Raises:
        ConfigError: it is of a subclass.
    """
    if type(decoding) is not Decoding:
        raise ConfigError(
            f"{engine}: takes temperature, top_p, top_k and min_p, and not {type(decoding).__name__}; use "
            "the transformers sampler for warpers of your own"
        )
    return decoding


def checked_response(
    ids: object, logprobs: object, request: Request, *, where: str, vocabulary: int
) -> Response:
    """What an engine said of one response, as a response; refused where it is none.

    Args:
        ids: should be token ids.
        logprobs: should be a log-prob for each.
        request: what was asked for.
        where: which answer this is, for messages.
        vocabulary: number of token ids that the model knows.

    Raises:
        BatchError: naming what is wrong with it.
    """
    if not isinstance(ids, list | tuple) or not ids or not all(type(t) is int for t in ids):
        raise BatchError(f"{where}: token ids are {shown(ids)}, expected a list of integers")
    if odd := [t for t in ids if not 0 <= t < vocabulary]:
        raise BatchError(
            f"{where}: token {odd[0]}, and the model knows 0 to {vocabulary - 1}; the engine has another "
            "model"
        )
    if not isinstance(logprobs, list | tuple) or len(logprobs) != len(ids):
        count = len(logprobs) if isinstance(logprobs, list | tuple) else shown(logprobs)
        raise BatchError(f"{where}: {count} log-probs for {len(ids)} tokens, expected one for each")
    if not all(isinstance(v, int | float) and -1e3 < v <= 1e-3 for v in logprobs):
        odd = next(v for v in logprobs if not (isinstance(v, int | float) and -1e3 < v <= 1e-3))
        raise BatchError(f"{where}: a log-prob of {shown(odd)}, expected a finite number of at most 0")
    stops = set(request.ends)
    count = next((k + 1 for k, token in enumerate(ids) if token in stops), len(ids))
    if count > request.max_tokens:
        raise BatchError(f"{where}: {count} tokens, and {request.max_tokens} were asked for at most")
    if ids[count - 1] not in stops and count < request.max_tokens:
        raise BatchError(
            f"{where}: ends after {count} of {request.max_tokens} tokens with token {ids[count - 1]}, which "
            f"ends no response of this policy (its end tokens: {sorted(stops)}): the engine was cut short "
            "(is its longest sequence too short?), stops at other tokens, or leaves the end token out"
        )
    return Response(tuple(ids[:count]), np.array(logprobs[:count], dtype=np.float64))
