"""What in the arguments of a TRL run no measurement can follow, and what a user should know of it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stepscope.policy.checkpoint.settings.trl_arguments import TrlArguments, said
from stepscope.policy.loss.registry import known_loss
from stepscope.policy.numerics.precision import HALF_TYPES

_CARD = re.compile(r"This model was trained with ([^\s,.]+)")
_TRL = "It has been trained using [TRL]"

TRAINERS = {"GRPOConfig": "GRPO", "RLOOConfig": "RLOO", "DPOConfig": "DPO", "CPOConfig": "CPO"}
"""Classes of arguments whose trainers are known, and what model cards call these."""


@dataclass(frozen=True)
class Obstacle:
    """Something of a run that changes its steps and that a measurement cannot follow.

    Attributes:
        name: TRL's argument, or ``trainer``; what ``loss.without`` takes.
        reason: what the run did, and why that is not measured.
    """

    name: str
    reason: str


def trainer_obstacles(args: TrlArguments, trainer: str, folder: Path) -> Iterator[Obstacle]:
    """Arguments of another trainer of TRL's, or a model card that names one.

    Args:
        args: of the run.
        trainer: what cards call the trainer that the arguments look like.
        folder: the checkpoint.
    """
    name = args.origin.rpartition(".")[2]
    if args.origin.startswith("trl.") and TRAINERS.get(name) != trainer:
        yield Obstacle(
            "trainer", f"its arguments are TRL's {name}, whose trainer has another loss than {trainer}'s"
        )
        return
    for card in (folder / "README.md", folder.parent / "README.md"):
        if not card.is_file():
            continue
        text = card.read_text(encoding="utf-8", errors="replace")[:20_000]
        found = _CARD.search(text) if _TRL in text else None
        if found is not None and found[1] != trainer:
            yield Obstacle(
                "trainer", f"{card.name} says that it was trained with {found[1][:40]}, not {trainer}"
            )
            return


def common_obstacles(args: TrlArguments) -> Iterator[Obstacle]:
    """What all of the trainers can do."""
    if args("neftune_noise_alpha", 0.0):
        yield Obstacle("neftune_noise_alpha", "training added noise to the embeddings")
    if args.number("beta", 0.0) != 0.0 and args("sync_ref_model", False):
        yield Obstacle("sync_ref_model", "the reference policy moved with the run and is not kept")


def online_obstacles(args: TrlArguments, metrics: frozenset[str]) -> Iterator[Obstacle]:
    """Ways to sample that make other batches than the policy itself, and tokens that it did not write.

    Args:
        args: of the run.
        metrics: what the run logged; it tells of tools and environments, which the trainer is given.
    """
    plain: dict[str, Any] = {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "generation_kwargs": {}}
    for name, neutral in plain.items():
        value = args(name, neutral)
        if value != neutral:
            yield Obstacle(
                name, f"responses were sampled with {said(value)}, not from the policy itself as here"
            )
    unknown = "cannot be told from the policy's own in a batch sampled here"
    if args.values.get("max_tool_calling_iterations") is not None:
        yield Obstacle(
            "max_tool_calling_iterations",
            f"tokens that tools or an environment write are not in the loss, and they {unknown}",
        )
    if "tools/call_frequency" in metrics:
        yield Obstacle(
            "tools",
            "the run logged tool calls, and the tokens that tools or an environment write are not in the "
            f"loss and {unknown}",
        )


def grpo_obstacles(
    args: TrlArguments, controller: Mapping[str, float] | None, rewards: int
) -> Iterator[Obstacle]:
    """What GRPOTrainer's loss can have.

    Args:
        args: of the run.
        controller: state of an entropy bonus that adapts, where the checkpoint has one.
        rewards: reward functions that the run logged.
    """
    loss = args("loss_type", "")
    kept, bonus = args.number("top_entropy_quantile", 1.0), args.number("entropy_coef", 0.0)
    adaptive = args("use_adaptive_entropy", False)
    if not known_loss(loss):
        yield Obstacle("loss_type", f"the loss {said(loss)} is not known here")
    each = args("multi_objective_aggregation", "sum_then_normalize") != "sum_then_normalize"
    if loss in ("dapo", "cispo", "vespo"):
        yield from _generations(args, f"{loss} averages over the tokens of each")
    elif each or args("scale_rewards", "group") == "batch":
        yield from _generations(args, "its advantages are scaled over each")
    if kept < 1.0 and (bonus != 0.0 or adaptive):
        yield Obstacle("entropy_coef", "the entropy bonus is a mean over the tokens of highest entropy")
    elif adaptive and controller is None:
        yield Obstacle(
            "use_adaptive_entropy",
            "the weight of the entropy bonus moves during the run, and entropy_ctrl_state.json is not there",
        )
    if each and rewards != 1:
        logged = f"{rewards} of them" if rewards else "none"
        yield Obstacle(
            "multi_objective_aggregation",
            f"advantages come from each reward on its own, and the run logged {logged}",
        )


def _generations(args: TrlArguments, why: str) -> Iterator[Obstacle]:
    """A step on several generations, where something is an average over each."""
    generated, accumulated = args.count("steps_per_generation", args.accumulation), args.accumulation
    if generated < accumulated:
        number = f"{accumulated / generated:g}"
        yield Obstacle("steps_per_generation", f"a step has responses of {number} generations, and {why}")


def rloo_obstacles(args: TrlArguments) -> Iterator[Obstacle]:
    """What RLOOTrainer makes of rewards before they are compared."""
    if args("normalize_advantages", False):
        yield from _generations(args, "its advantages are scaled over each")
    if args.values.get("reward_clip_range") is not None:
        yield Obstacle("reward_clip_range", "the run clipped its rewards")


def preference_obstacles(args: TrlArguments, kinds: tuple[str, ...]) -> Iterator[Obstacle]:
    """What trainers on pairs can have.

    Args:
        args: of the run.
        kinds: names of its losses.
    """
    if args("use_weighting", False):
        yield Obstacle("use_weighting", "pairs were weighted by probabilities over the vocabulary (WPO)")
    over = [kind for kind in kinds if kind in ("aot", "aot_unpaired", "sft", "cpo")]
    if args.cuts and over:
        yield Obstacle("loss_type", f"{over[0]} is over a piece of a batch, and {args.cuts} cut it")


def notes(args: TrlArguments, trainer: str) -> Iterator[str]:
    """What a user should know of a run and that stands against nothing."""
    if not args.origin.startswith("trl."):
        yield (
            f"the arguments are of a class of the run's own, {said(args.origin)}; if its trainer "
            f"changes the loss, the step measured is {trainer}'s all the same"
        )
    updates = args.count("num_iterations", 1) * args.count("steps_per_generation", args.accumulation)
    if updates > args.accumulation:
        yield (
            f"each batch made {updates / args.accumulation:g} steps; on a batch sampled here the step is the "
            "first, on policy, and averaged over its own tokens"
        )
    if args("use_vllm", False):
        yield (
            "responses came from vLLM; its own log-probs, and the weights that correct for them, have a part "
            "in the step only where a batch brings them"
        )
    for name, dtype in (("bf16", "bfloat16"), ("fp16", "float16")):
        if args(name, False) is True:
            yield f"training computed in {dtype} (autocast); a step in float32 differs by about a percent"
    if (dtype := _loaded_type(args)) in HALF_TYPES:
        yield f"the model was loaded in {dtype} for training; a step in float32 differs by about a percent"


def _loaded_type(args: TrlArguments) -> str:
    """The type in which TRL was told to load the model (``model_init_kwargs``); empty where it was not."""
    told = args.values.get("model_init_kwargs")
    dtype = told.get("dtype", told.get("torch_dtype")) if isinstance(told, Mapping) else None
    return dtype.__name__ if isinstance(dtype, type) else str(dtype or "")
