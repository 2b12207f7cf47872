"""The run's own prompts and rewards: what is read, asked and graded, and what is refused."""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from made_tokenizers import CHAT, byte_level
from stepscope.errors import ConfigError, RewardError, TaskError
from stepscope.own_code import own_function, own_source
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.formats.wording import load_wording
from stepscope.tasks.load import TemplatedTask, load_prompts, scored
from stepscope.tasks.own_reward import OwnReward
from stepscope.tasks.problem import Chat, Problem, Written

ROWS = [
    {"prompt": "2+3=", "answer": 5, "level": "easy", "tests": [1, 2.5]},
    {"prompt": "20+30=", "answer": "50", "level": None},
]
CHATS = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": 5} for row in ROWS]


def lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def beside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], None]]:
    """Writes the module ``rewards`` into the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> None:
        sys.modules.pop("rewards", None)
        (tmp_path / "rewards.py").write_text(text)

    yield write
    sys.modules.pop("rewards", None)


def written(task: TemplatedTask, responses: list[str], tokenizer: Any) -> list[Written]:
    """Responses to the task's problems, one each."""
    found = []
    for problem, text in zip(task.problems("train"), responses, strict=True):
        asked = task.prompt(problem, tokenizer)
        prompt = encode_prompt(asked, tokenizer)
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        found.append(Written(problem, asked, prompt.text, prompt.token_ids, text, ids, False))
    return found


@pytest.mark.parametrize("ending", ["jsonl", "parquet", "csv"])
def test_a_file_gives_prompts_and_columns_as_data_sets_do(tmp_path: Path, ending: str) -> None:
    file = tmp_path / f"rows.{ending}"
    flat = [{k: v for k, v in row.items() if k != "tests"} for row in ROWS]
    if ending == "jsonl":
        lines(file, ROWS)
    elif ending == "parquet":
        pd.DataFrame(flat).astype({"answer": str}).to_parquet(file)
    else:
        pd.DataFrame(flat).to_csv(file, index=False)
    task = load_prompts(file)
    problems = task.problems("train")
    assert [p.question for p in problems] == ["2+3=", "20+30="]
    assert task.problems("test") == problems
    assert task.shared == frozenset()
    assert [p.columns["level"] for p in problems] == ["easy", None]
    expected: dict[str, Any] = {"jsonl": [5, "50"], "parquet": ["5", "50"], "csv": [5, 50]}
    assert [p.columns["answer"] for p in problems] == expected[ending]
    assert [p.answer for p in problems] == ["5", "50"]
    if ending == "jsonl":
        assert [p.columns["tests"] for p in problems] == [[1, 2.5], None]
    assert [task.score(problems[0], f"<answer>{a}</answer>").reward for a in (5, 6)] == [1.0, 0.0]
    before = task.digest
    file.write_bytes(file.read_bytes().replace(b"easy", b"hard"))
    assert load_prompts(file).digest != before or ending == "parquet"


