"""A batch of responses as a log of Inspect (inspect_ai), written by its own library.

``inspect_ai`` need not be installed, and is imported where it is used. Log-probs have a place in the format
(``output.choices[0].logprobs``, a list of tokens with theirs); all other numbers of tokens go to the sample's
metadata, as lists along these tokens.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from stepscope.pipeline.export import Exported, ExportedSample
from stepscope.results import FloatArray
from stepscope.results.files import whole
from stepscope.stats import Estimate


def write_inspect(exported: Exported, path: Path) -> None:
    """Write a log in the binary format (``.eval``); the file appears whole or not at all."""
    from inspect_ai.log import write_eval_log

    log = inspect_log(exported)
    whole(path, lambda partial: write_eval_log(log, str(partial), format="eval"))


def inspect_log(exported: Exported) -> Any:
    """The log: a sample per response, the responses to a prompt as epochs of one sample id."""
    from inspect_ai import log

    model = f"stepscope/{exported.model}"
    seen: Counter[str] = Counter()
    samples = []
    for each in exported.samples:
        seen[each.prompt_id] += 1
        samples.append(_sample(each, seen[each.prompt_id], model))
    created = exported.created or datetime.now(UTC).isoformat(timespec="seconds")
    dataset = log.EvalDataset(name=exported.task, samples=len(seen), sample_ids=list(seen), shuffled=False)
    spec = log.EvalSpec(
        created=created,
        task=exported.task,
        dataset=dataset,
        model=model,
        config=log.EvalConfig(epochs=max(seen.values())),
        packages={"stepscope": version("stepscope"), "inspect_ai": version("inspect_ai")},
        metadata=dict(exported.metadata),
        tags=["stepscope", exported.name],
    )
    results = log.EvalResults(
        total_samples=len(samples),
        completed_samples=len(samples),
        scores=[
            log.EvalScore(name=name, scorer=name, metrics=dict(_metrics(figures)))
            for name, figures in exported.figures.items()
        ],
    )
    return log.EvalLog(status="success", eval=spec, results=results, samples=samples)


def _metrics(figures: Mapping[str, Estimate]) -> Iterator[tuple[str, Any]]:
    from inspect_ai.log import EvalMetric

    for name, estimate in figures.items():
        yield name, EvalMetric(name=name, value=estimate.value, metadata=_plain(estimate))
        stderr = "stderr" if len(figures) == 1 or name == "accuracy" else f"{name}_stderr"
        yield stderr, EvalMetric(name=stderr, value=estimate.stderr)


def _plain(estimate: Estimate) -> dict[str, Any]:
    names = ("n", "unit", "method", "reliable", "reason", "low", "high")
    return {name: _finite(getattr(estimate, name)) for name in names}


def _sample(each: ExportedSample, epoch: int, name: str) -> Any:
    from inspect_ai import log, model, scorer

    content = [
        model.Logprob(token=token, logprob=float(logprob), bytes=list(token.encode("utf-8")))
        for token, logprob in zip(each.tokens, each.logprobs, strict=True)
    ]
    answer = model.ChatMessageAssistant(content=each.response, model=name, source="generate")
    choice = model.ChatCompletionChoice(
        message=answer,
        stop_reason="max_tokens" if each.truncated else "stop",
        logprobs=model.Logprobs(content=content),
    )
    asked, written = each.prompt_tokens or 0, len(each.tokens)
    usage = model.ModelUsage(input_tokens=asked, output_tokens=written, total_tokens=asked + written)
    scores = {"correct": scorer.Score(value=scorer.CORRECT if each.correct else scorer.INCORRECT)}
    scores |= {name: scorer.Score(value=float(value)) for name, value in each.scores.items()}
    per_token = {name: _numbers(values) for name, values in each.per_token.items()}
    return log.EvalSample(
        id=each.prompt_id,
        epoch=epoch,
        input=each.prompt,
        target="",
        messages=[model.ChatMessageUser(content=each.prompt, source="input"), answer],
        output=model.ModelOutput(model=name, choices=[choice], usage=usage),
        scores=scores,
        metadata={**each.metadata, "per_token": {"token": each.tokens, **per_token}},
    )


def _numbers(values: FloatArray) -> list[float | None]:
    return [float(v) if np.isfinite(v) else None for v in values]


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not np.isfinite(value) else value
