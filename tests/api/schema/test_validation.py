import logging
from typing import Any

import pytest

from ernie_serve.api.schema.chat import ChatRequest
from ernie_serve.api.schema.completion import CompletionRequest
from ernie_serve.api.schema.fields import TextRequest
from ernie_serve.api.schema.validation import REFUSED, path_of, validated
from ernie_serve.errors import InvalidRequest

BASE = {"model": "m", "prompt": "p", "messages": []}


@pytest.mark.parametrize("fields", [CompletionRequest, ChatRequest])
@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_implemented_is_refused_by_name(fields: type[TextRequest], name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}` is not supported") as raised:
        validated(fields, {**BASE, name: {"anything": 1}})
    assert raised.value.param == name


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("guided_json", "Send `structured_outputs` with `json` in it."),
        ("guided_choice", "Send `structured_outputs` with `choice` in it."),
        ("guided_regex", "Send `structured_outputs` with `regex` in it."),
        ("guided_grammar", "Send `structured_outputs` with `grammar` in it."),
        ("grammar", "Send `structured_outputs` with `grammar` in it."),
        ("ebnf", "Send `structured_outputs` with `grammar` in it."),
        ("json_schema", "Send `structured_outputs` with `json` in it."),
        ("regex", "Send `structured_outputs` with `regex` in it."),
        ("structural_tag", "Send `tools`, `response_format` or `structured_outputs`."),
        ("guided_whitespace_pattern", "Leave it out."),
        ("n_predict", "Send `max_tokens`, in Responses `max_output_tokens`."),
        ("enable_thinking", "or `reasoning_effort`."),
        ("suffix", "Leave it out."),
    ],
)
def test_a_refusal_says_what_to_send_instead(name: str, remedy: str) -> None:
    with pytest.raises(InvalidRequest) as raised:
        validated(ChatRequest, {**BASE, name: "anything"})
    assert str(raised.value).endswith(remedy)


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_values_that_change_nothing_are_accepted(name: str) -> None:
    for value in (None, *REFUSED[name]):
        validated(ChatRequest, {**BASE, name: value})


@pytest.mark.parametrize(
    "fields",
    [{"include_reasoning": False}, {"xtc_probability": 0.5}, {"dry_multiplier": 0.8}, {"vllm_xargs": {"a": 1}}],
)
def test_values_that_change_something_are_not(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest, match="is not supported by this server"):
        validated(ChatRequest, BASE | fields)


@pytest.mark.parametrize("other", ["max_new_tokens", "n_predict"])
def test_other_names_for_the_length_are_taken_where_they_say_the_same(other: str) -> None:
    assert validated(ChatRequest, {**BASE, "max_tokens": 9, other: 9}).max_tokens == 9
    for length in ({"max_tokens": 8}, {}):
        with pytest.raises(InvalidRequest, match=f"`{other}` is not supported"):
            validated(ChatRequest, {**BASE, **length, other: 9})


def test_what_is_refused_is_no_field() -> None:
    known = CompletionRequest.model_fields.keys() | ChatRequest.model_fields.keys()
    assert not REFUSED.keys() & known


def test_unknown_fields_are_ignored_with_a_line_that_tells_no_value(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        validated(ChatRequest, {**BASE, "invented": "canary", "n" * 5000: 1, "metadata": {"a": "canary"}})
    assert "invented" in caplog.text
    assert "canary" not in caplog.text
    assert "metadata" not in caplog.text
    assert len(caplog.text) < 500


WRONG: list[tuple[str, Any, str]] = [
    ("temperature", "0.5", "`temperature` must be a number, not a string"),
    ("temperature", True, "`temperature` must be a number, not a boolean"),
    ("n", 1.5, "`n` must be an integer, not a number"),
    ("n", True, "`n` must be an integer, not a boolean"),
    ("priority", 1e20, "`priority` must be at most 2147483647, not 100000000000000000000"),
    ("seed", -1e19, "`seed` must be at least -9223372036854775808, not -10000000000000000000"),
    ("max_tokens", 1e20, r"`max_tokens` must be at most 9223372036854775807, not 1e\+20"),
    ("max_tokens", float("inf"), "`max_tokens` must be an integer, not a number"),
    ("stream", 1, "`stream` must be true or false, not an integer"),
    ("stream", "true", "`stream` must be true or false, not a string"),
    ("model", None, "`model` must be a string, not null"),
    ("model", ["m"], "`model` must be a string, not a list"),
    ("stream_options", [], "`stream_options` must be an object, not a list"),
    ("stream_options", {"include_usage": 1}, "`stream_options.include_usage` must be true or false, not an integer"),
    ("cache_salt", "s" * 257, "`cache_salt` must have at most 256 characters"),
    ("temperature", float("inf"), "`temperature` must be"),
    ("temperature", float("nan"), "`temperature` must be"),
]


@pytest.mark.parametrize(("name", "value", "told"), WRONG)
def test_error_names_the_field_and_what_it_must_be(name: str, value: Any, told: str) -> None:
    with pytest.raises(InvalidRequest, match=told) as raised:
        validated(CompletionRequest, {**BASE, name: value})
    assert raised.value.param
    assert raised.value.param.startswith(name)


@pytest.mark.parametrize("name", ["model", "prompt"])
def test_missing_field_is_named(name: str) -> None:
    with pytest.raises(InvalidRequest, match=f"`{name}` is required"):
        validated(CompletionRequest, {key: value for key, value in BASE.items() if key != name})


def test_null_is_the_same_as_nothing() -> None:
    optional = {name: None for name in CompletionRequest.model_fields if name not in ("model", "prompt")}
    assert validated(CompletionRequest, {**BASE, **optional}) == validated(CompletionRequest, BASE)


def test_places_are_spelled_as_clients_write_them() -> None:
    assert path_of(("messages", 2, "content", 0, "text")) == "messages[2].content[0].text"
