"""``stepscope eval``: pass@k and the rest, one row per checkpoint."""

from __future__ import annotations

from pathlib import Path

from stepscope.config import EvalConfig
from stepscope.errors import CheckpointError, RunFolderError
from stepscope.evaluation import evaluate, write_eval
from stepscope.pipeline.console import on_terminal, say, timed
from stepscope.pipeline.session import open_policy, open_task


def checkpoints_in(source: Path) -> list[Path]:
    """The checkpoint folders that ``source`` stands for, in order of step.

    A checkpoint stands for itself; a run folder for ``checkpoints/step-N``; a Trainer's output folder for its
    ``checkpoint-N``.

    Raises:
        CheckpointError: there is none.
    """
    if not source.is_dir():
        raise CheckpointError(f"{source}: no such folder; give a checkpoint or a run folder")
    found = [
        path
        for pattern in ("checkpoints/step-*", "checkpoint-*", "step-*")
        for path in source.glob(pattern)
        if path.is_dir() and path.name.rpartition("-")[2].isdigit()
    ]
    if found:
        return sorted(found, key=lambda p: int(p.name.rpartition("-")[2]))
    if any((source / name).exists() for name in ("config.json", "adapter_config.json")):
        return [source]
    raise CheckpointError(
        f"{source}: neither a checkpoint (config.json or adapter_config.json) nor a run folder with "
        "checkpoints/step-N or checkpoint-N; is the path right?"
    )


def run_eval(config: EvalConfig) -> Path:
    """Evaluate one checkpoint or all of a run; writes one parquet file.

    Returns:
        The file.

    Raises:
        RunFolderError: the file exists already.
        CheckpointError: there is no checkpoint.
    """
    source = Path(config.source)
    out = Path(config.out) if config.out is not None else source / "eval.parquet"
    if out.exists():
        raise RunFolderError(f"{out}: exists already; remove it or choose another file with --out")
    evaluate_all(config, out)
    say(f"eval: {out}")
    return out


def evaluate_all(config: EvalConfig, out: Path) -> None:
    """Evaluate what ``config.source`` stands for and write the table to ``out``.

    Raises:
        CheckpointError: there is no checkpoint.
    """
    rows = []
    for checkpoint in checkpoints_in(Path(config.source)):
        with timed(f"eval {checkpoint.name}"):
            policy = open_policy(
                checkpoint,
                precision=config.precision,
                device=config.device,
                loss=config.loss,
                require_optimizer=False,
            )
            row = evaluate(
                policy,
                open_task(config.task, policy),
                num_prompts=config.num_prompts,
                samples_per_prompt=config.samples_per_prompt,
                seed=config.seed,
                ks=config.ks,
                split=config.split,
                batch_size=config.batch_size,
                progress=on_terminal(),
            )
        rows.append(row)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_eval(rows, out)
