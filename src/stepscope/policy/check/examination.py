"""Examining a loaded policy: is what it computes fit to be measured?"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from stepscope.errors import ConfigError, MeasurementError, TaskError
from stepscope.policy.check.derivatives import derivative_errors, random_direction
from stepscope.policy.check.findings import Finding
from stepscope.policy.checkpoint.adapters import base_is_rewritten
from stepscope.policy.checkpoint.first_pass import made_up_sequences
from stepscope.policy.checkpoint.foreign import reads_foreign
from stepscope.policy.checkpoint.models import brief, type_in_files
from stepscope.policy.checkpoint.settings.trl_run import run_notes
from stepscope.policy.forward import (
    base_model,
    forward,
    forward_inputs,
    make_batch,
    plain_experts,
)
from stepscope.policy.loss.router import router_coefficient
from stepscope.policy.loss.settings import SETTINGS_FILE, UNKNOWN
from stepscope.policy.loss.surrogate import understood
from stepscope.policy.numerics.differentiation import lacks_a_rule
from stepscope.policy.numerics.precision import HALF_TYPES, matching_precision
from stepscope.policy.optim.storage import stored_tensors
from stepscope.policy.rollouts import end_tokens
from stepscope.policy.sharding import resharded
from stepscope.policy.state import Policy
from stepscope.tasks.formats.prompts import encode_prompt, tokens_after
from stepscope.tasks.formats.templates import FIELD, load_template
from stepscope.tasks.load import default_template

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-3, torch.bfloat16: 0.5}
"""Largest difference of log-probs, in nats, that round-off may make between two ways to batch."""


@reads_foreign
def examine(policy: Policy) -> list[Finding]:
    """Findings about optimizer state, settings, dropout, types, tied weights, and the forward pass itself."""
    return [
        *_settings(policy),
        *_optimizer(policy),
        *_sampling(policy),
        *_asking(policy),
        _dropout(policy),
        _types(policy),
        _stored(policy),
        *_base(policy),
        _tied(policy.model),
        *_mixture(policy),
        *_pictures(policy),
        *_reference(policy),
        *_forward(policy),
        *_positions(policy),
        *_derivatives(policy),
    ]


def _settings(policy: Policy) -> list[Finding]:
    """What is measured as the run's loss, and what of the run is not."""
    settings = policy.settings
    if settings is UNKNOWN:
        return []
    said = {
        "T": settings.temperature,
        "L": settings.max_response_tokens,
        "advantages scaled by": settings.scale_rewards,
        "beta": settings.beta,
        "max_grad_norm": settings.max_grad_norm,
        "mask_truncated": settings.mask_truncated,
    }
    rarer = {
        "averaged by": settings.aggregation,
        "advantages by": settings.advantage_estimator,
        "kl_penalty": settings.kl_penalty,
        "kl_in_reward": settings.kl_in_reward,
        **settings.advantage_parameters,
        **settings.loss_parameters,
    }
    said |= {name: value for name, value in rarer.items() if value}
    loss = settings.loss_type + (f" with {settings.objective.name}" if settings.objective else "")
    found = [Finding("ok", f"loss {loss}, " + ", ".join(f"{k} {v}" for k, v in said.items()))]
    try:
        understood(settings)
    except ConfigError as error:
        found = [Finding.from_error(error)]
    if settings.without:
        left_out = f"the step is measured without the run's {', '.join(settings.without)}"
        found.append(Finding("warn", left_out, "say so beside every figure"))
    if policy.path is not None and not (policy.path / SETTINGS_FILE).is_file():
        found += [Finding("warn", note, "keep it in mind") for note in run_notes(policy.path)]
    return found


