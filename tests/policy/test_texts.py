"""What responses say, and which token wrote which part of it."""

from __future__ import annotations

import numpy as np
import pytest

from made_tokenizers import EOS, TAGS, byte_level, sentence_piece, whole_words
from stepscope.policy.texts import ResponseText

KINDS = {"byte_level": byte_level, "sentence_piece": sentence_piece, "whole_words": whole_words}
TEXTS = (
    "the sum is 12",
    " the  sum\n\tis 12 ",
    "naïve cafe\u0301 😀👩‍👩‍👧 🇫🇷",
    "so \ufffd and א\u05b8 then 數學",
)


@pytest.fixture(params=KINDS, scope="module")
def tokenizer(request):
    return KINDS[request.param]()


@pytest.mark.parametrize("text", TEXTS)
def test_texts_of_tokens_join_up_to_the_response(tokenizer, text) -> None:
    ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    read = ResponseText(tokenizer, {tokenizer.eos_token_id})
    texts = read.by_token(ids)
    assert len(texts) == len(ids)
    assert "".join(texts) == read.whole(ids) == tokenizer.decode(ids[:-1], skip_special_tokens=False)
    assert texts[-1] == ""


def test_texts_of_any_tokens_join_up(tokenizer) -> None:
    """Whatever a policy samples: broken characters, special tokens, spaces at the start."""
    read = ResponseText(tokenizer, {tokenizer.eos_token_id})
    random = np.random.default_rng(0)
    for length in (1, 2, 5, 40) * 50:
        ids = random.integers(len(tokenizer), size=length).tolist()
        texts = read.by_token(ids)
        assert "".join(texts) == read.whole(ids)


@pytest.mark.parametrize("text", TEXTS[:3])
def test_the_quick_way_and_the_exact_way_agree(tokenizer, text) -> None:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    read = ResponseText(tokenizer, ())
    assert read.by_token(ids) == read._in_windows(ids) == read._by_prefixes(ids, read.whole(ids))


def test_words_keep_their_spaces_and_characters_stay_whole() -> None:
    for made in (byte_level(), sentence_piece(), whole_words()):
        ids = made("the sum is 12", add_special_tokens=False)["input_ids"]
        texts = ResponseText(made, ()).by_token(ids)
        assert "".join(texts) == "the sum is 12"
    ids = byte_level()("x😀", add_special_tokens=False)["input_ids"]
    assert ResponseText(byte_level(), ()).by_token(ids) == ["x", "", "", "", "😀"]


def test_special_tags_are_read_and_ends_are_not() -> None:
    answer = "<think>so</think><answer>16</answer>"
    special, ordinary = byte_level(special=TAGS), byte_level(ordinary=TAGS)
    for made in (special, ordinary):
        ids = [*made(answer, add_special_tokens=False)["input_ids"], made.eos_token_id, made.pad_token_id]
        assert ResponseText(made, {made.eos_token_id}).whole(ids) == answer
    ids = special(answer, add_special_tokens=False)["input_ids"]
    assert special.decode(ids, skip_special_tokens=True) == "so16"
    assert ResponseText(special, {ids[-1]}).whole(ids) == answer, "a tag that ends the response is a tag"


def test_a_tokenizer_without_an_end(tmp_path) -> None:
    made = byte_level(eos=None)
    ids = made("16" + EOS, add_special_tokens=False)["input_ids"]
    assert ResponseText(made, ()).whole(ids) == "16" + EOS
