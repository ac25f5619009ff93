"""Strings to token ids and back.

Knows the tokenizer files of a checkpoint and what bytes a token stands for. Knows nothing about chat, models or HTTP.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from ernie_serve.errors import CheckpointError
from ernie_serve.text.tokenizer_files import read_tokenizer_files

_METASPACE = "▁"
_BYTE_PIECE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_TAG = re.compile(r"<[^<>\s]+>")


class Tokenizer:
    """One vocabulary. Encoding adds nothing around the text; decoding strips nothing from it.

    A token stands for bytes, and decoding is UTF-8 over their concatenation with U+FFFD for what is not UTF-8. A
    *control token* is one the model was taught to read as structure: an added token that is marked special, or that is
    spelled like a tag (`<think>`, `<|im_end|>`).
    """

    def __init__(self, description: Mapping[str, Any], role_tokens: Mapping[str, str] | None = None) -> None:
        """Take the parsed content of a tokenizer.json, and the spelling of each role (`bos_token`, …) that has one.

        Raises `CheckpointError` for a tokenizer that cannot be built or whose decoder is of another family.
        """
        self.role_tokens: Mapping[str, str] = dict(role_tokens or {})
        self._description = dict(description) | {"decoder": _without_strip(description.get("decoder"))}
        self._byte_level = _is_byte_level(self._description["decoder"])
        self._backend = _build(self._description)
        added = self._backend.get_added_tokens_decoder()
        self._special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        controls = {i: t for i, t in added.items() if t.content and (t.special or _is_tag(t.content))}
        self.control_ids: frozenset[int] = frozenset(controls)
        self.control_spellings: frozenset[str] = frozenset(token.content for token in controls.values())
        self.respells_controls = any(token.normalized for token in controls.values()) and not _keeps_spelling(
            self._description.get("normalizer"), self.control_spellings
        )
        pieces = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size: int = max(pieces.values(), default=-1) + 1
        self._pieces: list[str] = [""] * self.vocab_size
        for piece, token_id in pieces.items():
            self._pieces[token_id] = piece
        self._bytes = [self._bytes_of(piece, token_id in added) for token_id, piece in enumerate(self._pieces)]

    @classmethod
    def from_folder(cls, folder: Path) -> "Tokenizer":
        """Read tokenizer.json, or convert tokenizer.model where there is no tokenizer.json.

        Raises `CheckpointError`, which names the file and what is wrong with it.
        """
        description, role_tokens = read_tokenizer_files(folder)
        try:
            return cls(description, role_tokens)
        except CheckpointError as error:
            raise CheckpointError(f"The tokenizer in {folder} cannot be used: {error}") from error

    def encode(self, text: str, *, parse_special: bool = True) -> list[int]:
        """The ids of a text, and of nothing else: no beginning or end token is added.

        With `parse_special` a control token's spelling in the text becomes that token; without it, it becomes
        ordinary tokens. A lone surrogate, which UTF-8 cannot hold, is read as U+FFFD. A long text takes its time (about
        a second for a megabyte) but lets other threads run meanwhile.
        """
        return self.encode_apart([encodable(text)]) if parse_special else self._encode_literally(encodable(text))

    def encode_apart(self, pieces: Sequence[str]) -> list[int]:
        """The ids of pieces that no token may span. None of them holds a lone surrogate."""
        # The library holds Python's global lock in `encode`, but not in its batch functions.
        encodings = self._backend.encode_batch_fast(pieces, add_special_tokens=False)
        return encodings[0].ids if len(encodings) == 1 else [i for encoding in encodings for i in encoding.ids]

    def encode_with_controls(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """As `encode`, with the (start, end) span in characters of every control token found.

        The text holds no lone surrogate.
        """
        (encoding,) = self._backend.encode_batch([text], add_special_tokens=False)
        ids = encoding.ids
        controls = self.control_ids
        if controls.isdisjoint(ids):
            return ids, []
        return ids, [span for token_id, span in zip(ids, encoding.offsets, strict=True) if token_id in controls]

    def decode(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> str:
        """The text of the ids, leading space included. Unknown ids stand for nothing."""
        return b"".join(self.iter_bytes(ids, skip_special_tokens=skip_special_tokens)).decode("utf-8", "replace")

    def iter_bytes(self, ids: Iterable[int], *, skip_special_tokens: bool = True) -> Iterable[bytes]:
        """The bytes of each id in turn, without those of special tokens if they are to be skipped."""
        skipped = self._special_ids if skip_special_tokens else frozenset()
        return (self.token_bytes(token_id) for token_id in ids if token_id not in skipped)

    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes a token stands for; part of a character for some, none for an unknown id."""
        return self._bytes[token_id] if 0 <= token_id < self.vocab_size else b""

    def token_text(self, token_id: int) -> str:
        """A token on its own as text, with U+FFFD for bytes that are only part of a character."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_id(self, spelling: str) -> int | None:
        """The id of a token by its exact spelling in the vocabulary."""
        return self._backend.token_to_id(spelling)

    def _encode_literally(self, text: str) -> list[int]:
        """Encode with control spellings read as text.

        A vocabulary may still find one whole (as an ordinary piece of the same name); then the text is cut inside it.
        """
        (encoding,) = self._literal_backend.encode_batch([text], add_special_tokens=False)
        if self.control_ids.isdisjoint(encoding.ids):
            return encoding.ids
        ids: list[int] = []
        for token_id, (start, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if token_id not in self.control_ids:
                ids.append(token_id)
            elif end - start > 1:
                ids += self._encode_literally(text[start : start + 1]) + self._encode_literally(text[start + 1 : end])
        return ids

    @cached_property
    def _literal_backend(self) -> tokenizers.Tokenizer:
        """The same tokenizer, blind to control tokens."""
        added = [
            {**token, "special": token["special"] or token["content"] in self.control_spellings}
            for token in self._description.get("added_tokens", [])
        ]
        backend = _build({**self._description, "added_tokens": added})
        backend.encode_special_tokens = True
        return backend

    def _bytes_of(self, piece: str, is_added: bool) -> bytes:
        if self._byte_level:
            if is_added:
                return piece.encode()
            return b"".join(_BYTE_OF_LETTER.get(letter) or letter.encode() for letter in piece)
        if match := _BYTE_PIECE.fullmatch(piece):
            return bytes([int(match[1], 16)])
        return piece.replace(_METASPACE, " ").encode()


def _build(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    _refuse_marks(description.get("model"))
    try:
        backend = tokenizers.Tokenizer.from_str(json.dumps(description, ensure_ascii=False))
        backend.encode("Some text.")
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # the library raises nothing narrower, and a panic is no Exception
        raise CheckpointError(f"the tokenizers library refuses it ({error}).") from error
    backend.no_truncation()
    backend.no_padding()
    for token in description.get("added_tokens", []):
        if backend.token_to_id(token["content"]) != token["id"]:
            raise CheckpointError(
                f"the added token {token['content']!r} is declared as id {token['id']}, but the vocabulary gives it "
                f"{backend.token_to_id(token['content'])}."
            )
    return backend


def _refuse_marks(model: object) -> None:
    """They would be read as text, and one that cuts a letter ends the process, in the library."""
    for name in ("continuing_subword_prefix", "end_of_word_suffix"):
        if isinstance(model, dict) and model.get(name):
            raise CheckpointError(f"its model has a {name}, {model[name]!r}; vocabularies that are read have none.")


def _is_tag(spelling: str) -> bool:
    return _TAG.fullmatch(spelling) is not None and _BYTE_PIECE.fullmatch(spelling) is None


def encodable(text: str) -> str:
    """The text with U+FFFD for lone surrogates, which UTF-8 cannot hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


