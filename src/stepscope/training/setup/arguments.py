"""What the warm-up and the reinforcement learning tell the Hugging Face Trainer alike."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.utils import get_total_norm
from transformers import TrainerCallback
from transformers.integrations import TensorBoardCallback
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.utils import logging as transformers_logging

from stepscope.config import OptimizerConfig
from stepscope.errors import TrainingError


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside the block transformers shows no bars of its own and nobody announces future renamings."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


class QuietProgress(ProgressCallback):  # type: ignore[misc]
    """The Trainer's progress bar with the latest figures beside it instead of a line for every step."""

    shown = ("loss", "reward", "entropy", "format_rate", "accuracy")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest figures."""
        if self.training_bar is not None:
            figures = {k: f"{logs[k]:.3g}" for k in self.shown if logs.get(k) is not None}
            self.training_bar.set_postfix(figures)


@dataclass
class DivergenceWatch(TrainerCallback):  # type: ignore[misc]
    """Ends a training whose gradient is not finite, before the optimizer takes it into weights and moments.

    Attributes:
        section: of the configuration.
    """

    section: str

    def on_pre_optimizer_step(
        self, args: Any, state: Any, control: Any, *, model: Any, **kwargs: Any
    ) -> None:
        """Look at the gradient of the step to come."""
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not bool(get_total_norm(gradients).isfinite()):
            raise diverged(self.section, state.global_step + 1, "the gradient is not finite")


def diverged(section: str, step: int, fault: str) -> TrainingError:
    """The error of a training that has left all bounds at a step."""
    return TrainingError(
        f"{section}: the training diverged at step {step}: {fault}; the checkpoints so far are kept; train "
        f"into another folder with a lower {section}.optimizer.lr or max_grad_norm, or with some warmup_steps"
    )


def shared_arguments(optimizer: OptimizerConfig, *, seed: int, report_to: list[str]) -> dict[str, Any]:
    """Keyword arguments of ``TrainingArguments`` that both stages use.

    Computation is in the dtype of the weights (no autocast), so that a step can be rebuilt from a checkpoint.
    TensorBoard is left to :func:`install_callbacks`, which decides where its files go.
    """
    return {
        "learning_rate": optimizer.lr,
        "lr_scheduler_type": optimizer.scheduler,
        "warmup_steps": optimizer.warmup_steps,
        "weight_decay": optimizer.weight_decay,
        "adam_beta1": optimizer.beta1,
        "adam_beta2": optimizer.beta2,
        "adam_epsilon": optimizer.eps,
        "max_grad_norm": optimizer.max_grad_norm,
        "optim": "adamw_torch",
        "seed": seed,
        "data_seed": seed,
        "bf16": False,
        "fp16": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "report_to": [name for name in report_to if name != "tensorboard"] or "none",
        "logging_first_step": True,
    }


def install_callbacks(trainer: Any, *, section: str, logs: Path | None, resumed_from: int = 0) -> None:
    """A quiet progress bar instead of the Trainer's printing; an eye on the gradient; TensorBoard curves.

    The curves go to ``logs`` if given, and errors name the ``section`` of the configuration.

    Points behind step ``resumed_from`` that an interrupted training left are taken out of the curves.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.remove_callback(ProgressCallback)
    added: list[TrainerCallback] = [QuietProgress(), DivergenceWatch(section)]
    if logs is not None and trainer.is_world_process_zero():
        from torch.utils.tensorboard import (
            SummaryWriter,
        )  # a package that who names no tracker can do without

        # written at the first start, too: TensorBoard takes nothing out unless it has seen that one
        writer = SummaryWriter(log_dir=str(logs), purge_step=resumed_from + 1 if resumed_from else 0)
        added.append(TensorBoardCallback(writer))
    for callback in added:
        trainer.add_callback(callback)
