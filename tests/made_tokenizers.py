"""Tokenizers of the usual kinds, built in code: byte-level, SentencePiece-like, whole words."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")

CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

CORPUS = (
    "the sum is 12 and naïve café, so 3+8=11; 11+5=16",
    "hello world <think> why </think> <answer> 16 </answer> User: Assistant:",
)


def byte_level(
    *,
    chat: str | None = None,
    adds: str = "$A",
    special: Sequence[str] = (),
    ordinary: Sequence[str] = (),
    eos: str | None = EOS,
) -> PreTrainedTokenizerFast:
    """Byte-level BPE.

    Args:
        chat: chat template.
        adds: what stands around a text, for example ``<s> $A </s>``.
        special: further special tokens.
        ordinary: further tokens that are not special.
        eos: the token that ends a response.
    """
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=alphabet, special_tokens=[PAD, BOS, EOS], show_progress=False
    )
    made.train_from_iterator(CORPUS, trainer)
    made.post_processor = processors.TemplateProcessing(single=adds, special_tokens=[(BOS, 1), (EOS, 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token=BOS, eos_token=eos, pad_token=PAD, padding_side="left"
    )
    tokenizer.add_tokens(list(special), special_tokens=True)
    tokenizer.add_tokens(list(ordinary))
    tokenizer.chat_template = chat
    return tokenizer


def sentence_piece() -> PreTrainedTokenizerFast:
    """BPE over words with their leading space, single bytes for the unknown, as Llama 2 has it."""
    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=special, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS, unk_token="<unk>")


def whole_words() -> PreTrainedTokenizerFast:
    """One token per word, joined by spaces."""
    words = ["<unk>", BOS, EOS, *dict.fromkeys(" ".join(CORPUS).split())]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token=BOS, eos_token=EOS, unk_token="<unk>")
