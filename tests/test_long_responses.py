"""A response of 4,000 tokens through a measurement in two GiB: nothing grows with its square."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import cases
from stepscope import cli
from stepscope.policy.gradients.derivatives import directional_derivative, gradient, response_logprob
from stepscope.policy.gradients.gram import gram
from stepscope.policy.gradients.products import per_sequence_dot
from stepscope.policy.gradients.stream import SequenceGradients
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.runs import read_json

LONG = 4000
LIMIT = 2 * 2**30
VOCABULARY = 4096
"""Logits of a long response take 65 MB in float32, twelve times that while they are differentiated whole."""
MEASURED = ["rollouts", "step", "change", "influence", "kernel"]
ONE = Budget(max_sequences=1)
HEADS = 4
"""A number for each pair of positions takes 256 MB in float32; second derivatives hold a dozen of that."""


def long_model() -> torch.nn.Module:
    shape = {
        "hidden_size": 32,
        "num_attention_heads": HEADS,
        "num_key_value_heads": 2,
        "num_hidden_layers": 1,
    }
    return cases.model(**shape, vocab_size=VOCABULARY, max_position_embeddings=LONG + 96)  # type: ignore[no-any-return]


def responses(policy: Policy, lengths: list[int], *, seed: int, **fields: object) -> Rollouts:
    """Random tokens, scored by the policy."""
    rng = np.random.default_rng(seed)
    prompts = [tuple(rng.integers(2, 23, 4).tolist()) for _ in lengths]
    rows = [tuple(rng.integers(2, 23, n).tolist()) for n in lengths]
    return cases.scored(policy, cases.rollouts(prompts, rows, max_response_tokens=LONG, **fields))


@contextmanager
def within(most: int) -> Iterator[None]:
    """A block in which resident memory rises by no more than so many bytes above what was there."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # the peak is what is there now
    before = status("VmRSS")
    yield
    rise = status("VmHWM") - before
    print("rise", rise / 2**20)
    assert rise <= most, f"{rise / 2**20:.0f} MiB"


needs_proc = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="no peak to be read")


@needs_proc
def test_derivatives_of_a_long_response() -> None:
    policy = Policy(long_model(), None, StepSettings())
    with within(LIMIT):
        update = responses(policy, [LONG, 40], seed=0)
        slope = gradient(policy, update, response_logprob, budget=ONE)
        one = SequenceGradients(update, response_logprob)
        products = per_sequence_dot(policy, one, slope, budget=ONE)
        kernel = gram(policy, one, budget=ONE)
        tokens = directional_derivative(policy, update, response_logprob, slope, mode="forward", budget=ONE)
    assert [len(row) for row in tokens] == [LONG, 40]
    sums = np.array([float(row.double().sum()) for row in tokens])
    np.testing.assert_allclose(sums, products, rtol=1e-3)
    np.testing.assert_allclose(kernel.sum(0).numpy(), products, rtol=1e-3)


def checkpoint(folder: Path) -> Policy:
    """A checkpoint after AdamW's first step along ones, with a tokenizer of numbers."""
    model = long_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    words = ["<pad>", "</s>", *"0123456789+-=;?", *(f"<{i}>" for i in range(17, VOCABULARY))]
    model.save_pretrained(folder)  # type: ignore[operator]
    cases.tokenizer(words).save_pretrained(folder)
    torch.save(optimizer.state_dict(), folder / "optimizer.pt")
    settings = StepSettings(group_size=2, prompts_per_step=1, max_response_tokens=LONG)
    settings.save(folder)
    return Policy(model, None, settings)


@needs_proc
@pytest.mark.slow
def test_a_long_response_is_measured(tmp_path: Path) -> None:
    """About two minutes on one core; ``noise`` and ``criteria`` want more prompts than that affords."""
    policy = checkpoint(tmp_path / "checkpoint")
    for name, lengths in (("update", [LONG, 30, 20, 25]), ("probe", [LONG, 20])):
        group = name == "update"
        given = responses(
            policy,
            lengths,
            seed=int(group),
            prompt_ids=("a", "a", "b", "b") if group else ("c", "d"),
            prompts=("1+2=", "1+2=", "1+3=", "1+3=") if group else ("3+4=", "5+6="),
            rewards=np.arange(len(lengths)) % 2.0,
            correct=np.arange(len(lengths)) % 2 == 1,
            advantages=np.array([-0.5, 0.5, -0.5, 0.5]) if group else None,
        )
        texts = [[str(t) for t in row] for row in given.response_token_ids]
        given.to_parquet(tmp_path / f"{name}.parquet", tmp_path / f"{name}_tokens.parquet", tokens=texts)
    files = [f"{name}.file={tmp_path}/{name}.parquet" for name in ("update", "probe")]
    command = ["measure", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "m")]
    command += ["--stages", ",".join(MEASURED)]
    small = [
        "batch_size=1",
        "own_prompts=false",
        "criteria.diagonal_tokens=3",
        "criteria.drop_shares=[]",
        "lrs=[1e-3]",
    ]
    with within(LIMIT):
        task = ["--task", "arithmetic:terms=2,digits=1,ops=+"]
        result = CliRunner().invoke(cli.app, [*command, *task, *files, *small])
    assert result.exit_code == 0, (result.output, result.exception)
    said = [line.split(":")[0] for line in result.stderr.splitlines()]
    assert [stage for stage in said if stage in MEASURED] == MEASURED
    found = read_json(tmp_path / "m" / "summary.json")
    assert np.isfinite(found["change_true_per_token"]["value"])
