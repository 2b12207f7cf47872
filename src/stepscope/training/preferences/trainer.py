"""TRL's DPO trainer with the reverse KL divergence on samples of the policy, and its checkpoints."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import Sampler
from trl import DPOTrainer

from stepscope.config import HypoConfig
from stepscope.measure.step.divergence import loss_reference, token_divergences
from stepscope.policy.forward import Reading, forward, make_batch
from stepscope.policy.loss.hypo import score_factors
from stepscope.policy.loss.settings import NEXT_BATCH, StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.reference import reference_logprobs
from stepscope.policy.rollouts import sample_responses
from stepscope.policy.state import Policy
from stepscope.results import FloatArray, Rollouts
from stepscope.training.preferences.pairs import Pair
from stepscope.training.rl import publish
from stepscope.training.setup.start import writing

Asked = tuple[str, tuple[int, ...]]
"""A question and the token ids of its prompt."""


class RowsOfSteps(Sampler[int]):
    """The rows of all steps of a training, in order: the same whether or not it was interrupted.

    Every row once, in random order, then every row again in another.

    Args:
        rows: of the data set.
        per_step: rows of a step, at most as many as there are.
        steps: of the training.
        seed: of the orders.
    """

    def __init__(self, rows: int, per_step: int, steps: int, seed: int) -> None:
        self.rows, self.per_step, self.steps, self.seed = rows, per_step, steps, seed

    def of(self, step: int) -> list[int]:
        """Those of one step, counted from 0."""
        places = range(step * self.per_step, (step + 1) * self.per_step)
        orders = {e: self._order(e) for e in {place // self.rows for place in places}}
        return [orders[place // self.rows][place % self.rows] for place in places]

    def _order(self, epoch: int) -> list[int]:
        return [int(i) for i in np.random.default_rng([self.seed, 6, epoch]).permutation(self.rows)]

    def __iter__(self) -> Iterator[int]:
        """Over the rows of all steps."""
        return (row for step in range(self.steps) for row in self.of(step))

    def __len__(self) -> int:
        """Rows of all steps together."""
        return self.steps * self.per_step


@dataclass(frozen=True)
class Drawn:
    """Responses that the policy gave to the prompts of a step.

    Attributes:
        step: optimizer steps taken before.
        asked: question and token ids of every prompt.
        rollouts: prompt by prompt.
        group: (seq,) number of the prompt.
        factors: per sequence (tok,) what the score of each token is multiplied by.
        divergence: (seq,) sum of d, or of D, over the response.
    """

    step: int
    asked: list[Asked]
    rollouts: Rollouts
    group: Tensor
    factors: tuple[FloatArray, ...]
    divergence: FloatArray


class PreferenceTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPO trainer; with ``kl_weight`` above 0 the loss also has HyPO's KL divergence.

    Before every optimizer step the policy answers the prompts of the step's pairs (or as many of the task),
    ``kl_group_size`` times each, at random numbers of the run's seed and the step, so that no global random
    state is touched and a checkpoint can say what the next step will draw. The batch of the next step lies in
    every checkpoint (``next_batch.jsonl``): pairs with rewards 1 and 0, samples with 0.

    Loss and gradient of the divergence: :mod:`stepscope.policy.loss.hypo`. Logged beside TRL's figures:
    ``kl``, the mean of sum_k d_k (or D_k) over the step's samples, in nats, its ``kl_entropy`` per token and
    ``kl_length``.

    Args:
        settings: written beside every checkpoint as ``stepscope.json``.
        section: of the configuration.
        pairs: the rows of the data set.
        prompts: question and token ids of the prompts that are sampled; None for those of the step's pairs.
        kwargs: arguments of ``DPOTrainer`` but the data set.
    """

    def __init__(
        self,
        *,
        settings: StepSettings,
        section: HypoConfig,
        pairs: Sequence[Pair],
        prompts: Sequence[Asked] | None = None,
        **kwargs: Any,
    ) -> None:
        names = ("prompt", "chosen", "rejected")
        columns = {f"{name}_ids": [list(getattr(p, name)) for p in pairs] for name in names}
        super().__init__(train_dataset=Dataset.from_dict(columns), **kwargs)
        self.settings = settings
        self.section = section
        self.pairs = pairs
        self.prompts = prompts
        self.order = RowsOfSteps(len(pairs), section.pairs_per_step, section.steps, self.args.seed)
        self._drawn: Drawn | None = None
        self._place = 0

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """The rows have token ids already."""
        return dataset

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        """All steps as one pass."""
        return self.order

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """No model card: a run folder is described by its own files."""

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's, and this micro-batch's share of the divergence."""
        loss = super()._compute_loss(model, inputs, return_outputs)
        if self.section.kl_weight == 0.0 or not self.model.training:
            return loss
        parts = self.section.pairs_per_step // self.section.micro_batch_size
        drawn = self.samples(self.state.global_step)
        if self._place == 0:
            self._log_samples(drawn)
        size = len(drawn.rollouts) // parts
        rows = range(self._place * size, (self._place + 1) * size)
        self._place = (self._place + 1) % parts
        return loss + parts * self.section.kl_weight * self._divergence(model, drawn, rows)

    def _divergence(self, model: Any, drawn: Drawn, rows: range) -> Tensor:
        """Some samples' part of the mean over all of them; its gradient is the estimate."""
        batch = make_batch(
            [drawn.rollouts.prompt_token_ids[i] for i in rows],
            [drawn.rollouts.response_token_ids[i] for i in rows],
            device=self.accelerator.device,
            seq_index=list(rows),
        )
        exact = self.section.kl_estimator == "rao_blackwell"
        readings: dict[Hashable, Reading] = {}
        if exact:
            readings["kl"] = loss_reference(self._policy(), self._reference_policy()).divergence(batch)
        outputs = forward(model, batch, temperature=1.0, readings=readings)
        value = outputs.logprobs.new_tensor(drawn.divergence[list(rows)].sum())
        pull = (batch.pad(drawn.factors, outputs.logprobs) * outputs.logprobs).sum()
        if exact:
            pull = pull + outputs.read["kl"].sum()
        return (value + pull - pull.detach()) / len(drawn.rollouts)

    def samples(self, step: int) -> Drawn:
        """The policy's responses for a step, as it is now; drawn once, and again the same when asked anew."""
        if self._drawn is None or self._drawn.step != step:
            training = self.model.training
            self.model.eval()
            try:
                self._drawn = self._draw(step)
            finally:
                self.model.train(training)
        return self._drawn

    def _draw(self, step: int) -> Drawn:
        size, seeds = self.section.kl_group_size, [self.args.seed, 7, step]
        if self.prompts is None:
            asked = [
                (pair.question, pair.prompt) for pair in map(self.pairs.__getitem__, self.order.of(step))
            ]
        else:
            random = np.random.default_rng([*seeds, 1])
            chosen = random.choice(len(self.prompts), size=self.section.pairs_per_step, replace=False)
            asked = [self.prompts[int(i)] for i in chosen]
        policy = self._policy()
        rollouts = sample_responses(
            policy,
            [ids for _, ids in asked for _ in range(size)],
            seed=int(np.random.SeedSequence(seeds).generate_state(1)[0]),
        )
        exact = self.section.kl_estimator == "rao_blackwell"
        reference = self._reference_policy()
        if exact:
            values = token_divergences(policy, rollouts, reference, Budget())
        else:
            at_reference = reference_logprobs(policy, rollouts, reference, Budget())
            values = tuple(now - ref for now, ref in zip(rollouts.logprobs, at_reference, strict=True))
        group = torch.arange(len(rollouts)) // size
        padded = torch.zeros(len(rollouts), int(rollouts.num_tokens.max()), dtype=torch.float64)
        for own, row in zip(padded, values, strict=True):
            own[: len(row)] = torch.from_numpy(row)
        factors = score_factors(padded, group, own=not exact).numpy()
        return Drawn(
            step=step,
            asked=asked,
            rollouts=rollouts,
            group=group,
            factors=tuple(row[:n] for row, n in zip(factors, rollouts.num_tokens, strict=True)),
            divergence=padded.sum(1).numpy(),
        )

    def _policy(self) -> Policy:
        """The policy in training."""
        model = self.accelerator.unwrap_model(self.model)
        return Policy(model, self.processing_class, self.settings, step=self.state.global_step)

    def _reference_policy(self) -> Policy | None:
        """What it started from; None for an adapter, which is that when it is switched off."""
        return None if self.ref_model is None else Policy(self.ref_model, None, self.settings)

    def _log_samples(self, drawn: Drawn) -> None:
        metrics = self._metrics["train"]
        tokens = drawn.rollouts.num_tokens
        metrics["kl"].append(float(drawn.divergence.mean()))
        metrics["kl_entropy"].append(float(drawn.rollouts.entropy_per_seq.sum() / tokens.sum()))
        metrics["kl_length"].append(float(tokens.mean()))

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Write the Trainer's checkpoint and what we add to it, then give it its name ``step-N``."""
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with writing(folder):
            super()._save_checkpoint(model, trial)
            self.write_next_batch(folder)
            publish(folder, self.settings)

    def write_next_batch(self, folder: Path) -> None:
        """Leave the batch of the step that comes next, a response a line, as ``measure`` reads batches."""
        step = self.state.global_step
        lines = []
        for number, pair in enumerate(map(self.pairs.__getitem__, self.order.of(step))):
            asked = (pair.question, pair.prompt)
            lines.append(_line(step + 1, f"pair/{number}", asked, pair.chosen, 1.0))
            lines.append(_line(step + 1, f"pair/{number}", asked, pair.rejected, 0.0))
        if self.section.kl_weight > 0:
            drawn = self.samples(step)
            for number, ids in zip(drawn.group.tolist(), drawn.rollouts.response_token_ids, strict=True):
                lines.append(_line(step + 1, f"sample/{number}", drawn.asked[number], ids, 0.0))
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / NEXT_BATCH).write_text(text, encoding="utf-8")


def _line(step: int, group: str, asked: Asked, response: Sequence[int], reward: float) -> dict[str, Any]:
    return {
        "step": step,
        "prompt_id": group,
        "prompt": asked[0],
        "prompt_token_ids": list(asked[1]),
        "response_token_ids": list(response),
        "reward": reward,
    }
