"""Batches from what trainings dump: a real TRL run measured by its log, and the layouts of the others."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tokenizers import decoders
from transformers import PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

import cases
from made_tokenizers import byte_level
from stepscope import cli
from stepscope.errors import BatchError, CheckpointError
from stepscope.measure.step.reconstruct import reconstruct_step
from stepscope.pipeline.inputs.update_files import GivenBatch, update_from_file
from stepscope.policy import vectors
from stepscope.policy.checkpoint.load import load_checkpoint
from stepscope.policy.loss.settings import StepSettings
from stepscope.policy.passes import Budget
from stepscope.policy.state import Policy
from stepscope.policy.vectors import load
from stepscope.runs import read_json
from stepscope.tasks import load_task

TASK = "arithmetic:terms=2,digits=1,ops=+,train=40"
TEMPLATE = "{question}="


def one_end() -> PreTrainedTokenizerFast:
    """A tokenizer of characters whose padding is its end, as many models have it."""
    made = cases.tokenizer(["x", "</s>", *cases.CHARACTERS[2:]])
    made.pad_token = made.eos_token
    made.backend_tokenizer.decoder = decoders.Fuse()
    return made


def trained(out: Path, evaluates: Dataset | None = None, **arguments: Any) -> Path:
    """A GRPO run of TRL: four steps, a checkpoint and a log of completions for each, ids by one line."""
    problems = load_task(TASK).problems("train")

    def digits(completions: Sequence[str], **given: Any) -> list[float]:
        given["log_extra"]("completion_ids", given["completion_ids"])
        given["log_extra"]("size", [len(text) for text in completions])  # numbers that are no reward
        return [sum(c.isdigit() for c in text) / 24 for text in completions]

    GRPOTrainer(
        model=cases.model(pad_token_id=1),
        reward_funcs=digits,
        args=GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=8,
            num_generations=4,
            max_completion_length=24,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            max_steps=4,
            save_strategy="steps",
            save_steps=1,
            logging_steps=1,
            log_completions=True,
            report_to=[],
            num_completions_to_print=1,
            disable_tqdm=True,
            use_cpu=True,
            bf16=False,
            **arguments,
        ),
        train_dataset=Dataset.from_list([{"prompt": TEMPLATE.format(question=p.question)} for p in problems]),
        eval_dataset=evaluates,
        processing_class=one_end(),
    ).train()
    return out


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that takes one step on each batch."""
    return trained(tmp_path_factory.mktemp("trl"))


def true_direction(run: Path, step: int) -> dict[str, torch.Tensor]:
    """(params' - params) / lr of the step that the trainer took from a checkpoint."""
    before, after = (load_checkpoint(run / f"checkpoint-{s}", precision="float64") for s in (step, step + 1))
    return {n: (after.parameters[n].detach() - p.detach()) / 1e-3 for n, p in before.parameters.items()}


def without(log: Path, columns: Sequence[str], to: Path) -> Path:
    """The log as TRL writes it where nobody logs more."""
    pq.write_table(pq.read_table(log).drop_columns(list(columns)), to)
    return to


@pytest.mark.parametrize("text_alone", [True, False])
def test_the_log_of_a_real_run_gives_the_step_that_trl_took_next(
    run: Path, text_alone: bool, tmp_path: Path
) -> None:
    log: Path = run / "completions"
    if text_alone:
        log = without(log / "completions_00003.parquet", ["completion_ids"], tmp_path / "log.parquet")
    out = tmp_path / "m"
    command = ["measure", str(run / "checkpoint-2"), "--update", str(log), "--task", TASK, "--out", str(out)]
    small = ["--stages", "rollouts,step", "probe.num_prompts=4", f"loss.prompt_template={TEMPLATE}"]
    result = CliRunner().invoke(cli.app, [*command, *small])
    assert result.exit_code == 0, result.output
    found = load(out / "direction.safetensors")
    cosine = vectors.cosine({n: t.double() for n, t in found.items()}, true_direction(run, 2))
    assert cosine >= 1 - 1e-6
    figures = read_json(out / "summary.json")
    assert figures["update_advantage_difference"]["reliable"]
    said = " ".join(read_json(out / "provenance.json")["update"]["notes"])
    assert ("those of their text" in said) == text_alone
    if text_alone:
        assert figures["update_length_difference"]["value"] == pytest.approx(0, abs=1e-6)