def test_a_split_column_parts_the_rows(tmp_path: Path) -> None:
    rows = [row | {"split": split} for row, split in zip(ROWS, ("test", "train"), strict=True)]
    task = load_prompts(lines(tmp_path / "rows.jsonl", rows))
    assert [p.question for p in task.problems("train")] == ["20+30="]
    assert [p.question for p in task.problems("test")] == ["2+3="]
    rows[0]["split"] = "dev"
    with pytest.raises(TaskError, match=r"rows.jsonl line 1: split must be train or test, got 'dev'"):
        load_prompts(lines(tmp_path / "rows.jsonl", rows))


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "2+3="}], "no field 'prompt'"),
        ([{"prompt": 5}], "prompt must be a text that is not empty, got 5"),
        ([{"prompt": " "}], "prompt must be a text that is not empty"),
        ([{"prompt": "a", "answer": 1}, {"prompt": CHATS[0]["prompt"]}], "in the first row it is a text"),
        ([{"prompt": [{"role": "user"}]}], "message 1 of the prompt is .* expected a role and a content"),
        ([{"prompt": [{"role": "user", "content": [{"type": "image"}]}]}], "images and other parts cannot"),
        ([{"prompt": json.dumps(CHATS[0]["prompt"])}], "messages written out as a text"),
        ([{"prompt": "a", "completions": 1}], "a column is called completions"),
        ([{"prompt": "a", "answer": 1}, {"prompt": "b"}], "rows.jsonl line 2: no answer, .*--reward"),
        ([], "the file holds no rows"),
    ],
)
def test_rows_that_cannot_be_asked_are_named(tmp_path: Path, rows: list[Any], message: str) -> None:
    with pytest.raises((TaskError, ConfigError), match=message):
        load_prompts(lines(tmp_path / "rows.jsonl", rows))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    for name, content, message in (
        ("gone.jsonl", None, "no such file"),
        ("rows.txt", b"2+3=", "the name ends in .txt"),
        ("rows.parquet", b"PAR1 broken", "cannot be read as parquet"),
        ("rows.csv", b'prompt\n"2+3=', "cannot be read as CSV"),
        ("rows.jsonl", b"[1]", "expected a JSON object"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(TaskError, match=message):
            load_prompts(tmp_path / name)


def test_templates_go_around_texts_and_chat_templates_render_messages(tmp_path: Path) -> None:
    tokenizer = byte_level(chat=CHAT)
    texts = lines(tmp_path / "texts.jsonl", ROWS)
    chats = lines(tmp_path / "chats.jsonl", CHATS)
    plain = tmp_path / "plain.txt"
    plain.write_text("Q: {prompt}\nA:\n")
    jinja = tmp_path / "own.jinja"
    jinja.write_text("{% for m in messages %}<{{ m['content'] }}>{% endfor %}{{ mood }}")

    def asked(file: Path, template: str | None, **given: Any) -> str:
        task = load_prompts(file, template=template, **given)
        return encode_prompt(task.prompt(task.problems("train")[0], tokenizer), tokenizer).text

    own = tokenizer.apply_chat_template(CHATS[0]["prompt"], tokenize=False, add_generation_prompt=True)
    assert asked(texts, None) == "2+3="
    assert asked(texts, str(plain)) == asked(texts, "Q: {prompt}\nA:") == "Q: 2+3=\nA:"
    assert asked(texts, "chat:{prompt}") == asked(chats, None) == own
    assert asked(chats, str(jinja), chat_template_kwargs={"mood": "calm"}) == "<2+3=>calm"
    assert tokenizer.chat_template == CHAT
    assert "put the final answer" in asked(texts, "boxed")
    for file, template, message in (
        (chats, "Q: {prompt}", "they are chats, and such a template goes around a text"),
        (texts, str(jinja), "they are texts, to which neither TRL nor stepscope applies a chat template"),
        (texts, "Q:", r"there is no such file, and it is no text with \{prompt\}"),
        (texts, str(texts), r"neither \{prompt\}.*nor jinja"),
    ):
        with pytest.raises(TaskError, match=message):
            load_prompts(file, template=template)
    assert load_wording(str(plain)).digest == load_wording("Q: {prompt}\nA:").digest
    assert load_wording(str(plain)).digest != load_wording(str(jinja)).digest


def test_a_function_grades_the_batch_as_trl_hands_it(tmp_path: Path, beside: Callable[[str], None]) -> None:
    beside(
        "seen = []\n"
        "def reward(prompts, completions, answer, **kwargs):\n"
        "    seen.append((prompts, completions, answer, kwargs))\n"
        "    kwargs['log_metric']('x', 1.0)\n"
        "    found = [float(str(a) in c) for c, a in zip(completions, answer)]\n"
        "    kwargs['level'].clear()\n"
        "    return found\n"
        "async def later(completions, **_):\n"
        "    return [len(c) / 10 for c in completions]\n"
        "def named(completions):\n"
        "    import numpy\n"
        "    return numpy.array([2.0] * len(completions))\n"
    )
    tokenizer = byte_level()
    file = lines(tmp_path / "rows.jsonl", ROWS)
    task = load_prompts(file, reward="rewards:reward")
    batch = written(task, ["it is 5", "six"], tokenizer)
    assert [(s.reward, s.correct) for s in scored(task, batch, tokenizer)] == [(1.0, True), (0.0, False)]
    scored(task, batch, tokenizer)
    (prompts, completions, answer, more), again = sys.modules["rewards"].seen
    assert (prompts, completions, answer) == (["2+3=", "20+30="], ["it is 5", "six"], [5, "50"])
    assert set(more) == {"level", "tests", "completion_ids", "trainer_state", "log_extra", "log_metric"}
    assert more["completion_ids"] == [list(one.token_ids) for one in batch]
    assert again[:3] == (prompts, completions, answer)
    for name, expected in (("later", [0.7, 0.3]), ("named", [2.0, 2.0])):
        other = load_prompts(file, reward=f"rewards:{name}")
        assert [s.reward for s in scored(other, batch, tokenizer)] == pytest.approx(expected)

    async def in_a_notebook() -> list[float]:
        later = load_prompts(file, reward="rewards:later")
        return [s.reward for s in scored(later, batch, tokenizer)]

    assert asyncio.run(in_a_notebook()) == pytest.approx([0.7, 0.3])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 1.0", "it returned 1.0, expected a list of 2 numbers"),
        ("return None", "it returned None, expected a list"),
        ("return {0: 1.0, 1: 2.0}", "it returned a dict, expected a list"),
        ("return [1.0]", "it returned 1 values for 2 responses"),
        ("return [1.0, float('nan')]", "it returned nan for a response, expected a finite number"),
        ("return [None, 1.0]", "it returned None for a response"),
        ("return ['1', '2']", "it returned '1' for a response"),
        ("return [float('inf'), 1.0]", "it returned inf for a response"),
        (
            "raise KeyError('target')",
            "it raised KeyError at rewards.py:2: 'target' when it was called with 2",
        ),
    ],
)
def test_what_is_no_reward_is_refused_with_a_response(
    tmp_path: Path, beside: Callable[[str], None], body: str, message: str
) -> None:
    beside(f"def reward(prompts, completions, **columns):\n    {body}\n")
    tokenizer = byte_level()
    task = load_prompts(lines(tmp_path / "rows.jsonl", ROWS), reward="rewards:reward")
    batch = written(task, ["it is 5", "six"], tokenizer)
    with pytest.raises(RewardError, match=f"reward rewards:reward: {message}") as caught:
        scored(task, batch, tokenizer)
    assert "was answered" in str(caught.value)
    assert caught.value.example.prompt in ("2+3=", "20+30=")


