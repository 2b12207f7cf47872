from __future__ import annotations

import pytest

from made_tokenizers import CHAT, byte_level
from stepscope.errors import TaskError
from stepscope.tasks.formats import prompts
from stepscope.tasks.formats.prompts import encode_prompt, render_chat
from stepscope.tasks.formats.templates import Template, load_template
from stepscope.tasks.load import asked_through, load_task
from stepscope.tasks.problem import Chat

OPENING = CHAT.replace("<|assistant|>", "<|assistant|><think>\n")
STRICT = (
    "{% if messages[0].role != 'system' %}{{ raise_exception('System message first') }}{% endif %}" + CHAT
)
MUTE = CHAT.replace("messages %}", "messages if m.role != 'system' %}")
SWITCH = CHAT.replace(
    "<|assistant|>",
    "<|assistant|>{% if thinking is defined and not thinking %}<think>\n\n</think>\n\n{% endif %}",
)
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


def text(template: Template, question: str, chat: str | None) -> str:
    return encode_prompt(template.ask(question, byte_level(chat=chat)), byte_level(chat=chat)).text


def test_short_is_the_question_and_an_equals_sign() -> None:
    template = load_template("short")
    assert text(template, "1+2", CHAT) == "1+2="
    assert template.compact


def test_r1_without_a_chat_template_is_the_published_text() -> None:
    prompt = text(load_template("r1"), "Why {question}?", None)
    assert prompt.startswith("A conversation between User and Assistant.")
    assert prompt.endswith("User: Why {question}? Assistant:")
    assert prompt == text(load_template("r1-text"), "Why {question}?", CHAT)


def test_r1_uses_the_chat_template() -> None:
    prompt = text(load_template("r1"), "Why?", CHAT)
    assert prompt.startswith("<|user|>Why?\n")
    assert prompt.endswith("<|end|><|assistant|>")
    assert "<answer>" in prompt


@pytest.mark.parametrize(
    ("chat", "options", "opening"),
    [
        (CHAT, {}, ""),
        (OPENING, {}, "<think>\n"),
        (CHAT, {"prefill": "<think>\n"}, "<think>\n"),
        (SWITCH, {}, ""),
        (SWITCH, {"chat_template_kwargs": {"thinking": False}}, "<think>\n\n</think>\n\n"),
    ],
)
def test_a_response_goes_on_from_the_think_block_of_the_prompt(chat, options, opening) -> None:
    tokenizer = byte_level(chat=chat)
    task = load_task("arithmetic", template="chat:{question}", **options)
    problem = task.problems("train")[0]
    bound = asked_through(task, tokenizer)
    asked = encode_prompt(bound.prompt(problem, tokenizer), tokenizer)
    assert asked.text == "<|user|>3+8+5<|end|><|assistant|>" + opening
    whole = "<think>3+8=11;11+5=16</think>\n<answer>16</answer>"
    response = whole.removeprefix(opening.rstrip()) if "</think>" not in opening else "<answer>16</answer>"
    score = bound.score(problem, response)
    assert score.correct
    assert score.formatted
    shown = bound.demonstration(problem)
    assert bound.score(problem, shown).formatted
    assert (opening + shown).count("<think>") == 1
    assert bound.formatted("<think>a</think><answer>1</answer>") is (opening == "")


def test_think_at_the_end_of_a_message_is_a_prefill() -> None:
    prompt = text(load_template("chat:{question} Think.\n<think>\n"), "Why?", CHAT)
    assert prompt == "<|user|>Why? Think.<|end|><|assistant|><think>\n"


def test_a_prefill_gives_the_ids_of_a_template_that_has_it() -> None:
    asked = load_template("chat:{question}", prefill="<think>\n").ask("Why?", byte_level(chat=CHAT))
    built_in = load_template("chat:{question}").ask("Why?", byte_level(chat=OPENING))
    ids = encode_prompt(asked, byte_level(chat=CHAT)).token_ids
    assert ids == encode_prompt(built_in, byte_level(chat=OPENING)).token_ids


def test_a_second_think_block_is_refused() -> None:
    with pytest.raises(TaskError, match=r"ends the prompt with <think> itself; leave"):
        text(load_template("chat:{question}", prefill="<think>"), "Why?", OPENING)


def test_own_text_stands_as_it_is() -> None:
    template = load_template("Q: {question}\nA: <think>\n")
    assert text(template, "1+2", CHAT) == "Q: 1+2\nA: <think>\n"
    assert template.opening() == "<think>\n"
    assert text(load_template("{question}", prefill=" So"), "1+2", None) == "1+2 So"


def test_system_prompts() -> None:
    asked = load_template("chat:{question}", system_prompt="Be brief.")
    assert text(asked, "Why?", STRICT) == "<|system|>Be brief.<|end|><|user|>Why?<|end|><|assistant|>"
    with pytest.raises(
        TaskError, match=r"fails on messages of the roles user: TemplateError: System message"
    ):
        text(load_template("chat:{question}"), "Why?", STRICT)
    with pytest.raises(TaskError, match=r"no place for a system message.*ahead of \{question\}"):
        asked.opening(byte_level(chat=MUTE))
    with pytest.raises(TaskError, match=r"system_prompt needs a chat template"):
        text(load_template("short", system_prompt="Be brief."), "1+2", CHAT)


@pytest.mark.parametrize(
    ("chat", "words"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{{ messages.x.y }}", "UndefinedError"),
        ("{% for", "TemplateSyntaxError"),
        ("{{ range(10 ** 9) | list }}", "OverflowError"),
        ("{{ messages[0].content.__class__.__mro__ }}", "SecurityError"),
        ("{{ 'a' + 1 }}", "TypeError"),
    ],
)
def test_a_faulty_chat_template_is_one_line(chat, words) -> None:
    with pytest.raises(TaskError, match=words) as caught:
        text(load_template("chat:{question}"), "Why?", chat)
    assert "\n" not in str(caught.value)


def test_a_chat_template_that_does_not_end_is_stopped(monkeypatch) -> None:
    monkeypatch.setattr(prompts, "RENDERING_SECONDS", 0.2)
    with pytest.raises(TaskError, match=r"more than 0.2 s for one prompt"):
        text(load_template("chat:{question}"), "Why?", ENDLESS)


def test_arguments_that_are_no_variables_of_the_template_are_refused() -> None:
    told = {"add_generation_prompt": False, "tokenize": True, "tools": []}
    chat = Chat([{"role": "user", "content": "Why?"}], told)
    with pytest.raises(TaskError, match=r": add_generation_prompt, tokenize cannot be set"):
        render_chat(chat, byte_level(chat=CHAT))


def test_tools_of_a_conversation_are_part_of_its_prompt() -> None:
    tools = [{"type": "function", "function": {"name": "look", "description": "up", "parameters": {}}}]
    named = byte_level(chat="{% for t in tools %}{{ t.function.name }} {% endfor %}" + CHAT)
    chat = Chat([{"role": "user", "content": "Why?"}], {"tools": tools})
    assert render_chat(chat, named) == "look " + render_chat(Chat(chat.messages), byte_level(chat=CHAT))


def test_chat_without_a_chat_template_is_refused() -> None:
    with pytest.raises(TaskError, match="no chat template"):
        text(load_template("chat:{question}"), "Why?", None)


def test_unknown_name_is_refused() -> None:
    with pytest.raises(TaskError, match=r"unknown prompt template 'shrot'.*did you mean 'short'"):
        load_template("shrot")
