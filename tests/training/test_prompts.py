"""Prompts are TRL's: on a real GRPO step, and in a training of our own against its measurement."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from digits import digit_config, log_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import GRPOConfig, GRPOTrainer
from typer.testing import CliRunner

import cases
from made_tokenizers import BOS, CHAT, EOS, TAGS, byte_level
from stepscope import cli
from stepscope.errors import CheckpointError, ConfigError
from stepscope.evaluation import evaluate
from stepscope.pipeline.inputs.logged_prompts import prompt_conflict
from stepscope.pipeline.inputs.tasks import open_task
from stepscope.policy.check.inspection import inspect_checkpoint
from stepscope.policy.checkpoint.load import load_checkpoint, read_settings
from stepscope.policy.rollouts import sample_rollouts
from stepscope.tasks import load_task
from stepscope.tasks.formats.prompts import encode_prompt
from stepscope.tasks.problem import Chat
from stepscope.training import train
from stepscope.training.rl import OnPolicyTrainer, reinforce
from stepscope.training.setup.start import reload_model
from stepscope.training.sft import demonstration_rows

QUESTIONS = ("3+8=", "11 and 5?", "so, the sum", "naïve 😀")
ADDS_BOS, ADDS_BOTH = f"{BOS} $A", f"{BOS} $A {EOS}"
RENDERS_BOS = (
    "{{ bos_token }}" + CHAT + "{% if thinking is defined and not thinking %}<think>\n\n</think>{% endif %}"
)


def model_of(tokenizer: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=128,
            eos_token_id=tokenizer.eos_token_id,
            bos_token_id=tokenizer.bos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def trained_on(tokenizer: Any, prompts: list[Any], out: Path, **arguments: Any) -> set[tuple[int, ...]]:
    """The prompt ids of a GRPO step that TRL takes on these prompts."""
    trainer = GRPOTrainer(
        model=model_of(tokenizer),
        processing_class=tokenizer,
        reward_funcs=lambda completions, **_: [float(i) for i in range(len(completions))],
        train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
        args=GRPOConfig(
            output_dir=str(out),
            per_device_train_batch_size=2 * len(prompts),
            num_generations=2,
            max_completion_length=2,
            max_steps=1,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
            **{"save_strategy": "no"} | arguments,
        ),
    )
    trainer.train()
    (batch,) = trainer._buffered_inputs
    masks = batch["prompt_mask"].bool()
    return {tuple(ids[mask].tolist()) for ids, mask in zip(batch["prompt_ids"], masks, strict=True)}


@pytest.mark.parametrize(
    ("adds", "chat", "variables"),
    [
        (ADDS_BOS, None, {}),
        (ADDS_BOTH, None, {}),
        (ADDS_BOS, RENDERS_BOS, {}),
        (ADDS_BOTH, RENDERS_BOS, {"thinking": False}),
    ],
)
def test_ids_are_those_of_a_real_step(adds, chat, variables, tmp_path) -> None:
    tokenizer = byte_level(adds=adds, chat=chat)
    if chat:
        system = {"role": "system", "content": "Be brief."}
        prompts: list[Any] = [[system, {"role": "user", "content": q}] for q in QUESTIONS]
        asked = [Chat(messages, variables) for messages in prompts]
    else:
        prompts = asked = list(QUESTIONS)
    theirs = trained_on(tokenizer, prompts, tmp_path, chat_template_kwargs=variables or None)
    ours = {encode_prompt(prompt, tokenizer).token_ids for prompt in asked}
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert all(ids.count(bos) == 1 and ids[0] == bos and eos not in ids for ids in ours)
    if chat is None and adds == ADDS_BOTH:
        assert {(*ids, eos) for ids in ours} == theirs, "but for the end that TRL puts after a prompt"
    else:
        assert ours == theirs


def test_a_text_that_brings_its_bos_gets_no_second() -> None:
    tokenizer = byte_level(adds=ADDS_BOTH)
    assert encode_prompt(BOS + "hi", tokenizer).token_ids == encode_prompt("hi", tokenizer).token_ids


def test_training_asks_what_measuring_asks(tmp_path, monkeypatch) -> None:
    """A template that renders a BOS, a tokenizer that adds BOS and EOS, a prefill: the same ids."""
    tokenizer = byte_level(adds=ADDS_BOTH, chat=RENDERS_BOS)
    seen: set[tuple[int, ...]] = set()
    generate = OnPolicyTrainer._generate_single_turn

    def watched(self: Any, prompt_ids: list[list[int]], *rest: Any) -> Any:
        seen.update(map(tuple, prompt_ids))
        return generate(self, prompt_ids, *rest)

    monkeypatch.setattr(OnPolicyTrainer, "_generate_single_turn", watched)
    options = {"template": "chat:{question}", "system_prompt": "Be brief.", "prefill": "<think>\n"}
    config = digit_config(steps=1, save_every=1).model_copy(update=options)
    task = load_task("arithmetic:terms=2,digits=1,ops=+,train=4", **options)
    reinforce(config, model_of(tokenizer), tokenizer, task, tmp_path, resume=None)
    policy = load_checkpoint(tmp_path / "checkpoints" / "step-1")
    assert policy.settings.prefill == "<think>\n"
    assert policy.settings.system_prompt == "Be brief."
    rollouts = sample_rollouts(policy, open_task(task.spec, policy), num_prompts=4, group_size=1, seed=0)
    assert set(rollouts.prompt_token_ids) == seen
    assert len(seen) == 4
    (row, *_) = demonstration_rows(task, task.problems("train")[:1], tokenizer)
    (start, *_) = [i for i, label in enumerate(row["labels"]) if label != -100]
    assert tuple(row["input_ids"][:start]) in seen
    assert tokenizer.decode(row["input_ids"][:start]).endswith("<|assistant|><think>\n")


def test_tags_that_are_special_tokens_change_nothing(small_run, tmp_path) -> None:
    """One policy with its tags as ordinary and as special tokens: the same verdicts and training."""
    base = cases.start_from(small_run, tmp_path / "run") / "base"
    special = AutoTokenizer.from_pretrained(base)
    special.add_special_tokens({"additional_special_tokens": list(TAGS)})
    special.save_pretrained(base)
    (base / "manifest.json").unlink()  # the change is made on purpose
    found = []
    for folder, tokenizer in ((small_run, None), (tmp_path / "run", special)):
        policy = load_checkpoint(small_run / "checkpoints" / "step-4")
        policy = policy if tokenizer is None else replace(policy, tokenizer=tokenizer)
        task = open_task(None, policy)
        found.append(evaluate(policy, task, num_prompts=8, samples_per_prompt=16, ks=[1], seed=0))
        rollouts = sample_rollouts(policy, task, num_prompts=8, group_size=4, seed=0)
        assert any("<answer>" in text for text in rollouts.responses)
        if tokenizer is not None:
            last = train(cases.training(), folder, resume=True)
            assert [e["reward"] for e in log_of(last)] == [
                e["reward"] for e in log_of(small_run / "checkpoints" / "step-4")
            ]
    ordinary, as_special = found
    assert ordinary.pass_at[1][0] == as_special.pass_at[1][0] > 0
    assert ordinary.format_rate == as_special.format_rate > 0


def test_a_tokenizer_without_an_end_is_refused_in_training_and_measured(small_run, tmp_path) -> None:
    base = cases.start_from(small_run, tmp_path / "run") / "base"
    config = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(json.dumps(config | {"eos_token": None}))
    with pytest.raises(
        ConfigError, match=r"no end-of-sequence token, so no response would ever end; set eos_token"
    ):
        reload_model(str(base), dtype="float32")
    policy = load_checkpoint(small_run / "checkpoints" / "step-4")
    policy.model.generation_config.eos_token_id = None
    endless = replace(policy, tokenizer=AutoTokenizer.from_pretrained(base))
    rollouts = sample_rollouts(endless, open_task(None, policy), num_prompts=4, group_size=2, seed=0)
    assert rollouts.truncated.all()
    assert set(rollouts.num_tokens.tolist()) == {policy.settings.max_response_tokens}


SYSTEM = {"role": "system", "content": "Be brief."}
LOGS = {
    "text": (
        None,
        lambda question: f"Q: {question}\nA:",
        {"prompt_template": "Q: {question}\nA:"},
        """'loss.prompt_template="Q: {question}\\nA:"'""",
    ),
    "messages": (
        RENDERS_BOS,
        lambda question: [SYSTEM, {"role": "user", "content": f"Solve {question}"}],
        {"prompt_template": "chat:Solve {question}", "system_prompt": "Be brief."},
        "'loss.prompt_template=chat:Solve {question}' 'loss.system_prompt=Be brief.'",
    ),
}


@pytest.mark.parametrize("adds", [ADDS_BOS, ADDS_BOTH])
def test_a_run_whose_tokenizer_ends_every_text_is_told_of(adds, tmp_path) -> None:
    tokenizer = byte_level(adds=adds)
    trained_on(tokenizer, list(QUESTIONS), tmp_path, save_strategy="steps", save_steps=1)
    warned = [f.what for f in inspect_checkpoint(tmp_path / "checkpoint-1") if f.level == "warn"]
    assert any("after every text" in what for what in warned) is (adds == ADDS_BOTH)


@pytest.mark.parametrize("kind", LOGS)
def test_a_measurement_that_asks_otherwise_than_the_log_of_the_run_is_refused(kind, tmp_path) -> None:
    chat, ask, settings, cure = LOGS[kind]
    task = "arithmetic:terms=2,digits=1,ops=+,train=6"
    prompts = [ask(problem.question) for problem in load_task(task).problems("train")]
    tokenizer = byte_level(adds=ADDS_BOS, chat=chat)
    variables = {"thinking": False} if chat else None
    kept = {"log_completions": True, "logging_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trained_on(tokenizer, prompts, tmp_path, chat_template_kwargs=variables, **kept)
    checkpoint = tmp_path / "checkpoint-1"
    assert list((tmp_path / "completions").glob("*.parquet"))
    assert read_settings(checkpoint).chat_template_kwargs == variables
    command = ["measure", str(checkpoint), "--task", task, "--out", str(tmp_path / "m")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 2
    assert not (tmp_path / "m").exists()
    message = " ".join(result.stderr.split())
    assert "6 of 6 logged prompts differ so" in message
    assert cure in message

    def conflict(spec: str, **loss: Any) -> str | None:
        policy = load_checkpoint(checkpoint, settings=read_settings(checkpoint, overrides=loss))
        return prompt_conflict(policy, open_task(spec, policy))

    assert conflict(task, **settings) is None
    assert conflict("arithmetic:terms=4,digits=3,train=6") is None, "nothing is claimed of another task"
    (log,) = (tmp_path / "completions").iterdir()
    log.write_bytes(log.read_bytes()[:100])
    with pytest.raises(CheckpointError, match=r"log of prompts cannot be read"):
        conflict(task)
