"""A curriculum: prompts are drawn by their running pass rate, and the rates travel with the checkpoints."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from stepscope.config import CurriculumConfig
from stepscope.errors import CheckpointError
from stepscope.results import FloatArray, IntArray

CURRICULUM_FILE = "curriculum.json"
"""Name of the file with the pass rates inside a checkpoint folder."""

BUCKETS = ("hard", "medium", "easy")


class Curriculum:
    """Running pass rates of prompts, and draws by them.

    A group with pass rate q moves its prompt's rate p to decay p + (1 - decay) q; a prompt's first group sets
    it. A prompt in bucket b has probability weight_b/(sum of the weights of the buckets that hold prompts)
    over the number of prompts in b.

    Args:
        config: bounds, weights, decay.
        prompt_ids: the prompts, in the order in which they are numbered here.
    """

    def __init__(self, config: CurriculumConfig, prompt_ids: Sequence[str]) -> None:
        self.config = config
        self.prompt_ids = tuple(prompt_ids)
        self.rates: FloatArray = np.full(len(self.prompt_ids), np.nan)

    def buckets(self) -> IntArray:
        """(prompt,) 0 hard, 1 medium, 2 easy."""
        known = np.where(np.isnan(self.rates), self.config.unseen, self.rates)
        found: IntArray = (known >= self.config.hard_below).astype(np.int64) + (
            known > self.config.easy_above
        )
        return found

    def probabilities(self, exclude: Collection[int] = ()) -> FloatArray:
        """(prompt,) probability of each prompt in a single draw; 0 for the excluded ones."""
        allowed = np.ones(len(self.rates), dtype=np.bool_)
        allowed[list(exclude)] = False
        buckets = self.buckets()
        sizes = np.bincount(buckets[allowed], minlength=len(BUCKETS))
        weights = np.array([self.config.hard, self.config.medium, self.config.easy])
        each = np.divide(weights, sizes, out=np.zeros(len(BUCKETS)), where=sizes > 0)
        found: FloatArray = np.where(allowed, each[buckets], 0.0)
        total = found.sum()
        return found / total if total > 0 else found

    def draw(self, count: int, random: np.random.Generator, exclude: Collection[int] = ()) -> IntArray:
        """At most ``count`` different prompts, by number; fewer only where no more are left."""
        chances = self.probabilities(exclude)
        size = min(count, int(np.count_nonzero(chances)))
        found: IntArray = random.choice(len(chances), size=size, replace=False, p=chances if size else None)
        return found

    def observe(self, results: Iterable[tuple[int, bool]]) -> None:
        """Take in groups of responses: (prompt number, whether this response was correct)."""
        groups: dict[int, list[bool]] = {}
        for prompt, correct in results:
            groups.setdefault(prompt, []).append(correct)
        for prompt, group in groups.items():
            rate, old = float(np.mean(group)), self.rates[prompt]
            decay = self.config.decay
            self.rates[prompt] = rate if np.isnan(old) else decay * old + (1 - decay) * rate

    def save(self, folder: Path) -> None:
        """Write the rates of the prompts asked so far into a checkpoint folder."""
        seen = np.flatnonzero(~np.isnan(self.rates))
        rates = {self.prompt_ids[i]: float(self.rates[i]) for i in seen}
        (folder / CURRICULUM_FILE).write_text(json.dumps(rates, indent=0) + "\n", encoding="utf-8")

    def restore(self, folder: Path) -> None:
        """Take over the rates of a checkpoint.

        Raises:
            CheckpointError: it has none, or they are of prompts that are not there.
        """
        file = folder / CURRICULUM_FILE
        try:
            rates = json.loads(file.read_text(encoding="utf-8"))
            numbers = {prompt_id: i for i, prompt_id in enumerate(self.prompt_ids)}
            found = {numbers[prompt_id]: float(rate) for prompt_id, rate in rates.items()}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file}: the curriculum's pass rates cannot be read ({error}); copy the file again, or "
                "train without rl.curriculum"
            ) from error
        except KeyError as error:
            raise CheckpointError(
                f"{file}: it has a pass rate of {error}, a prompt that the task does not ask; resume with "
                "the task of the run"
            ) from error
        self.rates[:] = np.nan
        for prompt, rate in found.items():
            self.rates[prompt] = rate
