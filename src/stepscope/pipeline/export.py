"""``stepscope export``: responses with the numbers of their tokens, in the format of another tool."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from stepscope import runs
from stepscope.console import say_result
from stepscope.errors import ConfigError, RunFolderError
from stepscope.reading.evaluation import TABLE, load_evaluation
from stepscope.reading.measurement import Measurement
from stepscope.results import BoolArray, FloatArray, Rollouts, RolloutTokens, read_table
from stepscope.results.evaluation import EvaluationRow, companion
from stepscope.results.influence import InfluenceSequences, InfluenceTokens
from stepscope.stats import Estimate, clustered_mean

FORMATS = ("inspect",)
"""Formats by the names that ``--to`` takes."""


@dataclass(frozen=True)
class ExportedSample:
    """A response with all that is known of it.

    Attributes:
        prompt_id: of its prompt.
        prompt: as the policy was asked.
        response: what it wrote.
        prompt_tokens: tokens of the prompt; None where not known.
        tokens: texts of the response tokens; joined up they are the response.
        logprobs: (tok,) log-probs, nats.
        truncated: whether it was cut at the longest length.
        correct: the verdict.
        scores: name to further scores of the response; nan where nobody gave one.
        per_token: name to (tok,) numbers; nan where a token has none.
        metadata: what else.
    """

    prompt_id: str
    prompt: str
    response: str
    prompt_tokens: int | None
    tokens: list[str]
    logprobs: FloatArray
    truncated: bool
    correct: bool
    scores: Mapping[str, float]
    per_token: Mapping[str, FloatArray]
    metadata: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Exported:
    """Responses that go to one log.

    Attributes:
        name: of the log: the batch, or the checkpoint.
        task: specification of the task.
        model: name of the checkpoint.
        created: when they were sampled, ISO 8601.
        samples: the responses.
        figures: of all of them, by the name of a score and of what is taken of it.
        metadata: of the log.
    """

    name: str
    task: str
    model: str
    created: str
    samples: list[ExportedSample]
    figures: Mapping[str, Mapping[str, Estimate]]
    metadata: Mapping[str, Any]


def run_export(run: Path, *, to: str, out: Path | None = None) -> Path:
    """Write the responses of a measurement or an evaluation as logs of Inspect, one per batch or checkpoint.

    Args:
        run: folder of a measurement; or of a run that was evaluated, or the table of an evaluation.
        to: one of :data:`FORMATS`.
        out: folder of the logs; None for ``inspect`` in that of the run. Logs that are there are replaced.

    Returns:
        The folder.

    Raises:
        ConfigError: no such format, or the library that writes it is not installed.
        RunFolderError: the folder holds neither, or a file is damaged or lacks the tokens.
    """
    if to not in FORMATS:
        raise ConfigError(f"--to: expected one of {', '.join(FORMATS)}, got {to!r}")
    if importlib.util.find_spec("inspect_ai") is None:
        raise ConfigError(
            "--to inspect: inspect_ai, which writes these logs, is not installed; install it "
            "(pip install 'stepscope[inspect]', in an environment of its own where versions do not agree)"
        )
    from stepscope.pipeline.inspect_log import write_inspect

    folder = out or (run if run.is_dir() else run.parent) / to
    written = []
    for each in exported(run):
        folder.mkdir(parents=True, exist_ok=True)
        written.append(folder / f"{each.name}.eval")
        write_inspect(each, written[-1])
    say_result(
        "export", [f"{len(written)} logs; look at them with: inspect view --log-dir {folder}"], *written
    )
    return folder


def exported(run: Path) -> Iterator[Exported]:
    """What a folder holds, batch by batch or checkpoint by checkpoint.

    Raises:
        RunFolderError: it is neither a measurement's nor an evaluation's.
    """
    if run.is_file() or (run / TABLE).is_file():
        yield from _evaluation(run if run.is_file() else run / TABLE)
        return
    if not any((run / f"{name}.parquet").is_file() for name in ("update", "probe")):
        raise RunFolderError(
            f"{run}: expected the folder of a measurement (update.parquet, probe.parquet), or a run with "
            f"{TABLE}; run `stepscope measure` or `stepscope eval`"
        )
    runs.check_version(run)
    found = Measurement(run)
    for name in ("update", "probe"):
        batch, tokens = getattr(found, name), getattr(found, f"{name}_tokens")
        if batch is not None and tokens is not None:
            yield _batch(found, name, batch, tokens)


def _batch(found: Measurement, name: str, batch: Rollouts, tokens: RolloutTokens) -> Exported:
    config, provenance = found.config or {}, found.provenance or {}
    cuts = np.cumsum(batch.num_tokens)[:-1]
    texts = np.split(tokens.token, cuts)
    columns = {"entropy": tokens.entropy, "token_weight": tokens.token_weight, "advantage": tokens.advantage}
    per_token = {n: np.split(values, cuts) for n, values in columns.items() if values is not None}
    sequences: dict[str, FloatArray] = {}
    if name == "update":
        per_token |= {label: np.split(own, cuts) for label, own in _token_influences(found, batch)}
        sequences |= _sequence_influences(found, len(batch))
    samples = []
    for i in range(len(batch)):
        scores = {"reward": float(batch.rewards[i])}
        if batch.advantages is not None:
            scores["advantage"] = float(batch.advantages[i])
        scores |= {label: float(totals[i]) for label, totals in sequences.items()}
        samples.append(
            ExportedSample(
                prompt_id=batch.prompt_ids[i],
                prompt=batch.prompts[i],
                response=batch.responses[i],
                prompt_tokens=len(batch.prompt_token_ids[i]),
                tokens=[str(text) for text in texts[i]],
                logprobs=batch.logprobs[i],
                truncated=bool(batch.truncated[i]),
                correct=bool(batch.correct[i]),
                scores=scores,
                per_token={n: parts[i] for n, parts in per_token.items()},
                metadata={
                    "sequence_id": i,
                    "question": None if batch.questions is None else batch.questions[i],
                    "token_ids": list(batch.response_token_ids[i]),
                    "prompt_token_ids": list(batch.prompt_token_ids[i]),
                },
            )
        )
    graded = np.isfinite(batch.rewards)
    index = batch.prompt_index[graded]

    def mean(values: FloatArray) -> Estimate:
        return clustered_mean(values[graded], index, unit="", method="mean over responses")

    figures = {}
    if graded.any():
        figures["reward"] = {"mean": mean(batch.rewards)}
        figures["correct"] = {"accuracy": mean(batch.correct.astype(np.float64))}
    checkpoint = str(config.get("checkpoint") or found.path)
    return Exported(
        name=name,
        task=str(config.get("task") or batch.prompt_ids[0].split("/")[0]),
        model=Path(checkpoint).name,
        created=str(provenance.get("started") or ""),
        samples=samples,
        figures=figures,
        metadata={
            "measurement": str(found.path.resolve()),
            "checkpoint": checkpoint,
            "checkpoint_digest": provenance.get("checkpoint_digest"),
            "batch": name,
            "temperature": batch.temperature,
            "units": "nats; influence per unit of the step's learning rate",
        },
    )


def _ways(table: InfluenceTokens | InfluenceSequences) -> Iterator[tuple[str, BoolArray]]:
    """Quantities and what influence goes through, by the end of the name, with their rows."""
    for quantity in dict.fromkeys(table.quantity):
        for through in dict.fromkeys(table.through):
            own = (table.quantity == quantity) & (table.through == through)
            if own.any():
                yield str(quantity) if through == "fixed" else f"{quantity}_{through}", own


def _token_influences(found: Measurement, batch: Rollouts) -> Iterator[tuple[str, FloatArray]]:
    """(tok,) of the whole batch: the influence of every token and its error."""
    table = found.influence_tokens
    if table is None:
        return
    starts = np.concatenate([[0], np.cumsum(batch.num_tokens)])
    places = starts[table.sequence_id] + table.position
    for way, own in _ways(table):
        for column in ("influence", "stderr"):
            values = np.full(int(starts[-1]), np.nan)
            values[places[own]] = getattr(table, column)[own]
            yield f"{column}_{way}", values


def _sequence_influences(found: Measurement, count: int) -> dict[str, FloatArray]:
    """(seq,) the influence of every sequence."""
    table = found.influence_sequences
    values: dict[str, FloatArray] = {}
    for way, own in [] if table is None else _ways(table):
        assert table is not None
        rows = np.flatnonzero(own & (table.component == "sequence"))
        values[f"influence_{way}"] = np.full(count, np.nan)
        values[f"influence_{way}"][table.sequence_id[rows].astype(np.int64)] = table.influence[rows]
    return values


def _evaluation(table: Path) -> Iterator[Exported]:
    found = load_evaluation(table)
    parts = companion(table, "parts")
    created = str(runs.RunFolder(parts).provenance().get("started") or "")
    for row in found.rows:
        yield _checkpoint(row, parts / f"{row.checkpoint}_responses.parquet", created)


def _checkpoint(row: EvaluationRow, file: Path, created: str) -> Exported:
    table = read_table(runs.verified(file))
    if "token" not in table.column_names:
        raise RunFolderError(
            f"{file}: no column token, it was written by an earlier stepscope; evaluate again into another "
            "table, with --out"
        )
    samples = [
        ExportedSample(
            prompt_id=each["prompt_id"],
            prompt=each["prompt"],
            response=each["response"],
            prompt_tokens=None,
            tokens=each["token"],
            logprobs=np.array(each["token_logprob"], dtype=np.float64),
            truncated=each["truncated"],
            correct=each["correct"],
            scores={"reward": each["reward"], "formatted": float(each["formatted"])},
            per_token={"entropy": np.array(each["token_entropy"], dtype=np.float64)},
        )
        for each in table.to_pylist()
    ]
    found = row.estimates
    accuracy = {"accuracy": found["pass_at_1"]} | {n: e for n, e in found.items() if n.startswith("pass_at_")}
    return Exported(
        name=row.checkpoint,
        task=row.task,
        model=row.checkpoint,
        created=created,
        samples=samples,
        figures={
            "reward": {"mean": found["mean_reward"]},
            "correct": accuracy,
            "formatted": {"mean": found["format_rate"]},
        },
        metadata={
            "step": row.step,
            "checkpoint_digest": row.checkpoint_digest,
            "split": row.split,
            "seed": row.seed,
            "temperature": row.temperature,
            "units": "nats",
        },
    )
