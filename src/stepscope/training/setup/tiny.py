"""The embedded policy: a Llama-style model of a few hundred thousand parameters with its own tokenizer.

Built in code from a seed, so that training, measurement and tests need no download. Once saved it is an
ordinary Hugging Face folder and is treated like any other model. Llama and not Qwen2, because
``AutoTokenizer`` of transformers 5 gives every folder of model type ``qwen2`` Qwen's own pre-tokenizer,
whatever its ``tokenizer.json`` says.
"""

from __future__ import annotations

import string

from tokenizers import Regex, Tokenizer
from tokenizers.decoders import Fuse
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, set_seed

from stepscope.config import TinyModelConfig
from stepscope.errors import ConfigError

SPECIAL = ("<pad>", "<eos>", "<unk>")
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
CHARACTERS = tuple(string.digits + string.ascii_letters + string.punctuation + " \n")
MAX_POSITIONS = 1024


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per printable ASCII character and one for each of the four tags.

    Decoding joins tokens without spaces, so ``decode(encode(text)) == text`` for every text over its
    alphabet; any other character becomes ``<unk>``. The tags are ordinary tokens: they survive
    ``skip_special_tokens``.
    """
    vocabulary = {token: i for i, token in enumerate((*SPECIAL, *TAGS, *CHARACTERS))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Split(Regex(r"</?(?:think|answer)>|[\s\S]"), behavior="isolated")
    tokenizer.decoder = Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    )


def build_tiny(config: TinyModelConfig, *, seed: int) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """The embedded policy with freshly drawn weights, and its tokenizer.

    Input and output embeddings are tied; there is no dropout.

    Args:
        config: shape of the model.
        seed: seed of the initial weights; the same seed gives the same bits.

    Raises:
        ConfigError: the heads do not divide the width, or the key/value heads do not divide the heads.
    """
    if config.hidden_size % config.heads or config.heads % config.kv_heads:
        raise ConfigError(
            f"model.tiny: hidden_size {config.hidden_size}, heads {config.heads}, kv_heads "
            f"{config.kv_heads}; heads must divide hidden_size and kv_heads must divide heads"
        )
    tokenizer = build_tokenizer()
    set_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            max_position_embeddings=MAX_POSITIONS,
            tie_word_embeddings=True,
            initializer_range=config.hidden_size**-0.5,
            attention_dropout=0.0,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    return model, tokenizer