def _optimizer(policy: Policy) -> list[Finding]:
    state = policy.optimizer
    if state is None:
        return []
    count = sum(p.numel() for p in policy.parameters.values())
    lrs = sorted({g.lr for g in state.groups if g.names})
    found = [
        Finding(
            "ok",
            f"{state.label} state of {len(state.names)} tensors ({count} parameters) in "
            f"{sum(bool(g.names) for g in state.groups)} groups matched by name, next lr "
            f"{', '.join(map(str, lrs))}",
        )
    ]
    if late := [g for g in state.groups if g.names and g.saved_lr is not None]:
        pairs = ", ".join(dict.fromkeys(f"{g.lr:g} instead of {g.saved_lr:g}" for g in late))
        found.append(
            Finding(
                "warn",
                f"the optimizer was saved before its scheduler's step: the next step is taken at the "
                f"scheduler's learning rate, {pairs}",
                "call scheduler.step() before saving; a training that is resumed from this checkpoint takes "
                "its first step at the old rate",
            )
        )
    if lrs == [0.0]:
        found.append(
            Finding(
                "warn",
                "the learning rate of the next step is 0, the end of the schedule",
                "give learning rates yourself (lrs), or measure an earlier checkpoint",
            )
        )
    if lost := stored_tensors(state):
        each = ", ".join(
            f"{key} {part.typical:.2g} of its norm (at most {part.worst:.2g}; {part.zeros:.1%} kept as 0)"
            for key, part in lost.items()
        )
        found.append(
            Finding(
                "ok",
                "moments are kept in 8 bits: the step is the one that the training takes from them on a "
                f"GPU; the last encoding lost {each}",
            )
        )
    if state.blank:
        found.append(
            Finding(
                "warn",
                f"{len(state.blank)} trained parameters have no optimizer state, {state.blank[0]} among "
                "them: they got no gradient so far, and the step leaves them where they are",
                "make sure that the run freezes or does not use them; if not, copy the checkpoint again",
            )
        )
    taken = Counter(state.steps.values())
    if taken and set(taken) != {policy.step}:
        found.append(
            Finding(
                "warn",
                f"the optimizer has taken {sorted(taken)} steps and trainer_state.json says {policy.step}",
                "make sure that the optimizer's state is of this checkpoint; skipped steps explain a small "
                "difference",
            )
        )
    return found


def _sampling(policy: Policy) -> list[Finding]:
    found = []
    if policy.settings.top_p != 1.0:
        found.append(
            Finding(
                "warn",
                f"the run sampled with top_p = {policy.settings.top_p}; measurements sample from the "
                "policy itself",
                "measure with sampler.top_p to see what that cuts away, or train with top_p = 1",
            )
        )
    if (ended := ended_prompts(policy)) is not None:
        found.append(ended)
    if not end_tokens(policy):
        found.append(
            Finding(
                "warn",
                "neither tokenizer nor generation config has an end-of-sequence token: all responses "
                "are truncated",
                "set eos_token in the tokenizer's config",
            )
        )
    return found


def _asking(policy: Policy) -> list[Finding]:
    """How problems are asked, or why they cannot be."""
    settings, tokenizer = policy.settings, policy.tokenizer
    if tokenizer is None:
        return []
    try:
        template = load_template(
            settings.prompt_template or default_template(settings.task, settings.answer_format),
            system_prompt=settings.system_prompt,
            prefill=settings.prefill,
            chat_template_kwargs=settings.chat_template_kwargs,
        )
        template.opening(tokenizer)
        text = encode_prompt(template.ask(FIELD, tokenizer), tokenizer).text
    except TaskError as error:
        return [replace(Finding.from_error(error), level="warn")]
    shown = text if len(text) <= 120 else f"{text[:60]} ... {text[-50:]}"
    known = settings.prompt_template or settings.task
    cure = "" if known else "give loss.prompt_template if the run asked otherwise"
    return [Finding("ok", f"problems of a task are asked as {shown!r}", cure)]


