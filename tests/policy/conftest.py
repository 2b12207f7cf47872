"""A tokenizer of single characters, every architecture, and a tiny task that needs no file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

import cases
from stepscope.tasks.problem import Problem, Score


@dataclass(frozen=True)
class LetterTask:
    """Reward is the share of digits in the response, so that a random policy has reward variance."""

    size: int = 32
    spec: str = "letters"

    def formatted(self, response: str) -> bool:
        return bool(response)

    def problems(self, split: str) -> Sequence[Problem]:
        return [Problem(f"letters/{split}/{i}", f"{i}+{i % 7}=", str(i + i % 7)) for i in range(self.size)]

    def prompt(self, problem: Problem, tokenizer: Any) -> str:
        return problem.question

    def score(self, problem: Problem, response: str) -> Score:
        digits = sum(c.isdigit() for c in response)
        return Score(round(digits / max(len(response), 1), 3), problem.answer in response, bool(response))

    def demonstration(self, problem: Problem) -> str:
        return problem.answer


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return cases.tokenizer()


@pytest.fixture(params=cases.ARCHITECTURES)
def architecture(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def letters() -> LetterTask:
    return LetterTask()
