"""Stage ``rollouts``: the update and the probe batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np

from stepscope.console import say
from stepscope.errors import BatchError, RewardError
from stepscope.measure.change.uncertainty import estimate_ratio
from stepscope.measure.mismatch import sampler_mismatch
from stepscope.pipeline.inputs.logged_entropy import KEY as LOGGED
from stepscope.pipeline.inputs.logged_entropy import entropy_against_log
from stepscope.pipeline.inputs.tasks import OWN
from stepscope.pipeline.inputs.update_files import is_own, update_from_file
from stepscope.pipeline.stages.plan import PROBE, UPDATE, Figures, stage
from stepscope.pipeline.stages.session import Session
from stepscope.policy.checkpoint.manifest import altered
from stepscope.policy.group import current
from stepscope.policy.loss.estimators import with_advantages
from stepscope.policy.loss.registry import loss_named
from stepscope.policy.loss.settings import NEXT_BATCH
from stepscope.policy.reference import reference_logprobs
from stepscope.policy.rollouts import SamplingOptions, response_text, sample_rollouts, score_rollouts
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.results.mismatch import SamplerReport
from stepscope.runs import PROVENANCE, write_json, write_record
from stepscope.stats import Estimate, clustered_mean
from stepscope.tasks import TemplatedTask
from stepscope.tasks.load import example_in

MISMATCH_FIGURES = {
    "difference": "difference",
    "difference_q99": "difference_q99",
    "k1_per_token": "kl_per_token",
    "k3_per_token": "kl_k3_per_token",
    "k1_per_seq": "kl_per_seq",
    "effective_per_seq": "effective_share",
    "mass_lost": "mass_lost",
    "positions_cut": "positions_cut",
    "bias_entropy_per_token": "bias_entropy_per_token",
    "bias_reward": "bias_reward",
}
"""Figures of sampler against policy that go into the summary, and what they are called there."""

LABELS = "the rewards of a loss of preferences say which response is chosen"
"""Why the mean reward of its update batch says nothing."""

SAME_POLICY = {"float64": 1e-2, "float32": 1e-2, "bfloat16": 0.5}
"""Largest difference of a stored and a recomputed log-prob, in nats, that precision alone may make."""


@stage(
    writes=(*UPDATE, *PROBE, "sampler.json"),
    config=("task", *OWN, "update", "probe", "sampler", "resample", "batch_size", "errors"),
)
def rollouts(session: Session) -> Figures:
    """Sample update and probe batch; nothing is written before both are known to be fit for use."""
    try:
        update, given = given_update(session)
        probe = sample_probe(session, update)
    finally:
        session.sampler.close()
    for name, batch in (("update", update), ("probe", probe)):
        batch.to_parquet(
            session.run.file(f"{name}.parquet"),
            session.run.file(f"{name}_tokens.parquet"),
            tokens=_token_texts(session, batch),
        )
    figures = batch_figures(update, probe, session.config.errors)
    if loss_named(session.policy.settings.loss_type).pairs:
        figures["mean_reward_update"] = figures["mean_reward_update"].doubted(LABELS)
    _against_log(session, figures["entropy_per_token"])
    return figures | _against_policy(session, figures, update=update, probe=probe) | given


def _against_policy(session: Session, figures: Figures, **batches: Rollouts) -> Figures:
    """What a sampler that is not the policy makes of the figures, and how far it is; leaves ``sampler.json``.

    Means over the update batch are flagged with its doubt, all others with that of the probe batch.
    """
    known = {name: sampler_mismatch(batch) for name, batch in batches.items()}
    found = {name: mismatch for name, mismatch in known.items() if mismatch is not None}
    settings = {key: str(value) for key, value in session.sampler.described().items()}
    if "update" in found and session.config.update.file is not None:
        settings = {**settings, "update": "from a file"} if "probe" in found else {}
    write_record(session.run.file("sampler.json"), SamplerReport(settings, found))
    more: Figures = {}
    for name, mismatch in found.items():
        of_update = name == "update"
        if mismatch.doubt:
            say(f"warning: {name} batch: {mismatch.doubt}")
            own = {k: v for k, v in figures.items() if (k == "mean_reward_update") == of_update}
            more |= {key: figure.doubted(mismatch.doubt) for key, figure in own.items()}
        prefix = "update_sampler" if of_update else "sampler"
        more |= {
            f"{prefix}_{key}": mismatch.figures[own]
            for own, key in MISMATCH_FIGURES.items()
            if own in mismatch.figures
        }
    return more


def _against_log(session: Session, entropy: Estimate) -> None:
    """Warn where the probe's entropy is far from what the training logged; both stand in the provenance."""
    own = session.sampler.decoding.is_policy(session.policy.settings.temperature)
    if not current().is_main or not own:
        return
    found = entropy_against_log(session.policy, entropy)
    provenance = {k: v for k, v in session.run.provenance().items() if k != LOGGED}
    write_json(session.run.path / PROVENANCE, provenance | ({} if found is None else {LOGGED: found}))
    if found is not None and found["doubt"]:
        say(f"warning: {found['doubt']}; `stepscope check` shows a prompt as it is asked")


