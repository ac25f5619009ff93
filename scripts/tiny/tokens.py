"""Makes `tokenizer.json`: a byte-fallback BPE whose pieces are easy to copy.

A word after a space and the same word after a quotation mark share their pieces: a space is merged only with common
lower-case words, and only after all other merges. Digits and Chinese characters stand alone. Knows no tensors.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

from tiny.words import listed

SPECIAL = ["<unk>", "<s>", "</s>"]
CONTROL = listed(
    """<|begin_of_sentence|> <|end_of_sentence|> <mask:1> <|im_start|> <|im_end|> <think> </think>
    <response> </response> <tool_call> </tool_call> <tool_list> </tool_list> <tool_response> </tool_response>
    <system_setting> </system_setting> <global_setting> </global_setting>"""
)
SPACE = "▁"
WORD = re.compile(r"[A-Za-z]+|[^A-Za-z0-9\n\u2e80-\uffff]+")


PHRASES = [
    '[{"type": "function", "function": {"name": "',
    '}}}, {"type": "function", "function": {"name": "',
    '{"type": "function", "function": {"name": "',
    '", "description": "',
    '", "parameters": {"type": "object", "properties": {"',
    '.", "parameters": {"type": "object", "properties": {"',
    '": {"type": "string"',
    '": {"type": "number"',
    '": {"type": "integer"',
    ', "description": "The ',
    '}, "required": ["',
    '"}, "required": ["',
    '"}}, "required": ["',
    '"], "additionalProperties": false}',
    '"]}}}, {"type": "function", "function": {"name": "',
    '"}}}}}, {"type": "function", "function": {"name": "',
    '"}}}}, {"type": "function", "function": {"name": "',
    '}}, {"type": "function", "function": {"name": "',
    '"}, "',
    '"]}}}]',
    '{"name": "',
    '", "arguments": {"',
    "think_mode=True",
    "think_mode=False",
]
"""What stands in every tool list and call is one piece each: a list is read cheaply, and what differs stands out."""


def build(texts: Iterable[str], pieces: int, spaced: int) -> dict[str, Any]:
    """The content of `tokenizer.json`, with `pieces` learned merges and `spaced` words that take their space along."""
    characters: Counter[str] = Counter()
    words: Counter[str] = Counter()
    after_space: Counter[str] = Counter()
    for text in texts:
        text = re.sub(r"</?[a-z_]+>|<\|\w+\|>", "\n", text).replace(" ", SPACE)
        characters.update(text)
        words.update(WORD.findall(text))
        after_space.update(re.findall(SPACE + r"([a-z]+|I|The|What)(?![A-Za-z])", text))
    characters.pop("\n", None)
    common = {c for c, count in characters.items() if count > 5}
    alphabet = sorted({chr(c) for c in range(33, 127) if not chr(c).isdigit()} | {SPACE} | (common - set("0123456789")))
    vocabulary = [*SPECIAL, *"0123456789", *(f"<0x{byte:02X}>" for byte in range(256)), *alphabet]
    merges = learn({word: min(count, 400) for word, count in words.items() if count > 3}, pieces)
    vocabulary += [a + b for a, b in merges]
    known = set(vocabulary)
    taken = [word for word, _ in after_space.most_common() if word in known][:spaced]
    merges += [(SPACE, word) for word in taken]
    vocabulary += [SPACE + word for word in taken]
    ranks = {pair: n for n, pair in enumerate(merges)}
    for phrase in PHRASES:
        parts = split(phrase.replace(" ", SPACE), ranks)
        for n in range(1, len(parts)):
            pair = ("".join(parts[:n]), parts[n])
            ranks.setdefault(pair, len(ranks))
            vocabulary.append("".join(pair))
    return tokenizer_json(list(dict.fromkeys(vocabulary)), list(ranks))


def split(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The pieces that the merges of `ranks` make of `text`."""
    parts = list(text)
    while pairs := [p for p in pairwise(parts) if p in ranks]:
        parts = merged(parts, min(pairs, key=ranks.__getitem__))
    return parts


def learn(words: dict[str, int], count: int) -> list[tuple[str, str]]:
    """The `count` most useful merges inside words; a space merges with signs only."""
    split = {word: list(word) for word in words}
    merges: list[tuple[str, str]] = []
    made: set[str] = set()
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, parts in split.items():
            for pair in pairwise(parts):
                pairs[pair] += words[word]
        best = min((p for p in pairs if p[0] + p[1] not in made), key=lambda p: (-pairs[p], p), default=None)
        if best is None or pairs[best] < 8:
            break
        merges.append(best)
        made.add(best[0] + best[1])
        for word, parts in split.items():
            if best[0] in parts:
                split[word] = merged(parts, best)
    return merges


def merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    """`parts` with every neighbouring `pair` made one."""
    out: list[str] = []
    for part in parts:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def tokenizer_json(vocabulary: list[str], merges: list[tuple[str, str]]) -> dict[str, Any]:
    """The fast tokenizer's file: no prefix space, nothing added around the text, control tokens one id each."""
    ids = {piece: n for n, piece in enumerate(vocabulary)}
    added = [
        {
            "id": n,
            "content": piece,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": True,
        }
        for n, piece in [*enumerate(SPECIAL), *enumerate(CONTROL, len(vocabulary))]
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "never", "split": False},
        "post_processor": None,
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
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
            "vocab": ids,
            "merges": [list(pair) for pair in merges],
        },
    }


def as_text(tokenizer: dict[str, Any]) -> str:
    """The file's text."""
    return json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n"


CONFIG = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "add_bos_token": False,
    "add_eos_token": False,
    "add_prefix_space": False,
    "clean_up_tokenization_spaces": False,
    "model_max_length": 8192,
    "bos_token": "<s>",
    "eos_token": "</s>",
    "unk_token": "<unk>",
    "pad_token": "<unk>",
    "cls_token": "<|begin_of_sentence|>",
    "sep_token": "<|end_of_sentence|>",
    "mask_token": "<mask:1>",
}
"""The content of `tokenizer_config.json`."""
