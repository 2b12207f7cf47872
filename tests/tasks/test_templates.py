from __future__ import annotations

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from stepscope.errors import TaskError
from stepscope.tasks.templates import load_template

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer(chat_template: str | None) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")))
    made.chat_template = chat_template
    return made


def test_short_is_the_question_and_an_equals_sign() -> None:
    template = load_template("short")
    assert template.render("1+2", tokenizer(CHAT)) == "1+2="
    assert template.lay_out("1+2=3", "3") == "<think>1+2=3</think><answer>3</answer>"


def test_r1_without_a_chat_template_is_the_published_text() -> None:
    prompt = load_template("r1").render("Why {question}?", tokenizer(None))
    assert prompt.startswith("A conversation between User and Assistant.")
    assert prompt.endswith("User: Why {question}? Assistant:")
    assert prompt == load_template("r1-text").render("Why {question}?", tokenizer(CHAT))


def test_r1_uses_the_chat_template() -> None:
    prompt = load_template("r1").render("Why?", tokenizer(CHAT))
    assert prompt.startswith("<|user|>Why?\n")
    assert prompt.endswith("<|end|><|assistant|>")
    assert "<answer>" in prompt


def test_think_of_the_chat_template_is_left_to_the_response() -> None:
    opening = CHAT.replace("<|assistant|>", "<|assistant|><think>\n")
    assert load_template("r1").render("Why?", tokenizer(opening)).endswith("<|assistant|>")
    asked = load_template("chat:{question} Think.\n<think>")
    assert asked.opens_think
    for chat in (opening, CHAT):
        assert asked.render("Why?", tokenizer(chat)) == "<|user|>Why? Think.<|end|><|assistant|><think>"


def test_own_text_stands_as_it_is() -> None:
    template = load_template("Q: {question}\nA: <think>\n")
    assert template.render("1+2", tokenizer(CHAT)) == "Q: 1+2\nA: <think>\n"
    assert template.opens_think
    assert template.lay_out("so", "3") == "\nso\n</think>\n<answer>3</answer>"


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(TaskError, match="no chat template"):
        load_template("chat:{question}").render("Why?", tokenizer(None))


def test_unknown_name_is_refused() -> None:
    with pytest.raises(TaskError, match=r"unknown prompt template 'shrot'.*did you mean 'short'"):
        load_template("shrot")