def batch_figures(update: Rollouts, probe: Rollouts, errors: str) -> Figures:
    """Entropy, reward and length of the policy, from the probe batch; mean reward of the update batch."""
    prompts = probe.prompt_index
    how = "mean over probe responses, error clustered by prompt"
    return {
        "entropy_per_token": estimate_ratio(
            probe.entropy_per_seq,
            probe.num_policy_tokens,
            prompts,
            errors=errors,
            unit="nats/token",
            method="ratio of sums over probe responses",
        ),
        "entropy_per_seq": clustered_mean(probe.entropy_per_seq, prompts, unit="nats/sequence", method=how),
        "mean_reward": clustered_mean(probe.rewards, prompts, unit="reward", method=how),
        "mean_length": clustered_mean(probe.num_policy_tokens, prompts, unit="tokens", method=how),
        "truncated_rate": clustered_mean(probe.truncated, prompts, unit="share of responses", method=how),
        "mean_reward_update": clustered_mean(
            update.rewards,
            update.prompt_index,
            unit="reward",
            method="mean over update responses, error clustered by prompt",
        ),
    }


def given_update(session: Session) -> tuple[Rollouts, Figures]:
    """The batch that makes the step, and what is to be said of it where a training dumped it.

    What a file is of and how it was read stands in the provenance. A loss of preferences takes the batch that
    its training left beside the checkpoint, unless another is given.

    Raises:
        BatchError: no reward variance in any prompt group, so that there is no step.
    """
    wanted = session.config.update
    path = next_batch(session.policy) if wanted.file is None else Path(wanted.file)
    if path is None or is_own(path):
        return sample_update(session), {}
    found = update_from_file(session.policy, path, step=wanted.step, budget=session.budget)
    for note in found.notes:
        say(f"update batch: {note}")
    record = {"file": str(path), "notes": list(found.notes)}
    if current().is_main:
        write_json(session.run.path / PROVENANCE, session.run.provenance() | {"update": record})
    return _with_variance(found.rollouts, session.task), found.figures


def next_batch(policy: Policy) -> Path | None:
    """The file with the batch of the next step, where the loss is one of preferences; None for other losses.

    Raises:
        BatchError: there is none, or it is not what the training wrote.
    """
    settings, checkpoint = policy.settings, policy.path
    if checkpoint is None or not loss_named(settings.loss_type).pairs:
        return None
    path = checkpoint / NEXT_BATCH
    if not path.is_file():
        raise BatchError(
            f"update batch: the loss {settings.loss_type} takes pairs of responses, which are not "
            f"sampled, and "
            f"{checkpoint} has no {NEXT_BATCH}; give update.file, a table of the step's responses with "
            f"rewards 1 "
            "and 0 (docs/FORMATS.md, Batches)"
        )
    if problem := altered(checkpoint, NEXT_BATCH):
        raise BatchError(f"{checkpoint}: {problem}; copy the checkpoint again")
    return path