def ended_prompts(policy: Policy) -> Finding | None:
    """A warning where a foreign run's plain prompts were asked with an end-of-sequence token behind them."""
    foreign = policy.path is not None and not (policy.path / SETTINGS_FILE).is_file()
    if not foreign or policy.tokenizer is None or not tokens_after(policy.tokenizer):
        return None
    return Finding(
        "warn",
        "the tokenizer puts an end-of-sequence token after every text: TRL trains on plain prompts (not on "
        "messages) with that end, and measurements ask them without it",
        "train with add_eos_token set to false in tokenizer_config.json",
    )


def _dropout(policy: Policy) -> Finding:
    """Whether the model computes at random as it trains: two passes in training mode with different seeds."""
    if not _random_in_training(policy):
        return Finding("ok", "no dropout: two passes in training mode agree")
    model = policy.model
    modules = [] if policy.settings.disable_dropout else _dropout_modules(model)
    config = getattr(base_model(model), "config", None)
    rates = {k: v for k, v in vars(config).items() if "drop" in k and isinstance(v, float) and v > 0}
    named = [f"{len(modules)} modules, {modules[0][0]} among them"] if modules else []
    where = ", ".join([*named, *(f"{k} = {v}" for k, v in rates.items())])
    return Finding(
        "warn",
        f"the model computes at random while it trains (dropout{': ' + where if where else ''}), which the "
        "measurement leaves out",
        "train without dropout, so that a step is a function of its batch",
    )


def _dropout_modules(model: nn.Module) -> list[tuple[str, nn.Dropout]]:
    return [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Dropout) and m.p > 0]


def _random_in_training(policy: Policy) -> bool:
    """Modules that ``disable_dropout`` switched off are so here too; modes and random states come back."""
    model = policy.model
    modes = [(m, m.training) for m in model.modules()]
    off = [m for _, m in _dropout_modules(model)] if policy.settings.disable_dropout else []
    rates = [m.p for m in off]
    prompts, responses = made_up_sequences(policy)
    devices = [policy.device] if policy.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices):
            for switched in off:
                switched.p = 0.0
            model.train()
            passes = []
            for seed in (0, 1):
                torch.manual_seed(seed)
                passes.append(_logprobs(policy, prompts, responses))
    finally:
        for switched, rate in zip(off, rates, strict=True):
            switched.p = rate
        for module, mode in modes:
            module.training = mode
    return not all(torch.equal(a, b) for a, b in zip(*passes, strict=True))


class _TypeRecorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Collects the floating-point types of the results of all operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.types: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, Tensor) and value.is_floating_point():
                self.types.add(value.dtype)
        return result


def computed_types(policy: Policy) -> set[torch.dtype]:
    """Floating-point types of every intermediate result of one forward pass on made-up sequences."""
    prompts, responses = made_up_sequences(policy)
    recorder = _TypeRecorder()
    with recorder:
        _logprobs(policy, prompts, responses)
    return recorder.types


def _types(policy: Policy) -> Finding:
    computed = computed_types(policy)
    stages: dict[str, set[torch.dtype]] = {
        "weights": {p.dtype for p in policy.model.parameters() if p.is_floating_point()},
        "trainable": {p.dtype for p in policy.parameters.values()},
        "constants": {b.dtype for b in policy.model.buffers() if b.is_floating_point()},
    }
    if policy.optimizer is not None:
        stages["moments"] = {
            t.dtype for tensors in policy.optimizer.tensors().values() for t in tensors.values()
        }
    stages["computation"] = computed
    text = ", ".join(
        f"{name} {'/'.join(sorted(str(t).removeprefix('torch.') for t in types))}"
        for name, types in stages.items()
        if types
    )
    if torch.float16 in stages["weights"] | stages["trainable"] | stages["constants"]:
        return Finding("warn", f"types: {text}", "load at float32 or bfloat16; float16 overflows")
    if torch.float64 in stages["weights"] and computed != {torch.float64}:
        return Finding(
            "fail",
            f"types: {text}: a float64 policy computes in less somewhere",
            "measure with --precision float32, and report the architecture",
        )
    return Finding("ok", f"types: {text}")


