"""Rewrites a SentencePiece BPE model as the content of a tokenizer.json.

Knows SentencePiece's file. Knows nothing about chat, and needs the `sentencepiece` package only while it converts.

The conversion is the one the published ERNIE 4.5 tokenizer.json files went through: spaces become the metaspace sign,
no space is put in front of a text, and characters outside the vocabulary become byte pieces. The model file's own
normalisation rules are left out there, and so here.
"""

import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ernie_serve.errors import CheckpointError

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6


def tokenizer_json_from_sentencepiece(path: Path) -> dict[str, Any]:
    """The same vocabulary as a tokenizer.json. Raises `CheckpointError` if it is no BPE model with byte pieces."""
    try:
        import sentencepiece
    except ImportError as error:
        raise CheckpointError(
            f"{path} needs the sentencepiece package to be converted: pip install 'ernie-serve[sentencepiece]'."
        ) from error
    try:
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        pieces, is_bpe = _read_model(processor.serialized_model_proto())
    except (RuntimeError, OSError, ValueError, IndexError) as error:
        raise CheckpointError(f"{path} is not a SentencePiece model: {error}.") from error
    if not is_bpe:
        raise CheckpointError(f"{path} is a SentencePiece model of another kind than BPE; ERNIE 4.5 uses BPE.")
    kinds = {kind for _, _, kind in pieces}
    if _UNKNOWN not in kinds or _BYTE not in kinds:
        raise CheckpointError(f"{path} has no unknown piece or no byte pieces; ERNIE 4.5 has both.")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": piece,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": "▁" in piece,
                "special": kind != _USER_DEFINED,
            }
            for token_id, (piece, _, kind) in enumerate(pieces)
            if kind in (_CONTROL, _UNKNOWN) or (kind == _USER_DEFINED and " " not in piece)  # it would never see one
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
            "unk_token": next(piece for piece, _, kind in pieces if kind == _UNKNOWN),
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: token_id for token_id, (piece, _, _) in enumerate(pieces)},
            "merges": _merges(pieces),
        },
    }


def _merges(pieces: list[tuple[str, float, int]]) -> list[tuple[str, str]]:
    """Every way to put a normal piece together from two pieces, best score first.

    SentencePiece merges the pair whose result scores best; a merge list says the same by its order.
    """
    ids = {piece: token_id for token_id, (piece, _, kind) in enumerate(pieces) if kind == _NORMAL}
    ranked: list[tuple[float, int, int, str, str]] = []
    for piece in ids:
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in ids and right in ids:
                ranked.append((-pieces[ids[piece]][1], ids[left], ids[right], left, right))
    return [(left, right) for _, _, _, left, right in sorted(ranked)]


# The protocol buffer fields of a model: 1 = piece (1 text, 2 score, 3 kind), 2 = how it was trained (3 model type).


def _read_model(data: bytes) -> tuple[list[tuple[str, float, int]], bool]:
    """Every piece with its score and kind, and whether the model is BPE."""
    pieces: list[tuple[str, float, int]] = []
    model_type = 1
    for number, value in _fields(data):
        if number == 1 and isinstance(value, bytes):
            fields = dict(_fields(value))
            text, score, kind = fields.get(1, b""), fields.get(2, 0.0), fields.get(3, _NORMAL)
            if not (isinstance(text, bytes) and isinstance(score, float) and isinstance(kind, int)):
                raise ValueError(f"piece {len(pieces)} is malformed")
            pieces.append((text.decode(), score, kind))
        elif number == 2 and isinstance(value, bytes):
            stated = dict(_fields(value)).get(3, model_type)
            model_type = stated if isinstance(stated, int) else model_type
    return pieces, model_type == 2


def _fields(data: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    """The fields of one protocol buffer message, in order."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: int | float | bytes
        if wire == 0:
            value, at = _varint(data, at)
        elif wire == 1:
            value, at = data[at : at + 8], at + 8
        elif wire == 2:
            length, at = _varint(data, at)
            value, at = data[at : at + length], at + length
        elif wire == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            raise ValueError(f"wire type {wire} at byte {at}")
        yield number, value


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """An integer of seven bits a byte, and where the next field begins."""
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1