def sample_update(session: Session) -> Rollouts:
    """Sample the batch that makes the step, or take one that was sampled before.

    Raises:
        BatchError: no reward variance in any prompt group, so that there is no step.
    """
    update = _drawn(
        session, "update", SamplingOptions(resample=session.config.resample, sampler=session.sampler)
    )
    if update.advantages is None:
        policy, ref = session.policy, None
        if policy.settings.kl_in_reward != 0.0:
            ref = reference_logprobs(policy, update, session.reference, session.budget)
        update = with_advantages(update, policy.settings, ref)
    return _with_variance(update, session.task)


def _with_variance(update: Rollouts, task: TemplatedTask) -> Rollouts:
    """The batch itself, refused where it has no gradient."""
    given = (update.advantages,) if update.token_advantages is None else update.token_advantages
    if update.advantages is None or not any(np.any(row) for row in given):
        raise RewardError(
            f"update batch: the rewards of all {update.num_prompts} prompt groups have zero variance "
            f"(mean reward {update.rewards.mean():.3g}), so all advantages are zero and there is no "
            "gradient; use more prompts, larger groups, resample=10, or a task that is solved sometimes",
            example_in(task, update),
        )
    return update


def sample_probe(session: Session, update: Rollouts) -> Rollouts:
    """Sample the batch on which the change is measured, from other prompts than the update's.

    Raises:
        BatchError: the two batches share prompts.
    """
    probe = _drawn(session, "probe", SamplingOptions(exclude=update.asked, sampler=session.sampler))
    refuse_overlap(update, probe)
    return probe


def _drawn(session: Session, name: Literal["update", "probe"], options: SamplingOptions) -> Rollouts:
    """A batch as its section of the configuration asks for it: from a file, or sampled."""
    wanted = session.config.update if name == "update" else session.config.probe
    if wanted.file is not None:
        return _from_file(session, Path(wanted.file), f"{name}.file")
    return sample_rollouts(
        session.policy,
        session.task,
        num_prompts=wanted.num_prompts,
        group_size=wanted.group_size,
        seed=wanted.seed,
        split=wanted.split,
        options=options,
        budget=session.budget,
    )


def _from_file(session: Session, path: Path, key: str) -> Rollouts:
    """A stored batch, with log-probs and entropies of this policy; refused if another one sampled it."""
    rollouts = session.batch(path)
    if rollouts.temperature != session.policy.settings.temperature:
        raise BatchError(
            f"{key}: {path} was sampled at temperature {rollouts.temperature}, the checkpoint's is "
            f"{session.policy.settings.temperature}; sample it again from this checkpoint"
        )
    logprobs, entropies = score_rollouts(session.policy, rollouts, budget=session.budget)
    worst = float(np.abs(np.concatenate(logprobs) - np.concatenate(rollouts.logprobs)).max())
    if not worst < SAME_POLICY[session.config.precision]:
        raise BatchError(
            f"{key}: {path} was sampled from another policy (log-probs differ by up to {worst:.2g} "
            "nats); sample it again from this checkpoint"
        )
    return replace(rollouts, logprobs=logprobs, entropies=entropies)


def refuse_overlap(update: Rollouts, probe: Rollouts) -> None:
    """Raise if a prompt is in both batches: noise that they share would bias the product of two estimates.

    Raises:
        BatchError: naming shared prompts.
    """
    shared = update.asked & probe.asked
    if shared:
        raise BatchError(
            f"update and probe batch share prompts ({min(shared)[:60]!r} among them); the change "
            "must be measured on other samples than those that make the step: use another split, seed or file"
        )


def _token_texts(session: Session, rollouts: Rollouts) -> list[list[str]]:
    """Text of every response token; those of a response join up to it."""
    read = response_text(session.policy)
    return [read.by_token(row) for row in rollouts.response_token_ids]
