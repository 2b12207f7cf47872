"""What the places of one account share: record, policy, task and probe, each made when it is first needed."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import nn

from stepscope.config import LedgerConfig
from stepscope.config.ledger import FIXED
from stepscope.errors import CheckpointError
from stepscope.measure.influence.probe_gradient import fitting_groups, prompt_groups
from stepscope.measure.ledger.account import ALL, HALF, halved, padded
from stepscope.measure.ledger.path import knot_weights, knots
from stepscope.measure.ledger.recorded import RecordedPath
from stepscope.measure.ledger.slopes import Looked
from stepscope.measure.quantity.base import make_quantity
from stepscope.pipeline.inputs.policies import checkpoints_in, open_policy
from stepscope.pipeline.inputs.tasks import task_to_measure
from stepscope.policy.checkpoint.models import usable_device
from stepscope.policy.passes import Budget
from stepscope.policy.recorded import RecordedTraining
from stepscope.policy.rollouts import SamplingOptions, sample_rollouts, score_rollouts
from stepscope.policy.sampling.drawn_by import DRIFT_LIMIT
from stepscope.policy.state import Policy
from stepscope.policy.vectors import placed
from stepscope.results import FloatArray, IntArray, Rollouts
from stepscope.runs import sha256
from stepscope.tasks import TemplatedTask

MAX_GROUPS = 64
"""Most groups of probe prompts that are kept apart for errors."""


@dataclass
class Accounting:
    """One account at work.

    Attributes:
        config: what was asked for.
    """

    config: LedgerConfig

    @cached_property
    def training(self) -> RecordedTraining:
        """The record."""
        return RecordedTraining.load(self.config.run, device=usable_device(self.config.device))

    @cached_property
    def path(self) -> RecordedPath:
        """The steps in the account."""
        steps, config = self.training.steps, self.config
        start = steps[0] - 1 if config.start is None else config.start
        stop = steps[-1] if config.stop is None else config.stop
        return RecordedPath(self.training, start, stop, self.config.memory_bytes // 4)

    @cached_property
    def digest(self) -> str:
        """Of the figures of the recorded steps, and of the state before them."""
        folder = self.training.folder
        start = folder.state(self.training.steps[0] - 1)
        assert start is not None
        digest = hashlib.sha256(sha256(start).encode())
        for index in range(self.path.start + 1, self.path.stop + 1):
            digest.update(folder.figures(index).to_json().encode())
        return digest.hexdigest()

    @cached_property
    def policy(self) -> Policy:
        """The model of the training, with the recorded parameters trainable, sampling as it did.

        Raises:
            CheckpointError: it is not the model of the record.
        """
        chosen = self.config.checkpoint
        try:
            checkpoint = Path(chosen) if chosen else checkpoints_in(Path(self.config.run))[0]
        except CheckpointError as error:
            raise CheckpointError(
                f"{self.config.run}: has a record, and no checkpoint beside it from which model and "
                "tokenizer can be taken; name one of this training with checkpoint=FOLDER"
            ) from error
        policy = open_policy(
            checkpoint,
            precision=self.config.precision,
            device=self.config.device,
            loss=self.config.loss,
            require_optimizer=False,
        )
        known = dict(policy.model.named_parameters())
        recorded = self.path.parameters(0)
        for name, tensor in recorded.items():
            if name not in known or known[name].shape != tensor.shape:
                raise CheckpointError(
                    f"{checkpoint}: {name} of the record is "
                    f"{'of another shape there' if name in known else 'not in this model'}; name a "
                    "checkpoint of the recorded training with checkpoint=FOLDER"
                )
        for name, parameter in known.items():
            parameter.requires_grad_(name in recorded)
        record = self.training.folder.record
        settings = replace(
            policy.settings,
            temperature=record.temperature,
            max_response_tokens=record.max_response_tokens,
        )
        return replace(policy, settings=settings)

    def hold_model(self) -> None:
        """Hold the policy against the last batch: of an adapter the record has not the model beneath it.

        Raises:
            CheckpointError: it does not give the log-probs that were recorded.
        """
        place = len(self.path) - 1
        step = self.path.step(place)
        with placed(self.policy.parameters, self.path.parameters(place)):
            now, _ = score_rollouts(self.policy, step.update, budget=self.budget)
        apart = np.concatenate(
            [(a - b)[m] for a, b, m in zip(now, step.update.logprobs, step.update.written, strict=True)]
        )
        gap = float(np.abs(apart).mean())
        if not gap <= DRIFT_LIMIT:
            raise CheckpointError(
                f"{self.policy.path}: with the recorded parameters the log-probs of the batch of step "
                f"{step.number} are {gap:.2g} nats (mean) from those recorded, expected at most "
                f"{DRIFT_LIMIT}: another model was trained; name a checkpoint of the recorded training with "
                "checkpoint=FOLDER"
            )

    @cached_property
    def task(self) -> TemplatedTask:
        """The task that the probe's prompts come from."""
        return task_to_measure(self.config.task, self.policy, own=self.config)

    @property
    def budget(self) -> Budget:
        """What the computations may use: a quarter of the memory each for gradients and states."""
        return Budget(
            max_sequences=self.config.batch_size, memory_bytes=self.config.memory_bytes // 4, progress=True
        )

    @cached_property
    def places(self) -> tuple[int, ...]:
        """Where the gradient is taken."""
        return knots(len(self.path), self.config.every)

    def number(self, index: int) -> int:
        """Number of the training's step that a place is after."""
        return self.path.start + self.places[index]

    @cached_property
    def weights(self) -> Mapping[str, FloatArray]:
        """(place, step) weights of the gradients, with all places and with every second one left out."""
        count, fewer = len(self.path), halved(self.places)
        return {
            ALL: knot_weights(count, self.places),
            HALF: padded(knot_weights(count, fewer), fewer, self.places),
        }

    @cached_property
    def asked(self) -> frozenset[str]:
        """What the prompts of the training's batches in the account go by."""
        return frozenset().union(*(self.path.step(place).update.asked for place in range(len(self.path))))

    def sampled(self, place: int, *, end: bool = False) -> Rollouts:
        """Responses to the probe's prompts at a place; of an end, ``end_samples`` to each.

        The prompts are the same at all places, and with ``draws: common`` the uniform numbers, too.
        """
        probe = self.config.probe
        with placed(self.policy.parameters, self.path.parameters(place)):
            return sample_rollouts(
                self.policy,
                self.task,
                num_prompts=probe.num_prompts,
                group_size=self.config.end_samples if end else probe.group_size,
                seed=probe.seed,
                split=probe.split,
                options=SamplingOptions(
                    exclude=self.asked,
                    draw=0 if end or self.config.draws == "common" else place,
                ),
                budget=self.budget,
            )

    @cached_property
    def at_start(self) -> Rollouts:
        """The probe batch at the start of the path."""
        return self.sampled(0)

    @cached_property
    def reference(self) -> nn.Module:
        """The model at the start of the path, to which ``kl`` is taken."""
        with placed(self.policy.parameters, self.path.parameters(0)):
            return deepcopy(self.policy.model).requires_grad_(False)

    def looked(self, probe: Rollouts) -> list[Looked]:
        """The quantities on a probe batch; those at fixed prefixes on that of the start."""
        found = []
        for label in self.config.quantities:
            name, fixed = label.removesuffix(FIXED), label.endswith(FIXED)
            batch = self.at_start if fixed else probe
            quantity = make_quantity(
                name,
                batch,
                policy=self.policy,
                reference=self.reference if name == "kl" else None,
                normalisation="per_seq" if name == "reward" else None,
                version="fixed_prefix" if fixed else None,
            )
            found.append(Looked(label=label, quantity=quantity, probe=batch))
        return found

    def groups(self, rollouts: Rollouts) -> IntArray:
        """(seq,) group of prompts of each sequence, the same for all batches on the probe's prompts."""
        most = min(MAX_GROUPS, fitting_groups(self.policy, self.budget))
        return prompt_groups(rollouts.prompt_index, most)
