"""A tokenizer for checkpoints without a trained one: the family's kind and special tokens, an invented vocabulary.

Knows the shape of `tokenizer.json`. Knows nothing of weights. Byte-fallback BPE with a metaspace for the space, as
the published tokenizers: any text comes back from its ids unchanged. Ids that stand for no real piece are
pronounceable syllables, so that random ids read as text and not as nothing.
"""

import itertools
from collections.abc import Iterator
from typing import Any

SPECIAL = (
    "<|end_of_sentence|>",
    "<|begin_of_sentence|>",
    "<mask:1>",
    "<mask:4>",
    "<mask:5>",
    "<mask:6>",
    "<mask:7>",
    "<|im_start|>",
    "<|im_end|>",
)
"""Tokens that steer the model and are no text."""

TAGS = (
    *("<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"),
    *("<tool_response>", "</tool_response>", "<tool_list>", "</tool_list>"),
)
"""Tokens that frame parts of an answer; they decode to their own text."""

MIN_VOCAB_SIZE = 512

CHAT_TEMPLATE = """\
{%- if add_generation_prompt is not defined %}{% set add_generation_prompt = true %}{% endif -%}
{{- '<|begin_of_sentence|>' -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content + '\\n' -}}
{%- elif message.role == 'user' -%}{{- 'User: ' + message.content + '\\n' -}}
{%- elif message.role == 'assistant' -%}{{- 'Assistant: ' + message.content + '<|end_of_sentence|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""
"""Renders what the published chat models render."""

_WORDS = ("User", "Assistant", "Hello", "▁the", "▁and", "▁is", "▁of", "▁to", "▁in", "▁you", "▁are", "▁world", "你好")
_PUBLISHED_SPECIAL_ID = 100272


def random_tokenizer(vocab_size: int) -> dict[str, Any]:
    """The contents of `tokenizer.json` for a model of this vocabulary; a few ids at its end are padding.

    Ids as published: 0 to 2 are <unk>, <s>, </s>, then the ten digits, then the 256 bytes; in a vocabulary large
    enough <|end_of_sentence|> is 100272.
    """
    assert vocab_size >= MIN_VOCAB_SIZE, (
        f"a vocabulary of {vocab_size} is too small for bytes, words and special tokens"
    )
    added = SPECIAL + TAGS
    first_added = min(_PUBLISHED_SPECIAL_ID, vocab_size - len(added) - 8)
    merges = [(word[:end], word[end]) for word in _WORDS for end in range(1, len(word))]
    pieces = ["<unk>", "<s>", "</s>", *"0123456789", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    pieces += [chr(code) for code in range(33, 127) if not chr(code).isdigit()]
    pieces += sorted({letter for word in _WORDS for letter in word})
    pieces += [left + right for left, right in merges]
    vocab = {piece: index for index, piece in enumerate(dict.fromkeys(pieces))}
    for syllables in _syllables():
        if len(vocab) == first_added:
            break
        vocab.setdefault(syllables, len(vocab))
    vocab |= {token: first_added + index for index, token in enumerate(added)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            _added(vocab[token], token, special=token not in TAGS) for token in ("<unk>", "<s>", "</s>", *added)
        ],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": list(dict.fromkeys(merges)),
        },
    }


def random_tokenizer_config() -> dict[str, Any]:
    """The contents of `tokenizer_config.json` beside it, without a chat template."""
    return {
        "tokenizer_class": "LlamaTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "<unk>",
        "cls_token": "<|begin_of_sentence|>",
        "sep_token": "<|end_of_sentence|>",
        "mask_token": "<mask:1>",
        "model_max_length": 131072,
    }


def _syllables() -> Iterator[str]:
    simple = [consonant + vowel for consonant in "bdfghjklmnprstvwz" for vowel in "aeiou"]
    for count in itertools.count(1):
        for letters in itertools.product(simple, repeat=count):
            yield "▁" + "".join(letters)
            yield "".join(letters)


def _added(index: int, content: str, special: bool) -> dict[str, Any]:
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": special}
    return {"id": index, "content": content} | flags
