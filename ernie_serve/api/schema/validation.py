"""From a JSON object to a checked request, or to an error that names the field, the limit and the remedy.

Knows pydantic's errors and the list of what is refused by name. Knows no endpoint.
"""

import logging
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from ernie_serve.errors import InvalidRequest

logger = logging.getLogger(__name__)

Fields = TypeVar("Fields", bound=BaseModel)

REFUSED: Mapping[str, tuple[object, ...]] = {
    "audio": (),
    "chat_template": (),
    "documents": ([],),
    "dry_multiplier": (0, 0.0),
    "early_stopping": (False,),
    "ebnf": ("",),
    "enable_thinking": (),
    "function_call": ("none",),
    "functions": ([],),
    "grammar": ("",),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_whitespace_pattern": ("",),
    "include_reasoning": (True,),
    "json_schema": ("", {}),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "max_new_tokens": (),
    "moderation": (),
    "n_predict": (-1,),
    "prompt_embeds": (),
    "regex": ("",),
    "repetition_detection": ({},),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "stop_regex": ("", []),
    "structural_tag": ("",),
    "suffix": ("",),
    "typical_p": (1, 1.0),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "web_search_options": (),
    "xtc_probability": (0, 0.0),
}
"""Parameters that would change the answer and are not implemented, each with the values that change nothing."""

_LENGTHS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
_OTHER_LENGTHS = ("max_new_tokens", "n_predict")
"""What others call the length: clients that serve all of them send every name, with one number."""


def validated(fields: type[Fields], body: Mapping[str, Any]) -> Fields:
    """The body as an instance of `fields`. Raises `InvalidRequest` for the first thing that is wrong with it."""
    unknown = [name for name in body if name not in fields.model_fields]
    for name in unknown:
        if name in REFUSED and body[name] is not None and not _changes_nothing(name, body):
            raise InvalidRequest(f"`{name}` is not supported by this server. {_remedy(name)}", param=name)
    if ignored := [name[:40] for name in unknown if name not in REFUSED]:
        logger.debug("Ignored %d unknown fields: %s", len(ignored), sorted(ignored)[:10])
    try:
        return fields.model_validate(body)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = path_of(first["loc"])
        if _is_long(first) and param in body:
            validated(fields, {**body, param: int(first["input"])})  # which tells the field's own limit, if it has one
        raise InvalidRequest(f"`{param}` {_told(first)}.", param=param) from None


def _changes_nothing(name: str, body: Mapping[str, Any]) -> bool:
    value = body[name]
    return value in REFUSED[name] or (name in _OTHER_LENGTHS and value in [body.get(each) for each in _LENGTHS])


def _remedy(name: str) -> str:
    inside = _STRUCTURED.get(name.removeprefix("guided_"))
    return f"Send `structured_outputs` with `{inside}` in it." if inside else _REMEDIES.get(name, "Leave it out.")


_STRUCTURED = {
    "choice": "choice",
    "ebnf": "grammar",
    "grammar": "grammar",
    "json": "json",
    "json_schema": "json",
    "regex": "regex",
}
"""What servers call the forms of `structured_outputs`, some with `guided_` before it."""

_REMEDIES = {
    "enable_thinking": "In chat and Responses send `chat_template_kwargs` with it inside, or `reasoning_effort`.",
    "include_reasoning": 'Leave it out, or send a `reasoning_effort` of "none".',
    "max_new_tokens": "Send `max_tokens`, in Responses `max_output_tokens`.",
    "n_predict": "Send `max_tokens`, in Responses `max_output_tokens`.",
    "stop_regex": "Send `stop`, which holds strings.",
    "structural_tag": "Send `tools`, `response_format` or `structured_outputs`.",
}


def path_of(location: tuple[int | str, ...]) -> str:
    """`stream_options.include_usage`, `messages[2].role`."""
    path = ""
    for part in location:
        if part == "[key]":  # of an object: what is wrong is the key that stands before
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path


def kind_of(value: object) -> str:
    """A JSON value's type in JSON's own words."""
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")


def _is_long(error: ErrorDetails) -> bool:
    """Whether a number was an integer beyond 64 bits, of which reading JSON has made a float."""
    given = error["input"]
    return error["type"] == "int_type" and isinstance(given, float) and given.is_integer() and abs(given) > _INT64


_INT64 = 2**63 - 1


def _told(error: ErrorDetails) -> str:
    """What is wrong with a value, to be read after the field's name."""
    context = error.get("ctx", {})
    given = error["input"]
    if _is_long(error):
        limit = f"at most {_INT64}" if given > 0 else f"at least {-_INT64 - 1}"
        return f"must be {limit}, not {given:g}"
    wanted = {
        "bool_type": "true or false",
        "dict_type": "an object",
        "float_type": "a number",
        "int_type": "an integer",
        "list_type": "a list",
        "model_type": "an object",
        "string_type": "a string",
    }.get(error["type"])
    if wanted is not None:
        return f"must be {wanted}, not {kind_of(given)}"
    match error["type"]:
        case "missing":
            return "is required"
        case "greater_than_equal":
            return f"must be at least {context['ge']}, not {given}"
        case "greater_than":
            return f"must be greater than {context['gt']}, not {given}"
        case "less_than_equal":
            return f"must be at most {context['le']}, not {given}"
        case "finite_number":
            return "must be a finite number"
        case "literal_error":
            return f"must be {context['expected']}"
        case "value_error":
            return f"is not valid: {context['error']}"
        case "string_too_long":
            return f"must have at most {context['max_length']} characters"
    return f"is not valid: {error['msg'][:1].lower()}{error['msg'][1:]}"
