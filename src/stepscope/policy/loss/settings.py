"""The settings of a run that decide its next step; stored beside a checkpoint as ``stepscope.json``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, PlainSerializer, PlainValidator, TypeAdapter, ValidationError

from stepscope.errors import CheckpointError, ConfigError, shown
from stepscope.results.files import whole
from stepscope.rules import Intervention, intervention_from_record

SETTINGS_FILE = "stepscope.json"
"""Name of the settings file inside a checkpoint folder."""

NEXT_BATCH = "next_batch.jsonl"
"""Name of the file inside a checkpoint folder with the batch of the next step, where a training knows it."""

SETTINGS_VERSION = 1
"""Version written into the settings file; other versions are refused."""


_Range = tuple[str, Callable[[float], bool]]
_COUNT: _Range = ("at least 1", lambda v: v >= 1)
_POSITIVE: _Range = ("a finite number above 0", lambda v: 0 < v < math.inf)
_NOT_NEGATIVE: _Range = ("a finite number, at least 0", lambda v: 0 <= v < math.inf)
_RANGES: dict[str, _Range] = {
    "group_size": _COUNT,
    "prompts_per_step": _COUNT,
    "temperature": _POSITIVE,
    "max_response_tokens": _COUNT,
    "max_prompt_tokens": _COUNT,
    "router_loss": _NOT_NEGATIVE,
    "micro_batch_size": _COUNT,
    "max_grad_norm": ("a finite number, at least 0 (which switches clipping off)", _NOT_NEGATIVE[1]),
    "epsilon_low": _NOT_NEGATIVE,
    "epsilon_high": _NOT_NEGATIVE,
    "beta": _NOT_NEGATIVE,
    "kl_in_reward": _NOT_NEGATIVE,
    "top_p": ("above 0 and at most 1", lambda v: 0 < v <= 1),
    "seed": _NOT_NEGATIVE,
    "format_weight": ("from 0 to 1", lambda v: 0 <= v <= 1),
    "num_iterations": _COUNT,
}


def _intervention(value: Any) -> Intervention | None:
    if value is None:
        return None
    if not isinstance(value, Mapping):
        raise ValueError("expected an object")
    try:
        return intervention_from_record(value)
    except ConfigError as error:
        raise ValueError(str(error)) from error


_Objective = Annotated[
    Intervention | None,
    PlainValidator(_intervention),
    PlainSerializer(lambda value: None if value is None else value.to_record()),
]


@dataclass(frozen=True)
class StepSettings:
    """Everything beside weights and optimizer state that a step depends on.

    Attributes:
        loss_type: name of the loss, one of :data:`~stepscope.policy.loss.registry.LOSSES`.
        loss_parameters: its own parameters, by the names that TRL or verl gives them; those left out have
            their default.
        aggregation: how the loss per token is averaged, one of
            :data:`~stepscope.policy.loss.aggregation.AGGREGATIONS`; empty for the loss's own way.
        kl_penalty: estimate of the KL divergence that ``beta`` or ``kl_in_reward`` weighs, one of
            :data:`~stepscope.policy.loss.kl.KL_PENALTIES`; empty for ``k3``, and ``k1`` in the reward.
        scale_rewards: how advantages are scaled: ``none``, ``group`` or ``batch`` standard deviation.
        kl_in_reward: weight of the KL divergence to the reference policy, summed over a response, that is
            taken off its reward before advantages are made (TRL's RLOO, verl's ``use_kl_in_reward``).
        advantage_estimator: how advantages come from rewards, one of
            :data:`~stepscope.policy.loss.estimators.ESTIMATORS`; empty for GRPO's.
        advantage_parameters: its own parameters; those left out have their default.
        group_size: responses per prompt.
        prompts_per_step: prompt groups per optimizer step.
        temperature: sampling temperature.
        max_response_tokens: L, the longest response; also Dr. GRPO's divisor.
        max_prompt_tokens: longest prompt kept (its end), or None.
        max_grad_norm: gradient clipping threshold; 0 switches clipping off.
        epsilon_low: lower clip range of the ratio.
        epsilon_high: upper clip range of the ratio.
        beta: weight of the KL penalty to the reference policy.
        top_p: nucleus of the sampling; 1 is the policy itself.
        task: specification of the task, for example ``arithmetic``; empty if unknown.
        prompt_template: name of the template or a template text with ``{question}``; empty means the default.
        seed: the run's seed.
        bias_correction_kl: multiply the KL penalty by the ratio, which makes its gradient the reverse KL's
            (TRL's ``use_bias_correction_kl``, on by default there).
        mask_truncated: truncated responses do not enter the loss (TRL's ``mask_truncated_completions``).
        format_weight: part of the reward that keeping the format earns, whatever the answer.
        objective: what is changed in the loss, with its parameters in the next step; None for the loss as it
            is.
        system_prompt: system message of the chat template; empty for none.
        prefill: text that the response's turn begins with, at the end of the prompt.
        chat_template_kwargs: variables of the chat template (TRL's ``chat_template_kwargs``), or None.
        answer_format: where in a response its answer stands, see :mod:`stepscope.tasks.formats.response`.
        num_iterations: optimizer steps on each batch; the next step is the first on its batch, so on-policy.
        task_digest: state of the task's data in the training, as the task has it; empty if unknown.
        router_loss: weight of the loss that balances a mixture of experts; None for the model's own (TRL's
            ``router_aux_loss_coef``).
        micro_batch_size: sequences whose router loss, mean of ``bnpo`` or statistics of a loss are taken
            together; None for the whole batch.
        disable_dropout: training switched off the model's dropout modules (TRL's name).
        without: what else the run did that its next step is measured without, by name.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(strict=True, extra="forbid")

    loss_type: str = "dr_grpo"
    scale_rewards: str = "none"
    group_size: int = 8
    prompts_per_step: int = 16
    temperature: float = 1.0
    max_response_tokens: int = 64
    max_prompt_tokens: int | None = None
    max_grad_norm: float = 1.0
    epsilon_low: float = 0.2
    epsilon_high: float = 0.2
    beta: float = 0.0
    top_p: float = 1.0
    task: str = ""
    prompt_template: str = ""
    seed: int = 0
    bias_correction_kl: bool = True
    mask_truncated: bool = False
    format_weight: float = 0.0
    objective: _Objective = None
    system_prompt: str = ""
    prefill: str = ""
    chat_template_kwargs: dict[str, Any] | None = field(default=None, hash=False)
    answer_format: str = "tags"
    num_iterations: int = 1
    task_digest: str = ""
    router_loss: float | None = None
    micro_batch_size: int | None = None
    disable_dropout: bool = False
    loss_parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    kl_in_reward: float = 0.0
    advantage_estimator: str = ""
    advantage_parameters: dict[str, Any] = field(default_factory=dict, hash=False)
    aggregation: str = ""
    kl_penalty: str = ""
    without: list[str] = field(default_factory=list, hash=False)

    def __post_init__(self) -> None:
        """Refuse values that no run can have, whoever sets them.

        Raises:
            CheckpointError: naming all of them.
        """
        problems = [
            f"{name}: got {shown(value)}, expected {expected}"
            for name, (expected, possible) in _RANGES.items()
            if (value := getattr(self, name)) is not None and not possible(value)
        ]
        if problems:
            raise CheckpointError(f"settings out of range ({'; '.join(problems)}); mend these keys")

    def save(self, path: Path) -> None:
        """Write the settings as JSON, atomically; ``path`` is the file or the checkpoint folder."""
        file = path / SETTINGS_FILE if path.is_dir() else path
        plain = {"version": SETTINGS_VERSION, **_adapter().dump_python(self, mode="json")}
        whole(file, lambda partial: partial.write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8"))

    @classmethod
    def load(cls, path: Path) -> StepSettings:
        """Read settings written by :meth:`save`; ``path`` is the file or the checkpoint folder.

        Raises:
            CheckpointError: the file is missing, is not JSON, has another version, an unknown key or a
                value of the wrong type.
        """
        file = path / SETTINGS_FILE if path.is_dir() else path
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"{file}: settings cannot be read ({error}); copy or write the file again"
            ) from error
        if not isinstance(data, dict):
            raise CheckpointError(
                f"{file}: got {type(data).__name__}, expected a JSON object; write it again"
            )
        version = data.pop("version", None)
        if version != SETTINGS_VERSION:
            raise CheckpointError(
                f"{file}: settings of version {shown(version)}, expected {SETTINGS_VERSION}; "
                "use the stepscope version that wrote it"
            )
        if data.get("on_policy_only") is False:
            del data[
                "on_policy_only"
            ]  # said of every loss until November 2026, of those that it limits still
        return cls.from_plain(data, where=str(file))

    @classmethod
    def from_plain(cls, data: Mapping[str, Any], *, where: str) -> StepSettings:
        """Settings from plain data; keys left out keep their default.

        Args:
            data: field names and values.
            where: what to name in an error.

        Raises:
            CheckpointError: a key is unknown, a value has the wrong type or is out of range; all are named at
                once.
        """
        try:
            return _adapter().validate_json(json.dumps(dict(data), default=Intervention.to_record))
        except ValidationError as error:
            problems = "; ".join(map(_problem, error.errors(include_url=False)))
            raise CheckpointError(
                f"{where}: settings not understood ({problems}); mend these keys"
            ) from error
        except CheckpointError as error:
            raise CheckpointError(f"{where}: {error}") from error


def _problem(found: Any) -> str:
    """One of pydantic's errors in a few words."""
    key = ".".join(map(str, found["loc"]))
    own = found.get("ctx", {}).get("error")  # of an intervention
    return f"{key}: {own}" if own else f"{key}: {found['msg']}, got {shown(found['input'])}"


@cache
def _adapter() -> TypeAdapter[StepSettings]:
    return TypeAdapter(StepSettings)


UNKNOWN = StepSettings(loss_type="")
"""Stands for settings that nothing says, to look at the rest of a checkpoint."""
