"""The tokenizer files of a checkpoint, read together into one description.

Knows the JSON files that Hugging Face and Baidu write. Knows nothing about encoding.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ernie_serve.errors import CheckpointError
from ernie_serve.text.spm import tokenizer_json_from_sentencepiece

_ROLES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_tokenizer_files(folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """The content of a tokenizer.json, and the spelling of each role (`bos_token`, …) that has one.

    tokenizer.model is converted where there is no tokenizer.json. The added tokens are all that any of the files
    beside it knows. Raises `CheckpointError`, which names the file and what is wrong with it.
    """
    config = read_json(folder / "tokenizer_config.json")
    special_map = read_json(folder / "special_tokens_map.json")
    role_tokens = _role_tokens({**special_map, **{key: value for key, value in config.items() if value is not None}})
    if (folder / "tokenizer.json").is_file():
        description = read_json(folder / "tokenizer.json")
    elif (folder / "tokenizer.model").is_file():
        description = tokenizer_json_from_sentencepiece(folder / "tokenizer.model")
    else:
        raise CheckpointError(f"{folder} has neither tokenizer.json nor tokenizer.model; one of them is needed.")
    special = {*role_tokens.values(), *_additional_special_tokens(config), *_additional_special_tokens(special_map)}
    added = _merge_added_tokens(description, config, read_json(folder / "added_tokens.json"), special, folder)
    return {**description, "added_tokens": added}, role_tokens


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or an empty one where there is no file. Raises `CheckpointError`, naming the file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}.") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def _spelling(token: object) -> str | None:
    """A token in these files is a string, or an object with the string as its content."""
    content = token.get("content") if isinstance(token, dict) else token
    return content if isinstance(content, str) and content else None


def _role_tokens(values: Mapping[str, Any]) -> dict[str, str]:
    spellings = {f"{role}_token": _spelling(values.get(f"{role}_token")) for role in _ROLES}
    return {name: spelling for name, spelling in spellings.items() if spelling is not None}


def _additional_special_tokens(values: Mapping[str, Any]) -> set[str]:
    tokens: list[object] = []
    for key in ("additional_special_tokens", "extra_special_tokens"):
        extra = values.get(key)
        tokens += list(extra.values()) if isinstance(extra, dict) else extra if isinstance(extra, list) else []
    return {spelling for spelling in map(_spelling, tokens) if spelling is not None}


def _merge_added_tokens(
    description: Mapping[str, Any],
    config: Mapping[str, Any],
    added_json: Mapping[str, Any],
    special: set[str],
    folder: Path,
) -> list[dict[str, Any]]:
    """Every added token any of the files knows, by id. tokenizer_config.json has the last word on its flags."""
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    merged: dict[int, dict[str, Any]] = {}
    try:
        vocab = description["model"]["vocab"]
        ids = {token["content"]: token["id"] for token in description.get("added_tokens") or []}
        for token in description.get("added_tokens") or []:
            merged[token["id"]] = plain | token
        for spelling, token_id in added_json.items():
            merged.setdefault(int(token_id), {**plain, "id": int(token_id), "content": spelling})
        for key, token in (config.get("added_tokens_decoder") or {}).items():
            flags = {name: bool(token[name]) for name in plain if name in token}
            before = merged.get(int(key), plain)
            if before.get("content", token["content"]) != token["content"]:
                raise CheckpointError(
                    f"{folder}: id {key} is {before['content']!r} in one tokenizer file and {token['content']!r} in "
                    "tokenizer_config.json; the files do not belong together."
                )
            merged[int(key)] = {**before, **flags, "id": int(key), "content": token["content"]}
        for token in merged.values():
            token["special"] = bool(token["special"] or token["content"] in special)
            ids[token["content"]] = token["id"]
        pieces = vocab if isinstance(vocab, dict) else {}
        for spelling in special - ids.keys():
            if spelling in pieces:
                merged[pieces[spelling]] = {**plain, "id": pieces[spelling], "content": spelling, "special": True}
        return [merged[token_id] for token_id in sorted(merged)]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(
            f"{folder}: the added tokens of its tokenizer files are malformed ({error!r})."
        ) from error
