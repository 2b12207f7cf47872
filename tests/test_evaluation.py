from __future__ import annotations

import copy
import dataclasses
import itertools
import math
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import cases
from stepscope.errors import MeasurementError, RunFolderError
from stepscope.evaluation import (
    EvaluationRow,
    PromptResult,
    differences,
    evaluate,
    evaluate_rollouts,
    prompts_path,
    read_eval,
    transitions,
    write_eval,
    write_responses,
)
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.results import Rollouts
from stepscope.tasks import TemplatedTask, load_task

GOOD = "<think>{a}</think><answer>{a}</answer>"


@pytest.fixture(scope="module")
def task() -> TemplatedTask:
    return load_task("arithmetic:terms=2,digits=1,train=20,test=12")


def stored(task: TemplatedTask, *, prompts: int = 7, samples: int = 5, seed: int = 0) -> Rollouts:
    """Responses as they come: right and wrong, with and without the format, of many lengths."""
    generator = np.random.default_rng(seed)
    problems = task.problems("test")[:prompts]
    rows = []
    for level, problem in enumerate(problems):
        for _ in range(samples):
            value = problem.answer if generator.random() < level / (prompts - 1) else "99999"
            text = GOOD.format(a=value)
            kind = generator.integers(4)
            text = {0: text, 1: text, 2: text.removeprefix("<think>"), 3: text + text}[int(kind)]
            rows.append((problem, text, int(generator.integers(1, 30))))
    lengths = [n for _, _, n in rows]
    scores = [task.score(problem, text) for problem, text, _ in rows]
    return cases.rollouts(
        [(1, 2)] * len(rows),
        [range(n) for n in lengths],
        prompt_ids=tuple(p.prompt_id for p, _, _ in rows),
        prompts=tuple(task.prompt(p, None) for p, _, _ in rows),
        responses=tuple(text for _, text, _ in rows),
        rewards=np.array([s.reward for s in scores]),
        correct=np.array([s.correct for s in scores]),
        truncated=generator.random(len(rows)) < 0.2,
        logprobs=tuple(-generator.exponential(size=n) for n in lengths),
        entropies=tuple(generator.random(n) for n in lengths),
        temperature=0.7,
        max_response_tokens=30,
    )


def groups(rollouts: Rollouts) -> list[list[int]]:
    return [
        [i for i, p in enumerate(rollouts.prompt_ids) if p == prompt]
        for prompt in dict.fromkeys(rollouts.prompt_ids)
    ]


def test_copies_of_a_prompt_are_one(task: TemplatedTask) -> None:
    """Ten responses to a prompt, or five to each of two copies of it: the same figures and errors."""
    rollouts = stored(task, samples=10)
    copies = tuple(f"{name}#{i % 2}" for i, name in enumerate(rollouts.prompt_ids))
    once = evaluate_rollouts(rollouts, task)
    twice = evaluate_rollouts(dataclasses.replace(rollouts, prompt_ids=copies), task)
    named = tuple(
        dataclasses.replace(p, prompt_id=q.prompt_id)
        for p, q in zip(once.prompts, twice.prompts, strict=True)
    )
    assert dataclasses.replace(once, prompts=named) == twice
    assert (twice.num_prompts, twice.samples_per_prompt) == (7, 10)


