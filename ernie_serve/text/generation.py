"""What a checkpoint's own files say about generating: where to stop, and how to sample by default.

Knows generation_config.json and config.json. Knows nothing about requests or engines.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ernie_serve.errors import CheckpointError
from ernie_serve.text.template import ChatTemplate
from ernie_serve.text.tokenizer import Tokenizer
from ernie_serve.text.tokenizer_files import read_json

_TURN_ENDS = ("<|im_end|>", "</s>", "<|end_of_sentence|>")


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationDefaults:
    """Stop ids, sorted, and the sampling values that the checkpoint states; `None` for what it does not.

    `stop_token_ids` end any text: the end-of-sequence ids of both files. `chat_stop_token_ids` end a chat answer:
    those, and the tokens that end a turn in the checkpoint's chat template.
    """

    stop_token_ids: tuple[int, ...] = ()
    chat_stop_token_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None

    def stop_ids(self, *, chat: bool) -> tuple[int, ...]:
        """The ids that end a chat answer, or any other text."""
        return self.chat_stop_token_ids if chat else self.stop_token_ids

    @classmethod
    def from_folder(cls, folder: Path, tokenizer: Tokenizer, template: ChatTemplate | None) -> "GenerationDefaults":
        """Read both files, each of which may be absent. Raises `CheckpointError`: file and key."""
        path = folder / "generation_config.json"
        values = read_json(path)
        stops = _ids(path, values, "eos_token_id", tokenizer.vocab_size)
        stops |= _ids(folder / "config.json", read_json(folder / "config.json"), "eos_token_id", tokenizer.vocab_size)
        chat_stops = stops | (_turn_end_ids(tokenizer, template) if template else set())
        return cls(
            stop_token_ids=tuple(sorted(stops)),
            chat_stop_token_ids=tuple(sorted(chat_stops)),
            temperature=_number(path, values, "temperature", 0.0, 100.0),
            top_p=_number(path, values, "top_p", 0.0, 1.0, above_low=True),
            top_k=_count(path, values, "top_k", 0),
            repetition_penalty=_number(path, values, "repetition_penalty", 0.0, 100.0, above_low=True),
        )


def _turn_end_ids(tokenizer: Tokenizer, template: ChatTemplate) -> set[int]:
    """The ids of those known turn ends that are control tokens here.

    The template must write it, by its spelling or by its role (`sep_token`); `</s>` ends the last turn in training
    whatever the template writes.
    """
    names = {spelling: name for name, spelling in tokenizer.role_tokens.items()}
    written = {end for end in _TURN_ENDS if end in template.source or names.get(end, end) in template.source}
    ids = {tokenizer.token_id(end) for end in written | {"</s>"}}
    return {token_id for token_id in ids if token_id in tokenizer.control_ids}


def _ids(path: Path, values: Mapping[str, Any], key: str, vocab_size: int) -> set[int]:
    value = values.get(key)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for token_id in ids:
        if type(token_id) is not int or not 0 <= token_id < vocab_size:
            raise CheckpointError(
                f'{path}: "{key}" must be a token id below {vocab_size} or a list of them, not {token_id!r}.'
            )
    return set(ids)


def _number(
    path: Path, values: Mapping[str, Any], key: str, low: float, high: float, *, above_low: bool = False
) -> float | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) not in (int, float) or not low <= value <= high or (above_low and value == low):
        bound = "above" if above_low else "from"
        raise CheckpointError(f'{path}: "{key}" must be a number {bound} {low:g} up to {high:g}, not {value!r}.')
    return float(value)


def _count(path: Path, values: Mapping[str, Any], key: str, low: int) -> int | None:
    value = values.get(key)
    if value is None:
        return None
    if type(value) is not int or not low <= value <= _INT31:
        raise CheckpointError(f'{path}: "{key}" must be a whole number from {low} up to {_INT31}, not {value!r}.')
    return value


_INT31 = 2**31 - 1
"""What requests may ask for at most, too."""