# What the decoder and the normalizer of a tokenizer.json say.


def _steps(part: object) -> list[dict[str, Any]]:
    """The steps of a decoder or normalizer, sequences flattened."""
    if not isinstance(part, dict):
        return []
    inner = part.get("decoders") or part.get("normalizers")
    return [step for child in inner for step in _steps(child)] if isinstance(inner, list) else [part]


def _without_strip(decoder: object) -> dict[str, Any] | None:
    """The decoder without a step that strips a leading space: an answer may begin with one."""
    steps = [step for step in _steps(decoder) if step.get("type") not in ("Strip", "Sequence")]
    return {"type": "Sequence", "decoders": steps} if steps else None


def _is_byte_level(decoder: object) -> bool:
    kinds = {str(step.get("type")) for step in _steps(decoder)}
    if "ByteLevel" in kinds:
        return True
    if kinds and kinds <= {"Replace", "ByteFallback", "Fuse", "Metaspace"}:
        return False
    raise CheckpointError(
        f"its decoder has the steps {sorted(kinds)}; vocabularies that are read are byte-level (ByteLevel) or have "
        "metaspaces (Replace, ByteFallback, Fuse)."
    )


def _keeps_spelling(normalizer: object, spellings: Iterable[str]) -> bool:
    """Whether a text can only be normalised into a control token's spelling by holding it already."""
    for step in _steps(normalizer):
        swaps_spaces = step.get("type") == "Replace" and step.get("pattern") == {"String": " "}
        if not swaps_spaces and step.get("type") != "Prepend":
            return False
    return not any(" " in spelling or _METASPACE in spelling for spelling in spellings)


def _byte_of_letter() -> dict[str, bytes]:
    """Byte-level vocabularies spell printable Latin-1 bytes as themselves and the others from U+0100 upwards."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): bytes([byte]) for byte in printable} | {
        chr(0x100 + index): bytes([byte]) for index, byte in enumerate(others)
    }


_BYTE_OF_LETTER = _byte_of_letter()