def test_names_without_a_function_are_refused(beside: Callable[[str], None]) -> None:
    beside("import not_there_at_all\n")
    for name, message in (
        ("nowhere:reward", "reward: no module 'nowhere' to take 'reward' from; run beside nowhere.py"),
        ("rewards.py:reward", "names a file; give its module, rewards:reward"),
        ("rewards:reward", "rewards cannot be imported: ModuleNotFoundError at rewards.py:1: .*not_there"),
    ):
        with pytest.raises(ConfigError, match=message):
            own_function(name, "reward")
    beside("def reward(:\n")
    with pytest.raises(ConfigError, match=r"cannot be imported: SyntaxError at rewards\.py:1"):
        own_function("rewards:reward", "reward")
    beside("reward = 3\n")
    with pytest.raises(ConfigError, match="rewards has no function 'reward'"):
        own_function("rewards:reward", "reward")


def test_the_source_of_a_function_is_known_without_running_it(
    tmp_path: Path, beside: Callable[[str], None]
) -> None:
    beside("raise SystemExit('it ran')\n")
    found = own_source("rewards:reward")
    assert found["file"] == str(tmp_path / "rewards.py")
    assert len(found["sha256"]) == 64
    assert own_source("nowhere:reward")["sha256"] == ""


def test_rewards_of_trl_are_ours(tmp_path: Path) -> None:
    """Of a real GRPO step: the function is called with the same arguments, but for what is the trainer's."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    for rows, chat in ((ROWS, None), (CHATS, CHAT)):
        calls: list[dict[str, Any]] = []

        def reward(calls: list[dict[str, Any]] = calls, **given: Any) -> list[float]:
            calls.append(given)
            return [float(len(given["completion_ids"][i]) + i) for i in range(len(given["prompts"]))]

        tokenizer = byte_level(chat=chat)
        same = [{**row, "answer": str(row["answer"]), "level": "easy"} for row in rows]
        same = [{k: v for k, v in row.items() if k != "tests"} for row in same]
        size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size))
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            train_dataset=Dataset.from_list(same),
            args=GRPOConfig(
                output_dir=str(tmp_path / "out"), per_device_train_batch_size=4, num_generations=2,
                max_completion_length=5, max_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
                save_strategy="no",
            ),
        )  # fmt: skip
        trainer.train()
        (theirs,) = calls
        (batch,) = trainer._buffered_inputs
        task = load_prompts(lines(tmp_path / "same.jsonl", same))
        by_text = {problem.question: problem for problem in task.problems("train")}
        ours: list[Written] = []
        for place, prompt in enumerate(theirs["prompts"]):
            problem: Problem = by_text[prompt if isinstance(prompt, str) else prompt[0]["content"]]
            asked = task.prompt(problem, tokenizer)
            assert isinstance(asked, Chat if chat else str)
            encoded = encode_prompt(asked, tokenizer)
            mask = batch["prompt_mask"][place].bool()
            assert tuple(batch["prompt_ids"][place][mask].tolist()) in {
                encode_prompt(task.prompt(p, tokenizer), tokenizer).token_ids for p in by_text.values()
            }
            ids = theirs["completion_ids"][place]
            ours.append(Written(problem, asked, encoded.text, encoded.token_ids, "", ids, False))
        graded = OwnReward("trl:reward", reward).grade(ours, tokenizer)
        mine = calls[1]
        assert set(mine) == set(theirs)
        own = {"trainer_state", "log_extra", "log_metric"}
        assert {k: v for k, v in mine.items() if k not in own} == {
            k: v for k, v in theirs.items() if k not in own
        }
        assert all(math.isfinite(x) for x in graded)
        assert np.allclose(graded, [len(ids) + i for i, ids in enumerate(theirs["completion_ids"])])