def test_brute_force_count(task: TemplatedTask) -> None:
    """Every figure, counted one response at a time, pass@k over all subsets of size k."""
    rollouts = stored(task)
    row = evaluate_rollouts(rollouts, task, ks=(1, 2, 4, 5), step=40, checkpoint="step-40", seed=3)
    solved = {p.prompt_id: p for p in row.prompts}
    answers = {p.prompt_id: p.answer for p in task.problems("test")}
    right, formatted = [], []
    for prompt_id, text in zip(rollouts.prompt_ids, rollouts.responses, strict=True):
        found = re.findall(r"<answer>(.*?)</answer>", text)
        right.append(len(found) == 1 and found[0] == answers[prompt_id])
        formatted.append(re.fullmatch(r"<think>[^<]*</think><answer>[^<]*</answer>", text) is not None)
    for k in (1, 2, 4, 5):
        rates = [
            np.mean([any(right[i] for i in chosen) for chosen in itertools.combinations(group, k)])
            for group in groups(rollouts)
        ]
        value, stderr = row.pass_at[k]
        assert value == pytest.approx(np.mean(rates), abs=1e-12)
        assert stderr == pytest.approx(np.std(rates, ddof=1) / math.sqrt(len(rates)), abs=1e-12)
    for group in groups(rollouts):
        rate = solved[rollouts.prompt_ids[group[0]]]
        assert (rate.num_samples, rate.num_correct) == (5, sum(right[i] for i in group))
    lengths = [len(ids) for ids in rollouts.response_token_ids]
    tokens = np.concatenate([-values for values in rollouts.logprobs])
    assert row.mean_reward == pytest.approx(np.mean(right))
    assert row.format_rate == pytest.approx(np.mean(formatted))
    assert 0 < row.format_rate < 1
    assert row.truncated_rate == pytest.approx(np.mean(rollouts.truncated))
    assert row.mean_length == pytest.approx(np.mean(lengths))
    assert row.mean_length_correct == pytest.approx(
        np.mean([n for n, r in zip(lengths, right, strict=True) if r])
    )
    assert row.entropy_per_token == pytest.approx(np.mean(np.concatenate(rollouts.entropies)))
    assert row.surprisal == pytest.approx(tokens.mean())
    for q in (50, 90, 99):
        assert getattr(row, f"surprisal_q{q}") == pytest.approx(np.quantile(tokens, q / 100))
    assert (row.num_prompts, row.samples_per_prompt, row.num_tokens) == (7, 5, sum(lengths))
    assert (row.step, row.checkpoint, row.seed, row.temperature) == (40, "step-40", 3, 0.7)
    assert row.pass_at_1 == row.pass_at[1][0]
    assert math.isnan(row.pass_at_8)


def test_errors_match_the_scatter_over_repeats(task: TemplatedTask) -> None:
    """Standard errors against the spread of the figures over prompts drawn anew."""
    names = ("mean_length", "entropy_per_token", "surprisal", "surprisal_q50", "surprisal_q90", "format_rate")
    generator = np.random.default_rng(1)
    rows = []
    for seed in range(120):
        rollouts = stored(task, prompts=12, samples=4, seed=seed)
        shift = np.repeat(generator.normal(size=12), 4)  # what the samples of a prompt have in common
        scaled = tuple(v * np.exp(0.5 * s) for v, s in zip(rollouts.logprobs, shift, strict=True))
        shifted = tuple(h + s for h, s in zip(rollouts.entropies, shift, strict=True))
        rollouts = dataclasses.replace(rollouts, logprobs=scaled, entropies=shifted)
        rows.append(evaluate_rollouts(rollouts, task, ks=(1,)))
    for name in names:
        spread = np.std([getattr(row, name) for row in rows], ddof=1)
        claimed = np.sqrt(np.mean([getattr(row, f"{name}_stderr") ** 2 for row in rows]))
        assert claimed == pytest.approx(spread, rel=0.3), name


def test_no_correct_response_has_no_length(task: TemplatedTask) -> None:
    rollouts = stored(task)
    none = dataclasses.replace(rollouts, correct=np.zeros(len(rollouts), dtype=bool))
    row = evaluate_rollouts(none, task, ks=(1,))
    assert math.isnan(row.mean_length_correct)
    assert row.pass_at_1 == 0


def test_samples_must_suffice(task: TemplatedTask) -> None:
    rollouts = stored(task)
    with pytest.raises(MeasurementError, match=r"k in \[1, 8\].*5 samples per prompt"):
        evaluate_rollouts(rollouts, task)
    with pytest.raises(MeasurementError, match="between 4 and 5 responses per prompt"):
        evaluate_rollouts(rollouts.select(range(1, 35)), task, ks=(1,))


def test_parquet_round_trip(task: TemplatedTask, tmp_path: Path) -> None:
    first = evaluate_rollouts(stored(task), task, ks=(1, 4), step=0)
    second = evaluate_rollouts(stored(task, seed=1), task, ks=(1, 5), step=10)
    path = tmp_path / "eval.parquet"
    write_eval([first, second], path)
    assert read_eval(path) == [first, second]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["eval.parquet", "eval_prompts.parquet"]
    table = pq.read_table(path)
    assert table.column("step").to_pylist() == [0, 10]
    assert table.column("pass_at_1_stderr").to_pylist() == [first.pass_at_1_stderr, second.pass_at_1_stderr]
    assert table.column("pass_at_4").to_pylist() == [first.pass_at[4][0], None]
    assert pq.read_table(prompts_path(path)).num_rows == 14
    assert first.key != second.key
    assert read_eval(path)[1].key == second.key