def test_the_batch_of_another_step_is_another_step(run: Path) -> None:
    policy = load_checkpoint(run / "checkpoint-2", precision="float64")
    given = update_from_file(policy, run / "completions", step=4, budget=Budget())
    other = reconstruct_step(policy, given.rollouts).direction
    assert vectors.cosine(other, true_direction(run, 2)) < 0.999
    with pytest.raises(
        BatchError, match=r"completions_00004\.parquet: no rows of step 3, the next one; it has step 4"
    ):
        update_from_file(
            policy, run / "completions" / "completions_00004.parquet", step=None, budget=Budget()
        )
    with pytest.raises(BatchError, match="no file of step 9"):
        update_from_file(policy, run / "completions", step=9, budget=Budget())


@pytest.mark.slow
def test_the_second_update_on_a_batch_needs_the_log_probs_before_the_first(tmp_path: Path) -> None:
    """TRL's own second step, from the log and the log-probs of the checkpoint that sampled."""
    run = trained(tmp_path / "trl", num_iterations=2, epsilon=0.01)
    policy = load_checkpoint(run / "checkpoint-3", precision="float64")
    log = run / "completions" / "completions_00004.parquet"
    with pytest.raises(BatchError, match="the update 2 of 2 on its batch"):
        update_from_file(policy, log, step=None, budget=Budget())
    sampler = load_checkpoint(run / "checkpoint-2", precision="float64")
    first = update_from_file(
        sampler, run / "completions" / "completions_00003.parquet", step=None, budget=Budget()
    )
    rows = pq.read_table(log).to_pylist()
    assert [r["completion_ids"] for r in rows] == [list(ids) for ids in first.rollouts.response_token_ids]
    table = [
        {**r, "old_logprobs": old.tolist()} for r, old in zip(rows, first.rollouts.logprobs, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(table), tmp_path / "with_old.parquet")
    batch = update_from_file(policy, tmp_path / "with_old.parquet", step=None, budget=Budget()).rollouts
    assert vectors.cosine(reconstruct_step(policy, batch).direction, true_direction(run, 3)) >= 1 - 1e-6
    blind = reconstruct_step(policy, replace(batch, old_logprobs=None)).direction
    assert vectors.cosine(blind, true_direction(run, 3)) < 1 - 1e-5


def test_a_stage_knows_the_content_of_the_file(run: Path, tmp_path: Path) -> None:
    log = tmp_path / "log.parquet"
    table = pq.read_table(run / "completions" / "completions_00003.parquet")
    pq.write_table(table, log)
    command = ["measure", str(run / "checkpoint-2"), "--update", str(log), "--task", TASK]
    command += ["--out", str(tmp_path / "m"), f"loss.prompt_template={TEMPLATE}", "probe.num_prompts=4"]
    first = CliRunner().invoke(cli.app, [*command, "--stages", "rollouts,step"])
    assert first.exit_code == 0, first.output
    again = CliRunner().invoke(cli.app, [*command, "--stages", "rollouts"])
    assert "rollouts: done before" in again.output
    doubled = pa.array(2 * np.asarray(table.column("advantage")))
    place = table.column_names.index("advantage")
    pq.write_table(table.set_column(place, "advantage", doubled), log)
    again = CliRunner().invoke(cli.app, [*command, "--stages", "rollouts"])
    assert again.exit_code == 0, again.output
    assert "rollouts: stale, done again (update.file changed)" in again.output
    assert "stale now: step" in again.output
    assert not read_json(tmp_path / "m" / "summary.json")["update_advantage_difference"]["reliable"]


IM = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QUESTIONS = ("what is 3+8?", "and 11+5=16?")
ANSWERS = ("hello world 11", "why 12 </b> naïve", "16", "x1y2z3w4v5u6t7s8r9q0")
SCORES = (1.0, 0.0, 0.5, 0.25)


@pytest.fixture(scope="module")
def chatting() -> Policy:
    """A policy with a chat template, three steps old; a response of sixteen tokens is cut."""
    tokenizer = byte_level(chat=IM, special=["<|im_start|>", "<|im_end|>"], eos="<|im_end|>")
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = cases.model(vocab_size=len(tokenizer), **ids).to(torch.float64)
    settings = StepSettings(
        group_size=2, prompts_per_step=2, max_response_tokens=16, scale_rewards="group", max_grad_norm=0.0
    )
    return Policy(model, tokenizer, settings, cases.adamw_state(model), step=3)


@pytest.fixture(scope="module")
def sampled(chatting: Policy) -> list[dict[str, Any]]:
    """Four responses in tokens; the last one is cut."""
    tokenizer = chatting.tokenizer
    rows = []
    for i, answer in enumerate(ANSWERS):
        asked = [{"role": "user", "content": QUESTIONS[i // 2]}]
        text = tokenizer.apply_chat_template(asked, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
        rows.append(
            {
                "prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"],
                "response_token_ids": ids[:16] if i == 3 else [*ids, tokenizer.eos_token_id],
                "reward": SCORES[i],
            }
        )
    assert len(rows[3]["response_token_ids"]) == 16
    return rows


def read(policy: Policy, path: Path, **given: Any) -> GivenBatch:
    return update_from_file(policy, path, step=given.get("step"), budget=Budget())


def jsonl(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def ids_of(found: GivenBatch) -> list[tuple[list[int], list[int]]]:
    batch = found.rollouts
    pairs = zip(batch.prompt_token_ids, batch.response_token_ids, strict=True)
    return [(list(prompt), list(response)) for prompt, response in pairs]


def as_verl(policy: Policy, rows: Sequence[Mapping[str, Any]], step: int) -> list[dict[str, Any]]:
    """What verl's ``_log_rollout_data`` writes."""

    def text(ids: list[int]) -> str:
        return str(policy.tokenizer.decode(ids, skip_special_tokens=True))

    return [
        {
            "input": text(row["prompt_token_ids"]),
            "output": text(row["response_token_ids"]),
            "gts": "11",
            "score": row["reward"],
            "step": step,
            "acc": row["reward"] > 0.4,
        }
        for row in rows
    ]


def test_verls_dump_gives_prompts_their_special_tokens_and_responses_their_end_back(
    chatting: Policy, sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    rows = as_verl(chatting, sampled, 4)
    assert "<|im_start|>" not in rows[0]["input"]
    jsonl(tmp_path / "4.jsonl", rows)
    found = read(chatting, tmp_path)
    assert ids_of(found) == [(r["prompt_token_ids"], r["response_token_ids"]) for r in sampled]
    batch = found.rollouts
    assert batch.truncated.tolist() == [False, False, False, True]
    assert batch.correct.tolist() == [True, False, True, False]
    assert batch.rewards.tolist() == list(SCORES)
    assert batch.questions == (QUESTIONS[0], QUESTIONS[0], QUESTIONS[1], QUESTIONS[1])
    spread = np.array([0.5, -0.5, 0.125, -0.125]) / (np.std([[1, 0], [0.5, 0.25]], 1, ddof=1) + 1e-4).repeat(
        2
    )
    np.testing.assert_allclose(batch.advantages, spread, rtol=1e-12)
    assert any("scaled by group" in note for note in found.notes)
    jsonl(tmp_path / "8.jsonl", as_verl(chatting, sampled[::-1], 8))
    halved = replace(
        chatting, path=tmp_path / "global_step_7" / "actor", step=14
    )  # two updates on each batch
    assert read(halved, tmp_path).rollouts.rewards.tolist() == list(SCORES[::-1])


def test_every_layout_of_one_batch_is_one_batch(
    chatting: Policy, sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    """A table, slime's samples and prime-rl's, with token ids, masks and log-probs."""
    sampled = [dict(row) for row in sampled]
    for row in sampled:
        count = len(row["response_token_ids"])
        row["response_mask"] = [0 if k == 1 else 1 for k in range(count)]
        row["advantage"] = row["reward"] - 0.4
        row["old_logprobs"] = [-2.0 if k != 1 else None for k in range(count)]
    table = tmp_path / "table.parquet"
    pq.write_table(
        pa.Table.from_pylist([{**row, "prompt_id": i // 2} for i, row in enumerate(sampled)]), table
    )
    samples = [
        {
            "tokens": row["prompt_token_ids"] + row["response_token_ids"],
            "response_length": len(row["response_token_ids"]),
            "loss_mask": row["response_mask"],
            "old_logprobs": row["old_logprobs"],
            "advantage": row["advantage"],
            "reward": row["reward"],
            "group_index": i // 2,
            "status": "truncated" if i == 3 else "completed",
            "response": "in words",
        }
        for i, row in enumerate(sampled)
    ]
    torch.save({"rollout_id": 3, "samples": samples}, tmp_path / "3.pt")
    found = [
        read(chatting, path) for path in (table, tmp_path / "3.pt", jsonl(tmp_path / "t.jsonl", sampled))
    ]
    for one in found:
        assert ids_of(one) == [(r["prompt_token_ids"], r["response_token_ids"]) for r in sampled]
        batch = one.rollouts
        assert batch.response_masks is not None
        assert [mask.tolist() for mask in batch.response_masks] == [
            [k != 1 for k in range(len(row["response_token_ids"]))] for row in sampled
        ]
        assert batch.advantages == pytest.approx([0.6, -0.4, 0.1, -0.15])
        assert batch.truncated.tolist() == [False, False, False, True]
        assert batch.group_index.tolist() == [0, 0, 1, 1]
        assert batch.old_logprobs is not None
        assert batch.old_logprobs[0][:3].tolist() == [-2.0, 0.0, -2.0]
        np.testing.assert_array_equal(batch.logprobs[0], found[0].rollouts.logprobs[0])
        assert not one.figures["update_advantage_difference"].reliable


def test_prime_rls_rollouts(chatting: Policy, sampled: list[dict[str, Any]], tmp_path: Path) -> None:
    msgspec = pytest.importorskip("msgspec")
    samples = [
        [
            row["prompt_token_ids"],
            [False] * len(row["prompt_token_ids"]),
            row["response_token_ids"],
            [True] * len(row["response_token_ids"]),
            [-1.0] * len(row["response_token_ids"]),
            row["reward"] - 0.4,
        ]
        for row in sampled
    ]
    (tmp_path / "rollouts.bin").write_bytes(msgspec.msgpack.encode([samples, 1.0, 3]))
    found = read(chatting, tmp_path / "rollouts.bin")
    assert ids_of(found) == [(r["prompt_token_ids"], r["response_token_ids"]) for r in sampled]
    assert found.rollouts.advantages == pytest.approx([0.6, -0.4, 0.1, -0.15])
    assert found.rollouts.old_logprobs is not None


def test_turns_of_a_conversation_are_the_policys_and_the_tools(chatting: Policy, tmp_path: Path) -> None:
    """TRL's messages with a tool call, against ids put together by hand."""
    tokenizer = chatting.tokenizer
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    said = [
        {"role": "assistant", "content": "3", "tool_calls": call},
        {"role": "tool", "content": "12", "name": "f"},
        {"role": "assistant", "content": "so 12"},
    ]
    asked = [{"role": "user", "content": QUESTIONS[0]}]
    rows = [
        {"step": 4, "prompt": asked, "completion": said, "score": reward, "advantage": reward - 0.5}
        for reward in (0.0, 1.0)
    ]
    longer = replace(
        chatting, settings=replace(chatting.settings, prompts_per_step=1, max_response_tokens=99)
    )
    found = read(longer, jsonl(tmp_path / "t.jsonl", rows))

    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    first = ids("3" + json.dumps(call, separators=(", ", ": ")) + "<|im_end|>")
    between = ids("\n<|im_start|>tool\n12<|im_end|>\n<|im_start|>assistant\n")
    last = ids("so 12<|im_end|>")
    assert ids_of(found)[0][1] == [*first, *between, *last]
    assert found.rollouts.response_masks is not None
    mask = [True] * len(first) + [False] * len(between) + [True] * len(last)
    assert found.rollouts.response_masks[0].tolist() == mask
    assert not found.rollouts.truncated.any()


def test_logged_log_probs_are_compared_and_old_ones_enter_the_ratio(
    chatting: Policy, sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    plain = [{k: row[k] for k in ("prompt_token_ids", "response_token_ids", "reward")} for row in sampled]
    on = read(chatting, jsonl(tmp_path / "a.jsonl", plain)).rollouts
    near = [{**row, "logprobs": (v + 0.01).tolist()} for row, v in zip(plain, on.logprobs, strict=True)]
    near[0]["logprobs"][0] = None  # as vLLM has it now and then
    figures = read(chatting, jsonl(tmp_path / "b.jsonl", near)).figures
    assert figures["update_logprob_difference"].value == pytest.approx(0.01)
    assert figures["update_logprob_difference"].reliable
    assert figures["update_logprob_far"].value == 0
    far = [{**row, "logprobs": (v - 0.3).tolist()} for row, v in zip(plain, on.logprobs, strict=True)]
    figures = read(chatting, jsonl(tmp_path / "c.jsonl", far)).figures
    assert "sampled by another policy" in figures["update_logprob_difference"].reason
    assert figures["update_logprob_far"].value == 1
    rng = np.random.default_rng(0)
    old = tuple(v + 0.3 * rng.standard_normal(len(v)) for v in on.logprobs)
    second = [{**row, "old_logprobs": o.tolist()} for row, o in zip(plain, old, strict=True)]
    given = read(chatting, jsonl(tmp_path / "d.jsonl", second)).rollouts
    assert given.sampler_logprobs is None
    found = reconstruct_step(chatting, given)
    wanted = reconstruct_step(chatting, replace(on, logprobs=old), off_policy=True)
    for one, other in zip(found.token_weights, wanted.token_weights, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-12)
    assert any(
        (a != b).any()
        for a, b in zip(found.token_weights, reconstruct_step(chatting, on).token_weights, strict=True)
    )


def test_text_beside_ids_is_checked_and_said(
    chatting: Policy, sampled: list[dict[str, Any]], tmp_path: Path
) -> None:
    """Ids that are not the tokenizer's own for the text are used, and counted."""
    tokenizer = chatting.tokenizer
    rows = [
        {
            "prompt_token_ids": row["prompt_token_ids"],
            "response_token_ids": row["response_token_ids"],
            "response": tokenizer.decode(row["response_token_ids"], skip_special_tokens=True),
            "reward": row["reward"],
        }
        for row in sampled
    ]
    letters = [tokenizer.convert_tokens_to_ids(c) for c in "hello"]
    rest = tokenizer(" world 11", add_special_tokens=False)["input_ids"]
    rows[0]["response_token_ids"] = [*letters, *rest, tokenizer.eos_token_id]
    assert rows[0]["response_token_ids"] != sampled[0]["response_token_ids"]
    found = read(chatting, jsonl(tmp_path / "t.jsonl", rows))
    assert ids_of(found)[0][1] == rows[0]["response_token_ids"]
    assert any(note.startswith("1 of 4 texts do not give") for note in found.notes)
    rows[1]["response"] = "something else"
    with pytest.raises(BatchError, match="row 1: the response's text is not what its token ids say"):
        read(chatting, jsonl(tmp_path / "t.jsonl", rows))


ONE = {"prompt_token_ids": [5, 6], "response_token_ids": [7, 8], "reward": 1.0}
REFUSED: dict[str, tuple[list[dict[str, Any]], str]] = {
    "no response": ([{"prompt_token_ids": [5], "reward": 1.0}], "neither ids nor text"),
    "padding": ([ONE | {"prompt_token_ids": [0, 0, 5]}], "begin with the padding token 0"),
    "another model": ([ONE | {"response_token_ids": [7, 9999]}], "token 9999, and the model knows"),
    "mask": ([ONE | {"response_mask": [1, 1, 0]}], "response_mask has 3 values for 2 response tokens"),
    "no number": ([ONE | {"old_logprobs": [-1.0, None]}], "old_logprobs of token 1 is None"),
    "half of it": ([ONE, ONE | {"advantage": 1.0}], "row 0: no advantage, and other rows have one"),
    "no reward": ([ONE | {"reward": None}], "neither rewards nor advantages"),
    "too long": ([{"prompt": "1", "response": "x" * 40, "reward": 1.0}], "the run allows 16"),
    "not its text": ([{"prompt": "1", "response": "a</s>b", "reward": 1.0}], "cannot be tokenized back"),
    "no step": ([ONE | {"step": 7}], "no rows of step 4, the next one; it has step 7"),
    "many steps": ([{"input": "a", "output": "b", "score": 1.0, "step": 4}] * 8, "8 responses were sampled"),
    "template": (
        [{"input": "strange", "output": "b", "score": 1.0, "step": 4}] * 4,
        "is not what the chat template makes of one user message",
    ),
    "bool ids": ([ONE | {"response_token_ids": [True]}], "expected a list of token ids"),
    "nan": ([ONE | {"reward": float("nan")}], "expected a finite number"),
    "nothing": ([], "holds no rows"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_batch_of_the_step_is_refused(chatting: Policy, tmp_path: Path, name: str) -> None:
    rows, message = REFUSED[name]
    with pytest.raises(BatchError) as caught:
        read(chatting, jsonl(tmp_path / "rows.jsonl", rows))
    assert message in str(caught.value)
    assert str(tmp_path) in str(caught.value)


def test_hostile_and_broken_files_are_refused(chatting: Policy, tmp_path: Path) -> None:
    for name, content in (
        ("a.parquet", b"PAR1"),
        ("a.jsonl", b"[1]\n"),
        ("a.jsonl", b"{\n"),
        ("a.txt", b"x"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BatchError):
            read(chatting, tmp_path / name)
    torch.save({"samples": [{"tokens": Path("x")}]}, tmp_path / "a.pt")
    with pytest.raises(CheckpointError, match=r"a\.pt"):
        read(chatting, tmp_path / "a.pt")