def _stored(policy: Policy) -> Finding:
    """The types of the trained weights on disk: a half type means that the training rounds every step."""
    kinds = "/".join(policy.stored_dtypes) or "nowhere"
    state = policy.optimizer
    doubt = policy.rounding_doubt
    if not doubt:
        return Finding("ok", f"trained weights are stored as {kinds}")
    if state is not None and state.half_types:
        if odd := state.finer_than_kept(policy.parameters):
            return Finding("fail", odd, "measure a checkpoint as its training wrote it")
        return Finding(
            "warn",
            f"trained weights are kept as {'/'.join(state.half_types)} and rounded after every step; the "
            "change is that of the rounded step, shares and influences those of the step before rounding",
            "read them so, or train with float32 weights (bf16=True autocasts them)",
        )
    return Finding(
        "warn",
        f"{doubt}; figures that depend on the step are flagged",
        "train with float32 weights (bf16=True autocasts them), or read the figures as those of such a step",
    )


def _base(policy: Policy) -> list[Finding]:
    """The type of the base of a foreign run's adapter, in which the training computed if it loaded it so."""
    kind = type_in_files(base_model(policy.model))
    foreign = policy.path is not None and not (policy.path / SETTINGS_FILE).is_file()
    if not foreign or base_model(policy.model) is policy.model or kind not in HALF_TYPES:
        return []
    what = (
        f"the base of the adapter is stored in {kind}: if the training loaded it so, it computed in it, and "
        "a step in float32 differs by about a percent"
    )
    return [Finding("warn", what, "keep it in mind, or train with the base in float32")]


def _mixture(policy: Policy) -> list[Finding]:
    coefficient = router_coefficient(base_model(policy.model), policy.settings)
    config: Any = getattr(base_model(policy.model), "config", None)
    if config is None or not hasattr(config.get_text_config(), "output_router_logits"):
        return []
    loss = f"router loss x {coefficient:g}" if coefficient else "no router loss"
    found = [Finding("ok", f"mixture of experts, measured with a loop over experts; {loss} in the training")]
    size, whole = (
        policy.settings.micro_batch_size,
        policy.settings.group_size * policy.settings.prompts_per_step,
    )
    if coefficient and size is not None and size < whole:
        found.append(
            Finding(
                "warn",
                f"the router loss was taken of each {size} of a batch's {whole} sequences, cut at random; "
                "the step measured is that of a batch cut in its own order",
                "train with the whole batch in one piece, or with router_aux_loss_coef=0",
            )
        )
    return found


def _pictures(policy: Policy) -> list[Finding]:
    """A model of images and text is measured on text alone."""
    config: Any = getattr(base_model(policy.model), "config", None)
    if getattr(config, "vision_config", None) is None:
        return []
    what = (
        "a model of images and text, measured on text alone: prompts and the batch of the step have no "
        "images, so that what sees them moves by momentum and decay only"
    )
    return [Finding("warn", what, "keep it in mind; the step of a batch with images is another")]


def _reference(policy: Policy) -> list[Finding]:
    if policy.settings.beta == 0.0 or not base_is_rewritten(policy.model):
        return []
    return [
        Finding(
            "warn",
            "the adapter's initialisation took its share out of the base, and TRL's KL penalty held the "
            "policy to what is left of it; the step is rebuilt so, the quantity kl is to the base as it was",
            "train with an initialisation that keeps the base where the penalty shall be to the start",
        )
    ]