def test_damaged_tables(task: TemplatedTask, tmp_path: Path) -> None:
    path = tmp_path / "eval.parquet"
    with pytest.raises(MeasurementError, match="no evaluations to write"):
        write_eval([], path)
    with pytest.raises(RunFolderError, match="no such file"):
        read_eval(path)
    write_eval([evaluate_rollouts(stored(task), task, ks=(1,))], path)
    pq.write_table(pq.read_table(path).drop_columns(["surprisal"]), path)
    with pytest.raises(RunFolderError, match="no column surprisal"):
        read_eval(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_eval(path)


def rated(row: EvaluationRow, *correct: int) -> EvaluationRow:
    prompts = tuple(
        PromptResult(f"p/{i}", 4, c, 4, 0, 40, 10 * c, float(c), 20.0, 20.0) for i, c in enumerate(correct)
    )
    return dataclasses.replace(row, prompts=prompts)


def test_transitions(task: TemplatedTask) -> None:
    row = evaluate_rollouts(stored(task), task, ks=(1,))
    moved = transitions(rated(row, 0, 0, 2, 4, 4), rated(row, 0, 3, 4, 0, 4, 1))
    assert moved.counts == ((1, 1, 0), (0, 0, 1), (1, 0, 1))
    assert (moved.gained, moved.lost) == (("p/1",), ("p/3",))
    change = differences(rated(row, 0, 0, 2, 4, 4), rated(row, 0, 3, 4, 0, 4, 1))["pass_at_1"]
    changes = [0, 0.75, 0.5, -1, 0]
    assert change.value == pytest.approx(np.mean(changes))
    assert change.stderr == pytest.approx(np.std(changes, ddof=1) / math.sqrt(5))
    assert change.n == 5
    with pytest.raises(MeasurementError, match="share no prompt"):
        transitions(row, rated(row, 1))


def test_paired_differences_match_the_scatter_over_repeats(task: TemplatedTask) -> None:
    """Two evaluations whose prompts share an effect: the error of the difference is that of the rest."""
    generator = np.random.default_rng(3)
    found, unpaired = [], []
    for seed in range(150):
        first, second = (stored(task, prompts=12, samples=4, seed=2 * seed + i) for i in (0, 1))
        shift = np.repeat(3 * generator.random(12), 4)
        rows = [
            evaluate_rollouts(
                dataclasses.replace(
                    r, entropies=tuple(h + s for h, s in zip(r.entropies, shift, strict=True))
                ),
                task,
                ks=(1, 2),
            )
            for r in (first, second)
        ]
        found.append(differences(*rows))
        unpaired.append(math.hypot(*(row.entropy_per_token_stderr for row in rows)))
        assert found[-1]["pass_at_2"].value == pytest.approx(rows[1].pass_at[2][0] - rows[0].pass_at[2][0])
    for name in ("entropy_per_token", "mean_length", "surprisal", "format_rate", "truncated_rate"):
        spread = np.std([f[name].value for f in found], ddof=1)
        claimed = np.sqrt(np.mean([f[name].stderr ** 2 for f in found]))
        assert claimed == pytest.approx(spread, rel=0.25), name
    claimed = np.sqrt(np.mean([f["entropy_per_token"].stderr ** 2 for f in found]))
    assert claimed < 0.7 * np.mean(unpaired)


def test_difference_of_what_does_not_exist_is_flagged(task: TemplatedTask) -> None:
    rollouts = stored(task)
    none = dataclasses.replace(rollouts, correct=np.zeros(len(rollouts), dtype=bool))
    change = differences(evaluate_rollouts(none, task, ks=(1,)), evaluate_rollouts(rollouts, task, ks=(1,)))[
        "mean_length_correct"
    ]
    assert math.isnan(change.value)
    assert not change.reliable


def test_stored_responses_give_the_figures_again(task: TemplatedTask, tmp_path: Path) -> None:
    rollouts = stored(task)
    row = evaluate_rollouts(rollouts, task, ks=(1, 4))
    write_responses(rollouts, task, tmp_path / "r.parquet")
    table = pq.read_table(tmp_path / "r.parquet").to_pylist()
    by_prompt: dict[str, list[dict]] = {}
    for entry in table:
        by_prompt.setdefault(entry["prompt_id"], []).append(entry)
    solved = [sum(e["correct"] for e in entries) for entries in by_prompt.values()]
    chance = [1 - math.comb(5 - c, 4) / math.comb(5, 4) for c in solved]
    assert row.pass_at[4][0] == pytest.approx(np.mean(chance), abs=1e-12)
    tokens = sum(e["num_tokens"] for e in table)
    assert row.entropy_per_token == pytest.approx(sum(e["entropy"] for e in table) / tokens)
    assert row.surprisal == pytest.approx(-sum(e["logprob"] for e in table) / tokens)
    assert row.format_rate == pytest.approx(np.mean([e["formatted"] for e in table]))


@pytest.fixture(scope="module")
def policy() -> Policy:
    words = ["<pad>", "</s>", "<think>", "</think>", "<answer>", "</answer>", *"0123456789+-=;?"]
    settings = StepSettings(temperature=0.9, max_response_tokens=12)
    return Policy(cases.model(vocab_size=len(words)), cases.tokenizer(words), settings, step=7)


def test_tiny_policy(policy: Policy, task: TemplatedTask) -> None:
    arguments = {"num_prompts": 10, "samples_per_prompt": 8, "seed": 5}
    row = evaluate(policy, task, **arguments)
    assert (row.step, row.task, row.split) == (7, task.spec, "test")
    assert (row.num_prompts, row.samples_per_prompt, row.temperature) == (10, 8, 0.9)
    assert {p.prompt_id for p in row.prompts} <= {p.prompt_id for p in task.problems("test")}
    assert 0 < row.truncated_rate < 1
    assert row.mean_length <= 12
    assert abs(row.surprisal - row.entropy_per_token) < 5 * row.surprisal_stderr
    np.testing.assert_equal(
        dataclasses.asdict(evaluate(policy, task, **arguments)), dataclasses.asdict(row)
    )  # nan, the length of no correct response, equals itself
    other = evaluate(policy, task, **{**arguments, "seed": 6})
    assert {p.prompt_id for p in other.prompts} != {p.prompt_id for p in row.prompts}
    halved = evaluate(policy, task, **arguments, budget=Budget(max_sequences=5))
    assert halved.prompts[0].num_tokens == row.prompts[0].num_tokens
    assert halved.pass_at == row.pass_at
    assert halved.entropy_per_token == pytest.approx(row.entropy_per_token, rel=1e-5)


def test_too_little_memory_halves_what_is_sampled_at_a_time(
    policy: Policy, task: TemplatedTask, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    scarce = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    device = cases.SmallDevice(scarce.model, 5)
    files = [tmp_path / "plenty.parquet", tmp_path / "scarce.parquet"]
    for owner, file in zip((policy, scarce), files, strict=True):
        evaluate(owner, task, num_prompts=6, samples_per_prompt=4, seed=5, ks=(1,), responses=file)
    plenty, halved = (pq.read_table(file).to_pydict() for file in files)
    assert halved["response"] == plenty["response"]
    assert halved["correct"] == plenty["correct"]
    np.testing.assert_allclose(halved["entropy"], plenty["entropy"], rtol=1e-5, atol=1e-6)
    assert caplog.text.count("going on with micro-batches of half the tokens") == device.failures >= 2
    hopeless = dataclasses.replace(policy, model=copy.deepcopy(policy.model))
    cases.SmallDevice(hopeless.model, 0)
    with pytest.raises(MeasurementError, match=r"out of memory with 1 sequence\(s\).*shorter responses"):
        evaluate(hopeless, task, num_prompts=2, samples_per_prompt=4, seed=5, ks=(1,))


def test_temperature_profile(policy: Policy, task: TemplatedTask) -> None:
    """A hotter policy has more entropy; the prompts stay the same."""
    rows = [
        evaluate(policy, task, num_prompts=6, samples_per_prompt=4, seed=0, ks=(1,), temperature=t)
        for t in (0.5, 1.0, 2.0)
    ]
    assert [row.temperature for row in rows] == [0.5, 1.0, 2.0]
    assert rows[0].entropy_per_token < rows[1].entropy_per_token < rows[2].entropy_per_token
    assert len({tuple(p.prompt_id for p in row.prompts) for row in rows}) == 1
    nucleus = evaluate(policy, task, num_prompts=6, samples_per_prompt=4, seed=0, ks=(1,), top_p=0.5)
    assert nucleus.top_p == 0.5
    assert nucleus.surprisal < nucleus.entropy_per_token, "likely tokens of the whole policy"


def test_eval_table_holds_plain_columns(task: TemplatedTask, tmp_path: Path) -> None:
    path = tmp_path / "eval.parquet"
    write_eval([evaluate_rollouts(stored(task), task, ks=(1, 5))], path)
    for column in pq.read_table(path).schema:
        assert (
            pa.types.is_floating(column.type)
            or pa.types.is_integer(column.type)
            or column.type == pa.string()
        )