def _positions(policy: Policy) -> list[Finding]:
    """Whether a trainer that passes no positions, as TRL, trains on others than these in padded batches."""
    prompts, responses = made_up_sequences(policy)
    batch = make_batch(prompts, responses, device=policy.device)
    inputs = forward_inputs(policy.model, batch, positions=batch.response_ids.shape[1] + 1)
    if "position_ids" not in inputs:
        return []
    model = policy.model
    with torch.no_grad(), matching_precision(model), plain_experts(model), resharded(model):
        given, left = (policy.model(**i).logits for i in (inputs, {**inputs, "position_ids": None}))
    rows = batch.attention_mask[:, -given.shape[1] :].bool()
    gap = float((given.float().log_softmax(-1) - left.float().log_softmax(-1))[rows].nan_to_num().abs().max())
    if gap <= TOLERANCE.get(policy.dtype, 1e-3):
        return []
    return [
        Finding(
            "warn",
            "positions are counted from the first token of a prompt, as in sampling; TRL's loss counts them "
            f"from the padding on its left (log-probs differ by up to {gap:.2g} nats), so its step on "
            "prompts of unequal lengths is another",
            "train such a model on prompts of one length, or with one prompt per micro-batch",
        )
    ]


def _derivatives(policy: Policy) -> list[Finding]:
    """Whether slopes of this model are derivatives of its changes."""
    if not policy.parameters:
        return []
    prompts, responses = made_up_sequences(policy)
    batch = make_batch(prompts, responses, device=policy.device)
    try:
        errors = derivative_errors(
            policy, batch, random_direction(policy), temperature=policy.settings.temperature
        )
    except MeasurementError as error:
        return [Finding.from_error(error)]
    except (NotImplementedError, RuntimeError) as error:
        if not lacks_a_rule(error):
            raise
        cure = "load the model without custom kernels, or use an adapter of another kind"
        return [
            Finding("fail", f"torch cannot differentiate this model in forward mode ({brief(error)})", cure)
        ]
    if errors.doubt:
        cure = "read true changes; slopes and influences of this model are flagged"
        return [Finding("warn", errors.doubt, cure)]
    worst = max(errors.forward, errors.reverse)
    return [Finding("ok", f"derivatives are those of the function to {max(worst, 1e-6):.1g}")]


def _tied(model: nn.Module) -> Finding:
    base: Any = base_model(model)
    inner, outer = base.get_input_embeddings(), base.get_output_embeddings()
    tied = outer is not None and inner is not None and inner.weight is outer.weight
    return Finding("ok", "input and output embeddings are " + ("one tied parameter" if tied else "separate"))


def _forward(policy: Policy) -> list[Finding]:
    """Determinism, and invariance to batch size, order and padding, on made-up sequences."""
    prompts, responses = made_up_sequences(policy)
    together = _logprobs(policy, prompts, responses)
    again = _logprobs(policy, prompts, responses)
    alone = [_logprobs(policy, [p], [r])[0] for p, r in zip(prompts, responses, strict=True)]
    same = all(torch.equal(a, b) for a, b in zip(together, again, strict=True))
    gap = float(torch.cat([(a - b).abs() for a, b in zip(together, alone, strict=True)]).max())
    limit = TOLERANCE.get(next(policy.model.parameters()).dtype, 1e-3)
    found = [
        Finding("ok", "two forward passes agree bit for bit")
        if same
        else Finding("fail", "two equal forward passes differ", "switch off what is random in the model")
    ]
    if not gap <= limit:
        cure = "the model must honour attention_mask and position_ids; use float32, or another architecture"
        found.append(
            Finding("fail", f"log-probs depend on batch size and padding by up to {gap:.2g} nats", cure)
        )
    else:
        found.append(Finding("ok", f"log-probs depend on batch size and padding by at most {gap:.2g} nats"))
    return found


def _logprobs(policy: Policy, prompts: list[list[int]], responses: list[list[int]]) -> list[Tensor]:
    batch = make_batch(prompts, responses, device=policy.device)
    with torch.no_grad():
        outputs = forward(policy.model, batch, temperature=policy.settings.temperature)
    return [row[mask] for row, mask in zip(outputs.logprobs, batch.response_mask, strict=True)]
