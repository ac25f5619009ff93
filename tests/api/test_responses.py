"""/v1/responses: the same text as everywhere else, told as items, and kept for a while."""

import json
from dataclasses import replace
from typing import Any

import pytest
from openai.types.responses import Response as OpenAIResponse
from openai.types.responses import ResponseStreamEvent
from pydantic import TypeAdapter

from ernie_serve.api.events import Answer, CallBegun, CallDelta, Text, TextDelta
from ernie_serve.api.response_items import ResponseItems
from ernie_serve.api.schema.response_input import messages_of, read_input
from ernie_serve.billing.free import FreeMeter
from ernie_serve.messages import Grammar, TokenLogprobs

THOUGHT = "I think.\n</think>\n\n"
CALL = '\n<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>\n'
TOOL = {"type": "function", "name": "f", "parameters": {"type": "object"}, "strict": True}
EVENTS: Any = TypeAdapter(ResponseStreamEvent)


def events_of(body: str) -> list[Any]:
    """The events of a stream, each checked against the SDK's own types."""
    events = []
    for block in body.removesuffix("\n\n").split("\n\n"):
        kind, data = block.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert kind == f"event: {event['type']}"
        assert event["sequence_number"] == len(events)
        EVENTS.validate_python(event)
        events.append(event)
    return events


def prompt_of(request: Any) -> str:
    return bytes(i for i in request.prompt_token_ids if i < 256).decode()


def without_ids(item: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in item.items() if name not in ("id", "call_id")}


def test_response_has_openais_shape(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "<response>\nAnswer.\n</response>\n")
    body = respond(instructions="Be brief.", metadata={"a": "b"}).json()
    OpenAIResponse.model_validate(body)
    assert body["object"] == "response"
    assert body["id"].startswith("resp_")
    assert (body["status"], body["error"], body["incomplete_details"]) == ("completed", None, None)
    assert (body["instructions"], body["metadata"], body["store"]) == ("Be brief.", {"a": "b"}, True)
    reasoning, message = body["output"]
    assert reasoning["content"] == [{"type": "reasoning_text", "text": "I think."}]
    assert message["content"] == [{"type": "output_text", "text": "Answer.", "annotations": [], "logprobs": []}]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    usage = body["usage"]
    assert usage["total_tokens"] == usage["input_tokens"] + usage["output_tokens"]
    assert usage["output_tokens_details"] == {"reasoning_tokens": 10}
    assert prompt_of(engine.requests[0]) == "system: Be brief.\nuser: Hi\n\n"


@pytest.mark.parametrize("step", [1, 5, 500])
@pytest.mark.parametrize("reply", ["Just so.", CALL, "Text first.\n" + CALL + CALL, ""])
def test_stream_tells_the_same_response(respond: Any, engine: Any, tagged: Any, step: int, reply: str) -> None:
    engine.reply, engine.step = tagged(THOUGHT + reply), step
    whole = respond(tools=[TOOL]).json()
    events = events_of(respond(tools=[TOOL], stream=True).text)
    kinds = [event["type"] for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done")
    final = events[-1]["response"]
    assert [without_ids(item) for item in final["output"]] == [without_ids(item) for item in whole["output"]]
    assert final["usage"] == whole["usage"]
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == final["output"]
    for index, item in enumerate(final["output"]):
        deltas = "".join(event["delta"] for event in events if event.get("output_index") == index and "delta" in event)
        assert deltas == (item["arguments"] if item["type"] == "function_call" else item["content"][0]["text"])


def test_calls_are_items(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    *_, call = respond(tools=[TOOL], tool_choice={"type": "function", "name": "f"}).json()["output"]
    assert (call["type"], call["name"], json.loads(call["arguments"])) == ("function_call", "f", {"a": 1})
    assert call["call_id"].startswith("call_")
    grammar = json.loads(engine.requests[0].sampling.grammar.text)
    assert grammar["free_text"] is False


def test_response_that_is_cut_off_is_incomplete(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + "A long answer.")
    body = respond(max_output_tokens=15).json()
    assert (body["status"], body["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})
    assert body["output"][-1]["status"] == "incomplete"
    last = events_of(respond(max_output_tokens=15, stream=True).text)[-1]
    assert last["type"] == "response.incomplete"
    assert last["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
    OpenAIResponse.model_validate(last["response"])


def test_response_that_breaks_says_so(respond: Any, engine: Any) -> None:
    engine.break_after = 3
    last = events_of(respond(stream=True).text)[-1]
    assert last["type"] == "response.failed"
    assert last["response"]["status"] == "failed"
    assert last["response"]["error"] == {"code": "server_error", "message": "It broke."}
    assert respond().status_code == 500
    engine.break_after = 0
    assert respond(stream=True).status_code == 500


def test_conversation_goes_on_from_a_kept_response(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    first = respond(tools=[TOOL], instructions="First.").json()
    output = {"type": "function_call_output", "call_id": first["output"][-1]["call_id"], "output": "42"}
    engine.reply = tagged(THOUGHT + "So it is.")
    second = respond(input=[output], previous_response_id=first["id"], instructions="Second.").json()
    assert second["previous_response_id"] == first["id"]
    prompt = prompt_of(engine.requests[-1])
    assert prompt.startswith("system: Second.\nuser: Hi\nassistant: \ncall: ")
    assert "tool: 42" in prompt
    assert "I think" not in prompt
    respond(input="And?", previous_response_id=second["id"])
    assert "assistant: So it is.\nuser: And?" in prompt_of(engine.requests[-1])


def test_stream_is_kept_too(respond: Any, call_thinking: Any) -> None:
    final = events_of(respond(stream=True).text)[-1]["response"]
    assert call_thinking("GET", f"/v1/responses/{final['id']}").json() == final


def test_kept_response_is_retrieved_and_deleted(respond: Any, call_thinking: Any) -> None:
    body = respond().json()
    path = f"/v1/responses/{body['id']}"
    assert call_thinking("GET", path).json() == body
    assert call_thinking("HEAD", path + "/").status_code == 200
    assert call_thinking("DELETE", path).json() == {"id": body["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        response = call_thinking(method, path)
        assert (response.status_code, response.json()["error"]["type"]) == (404, "invalid_request_error")
    error = respond(previous_response_id=body["id"]).json()["error"]
    assert (error["code"], error["param"]) == ("previous_response_not_found", "previous_response_id")


def test_what_is_not_stored_is_not_kept(respond: Any, call_thinking: Any) -> None:
    body = respond(store=False).json()
    assert body["store"] is False
    assert call_thinking("GET", f"/v1/responses/{body['id']}").status_code == 404


def test_kept_response_is_seen_by_its_own_key_alone(call_with: Any) -> None:
    call = call_with(meter=FreeMeter(("sk-a", "sk-b")))
    mine, other = ({"authorization": f"Bearer {key}"} for key in ("sk-a", "sk-b"))
    body = call("POST", "/v1/responses", json={"model": "ernie", "input": "Hi"}, headers=mine).json()
    path = f"/v1/responses/{body['id']}"
    assert call("GET", path, headers=other).status_code == 404
    assert call("DELETE", path, headers=other).status_code == 404
    assert call("GET", path, headers=mine).status_code == 200


ITEMS = [
    {"role": "user", "content": "a"},
    {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "b"}]},
    {"role": "assistant", "content": [{"type": "output_text", "text": "c", "annotations": []}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c1", "output": [{"type": "input_text", "text": "d"}]},
    {"type": "reasoning", "id": "rs_1", "summary": []},
    {"role": "user", "content": "e"},
]


def test_items_become_messages(respond: Any, engine: Any) -> None:
    assert respond(input=ITEMS).status_code == 200
    prompt = prompt_of(engine.requests[0])
    assert prompt.startswith("user: a\nsystem: b\nassistant: c\ncall: ")
    assert prompt.endswith("tool: d\nuser: e\n\n")


def test_input_is_listed_in_pages(respond: Any, call_thinking: Any) -> None:
    path = f"/v1/responses/{respond(input=ITEMS).json()['id']}/input_items"
    whole = call_thinking("GET", path, params={"order": "asc"}).json()
    assert [item["type"] for item in whole["data"]] == [item.get("type", "message") for item in ITEMS]
    assert whole["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
    assert whole["has_more"] is False
    page = call_thinking("GET", path, params={"limit": 3}).json()
    assert [item["id"] for item in page["data"]] == [item["id"] for item in whole["data"][:-4:-1]]
    assert page["has_more"] is True
    rest = call_thinking("GET", path, params={"after": page["last_id"], "limit": 100}).json()
    assert [item["id"] for item in page["data"] + rest["data"]] == [item["id"] for item in whole["data"][::-1]]
    for query in ({"order": "up"}, {"limit": "0"}, {"limit": "x"}, {"after": "nothing"}):
        assert call_thinking("GET", path, params=query).status_code == 400


def test_tokens_are_counted_as_they_would_be_read(respond: Any, call_thinking: Any) -> None:
    fields = {"input": ITEMS, "instructions": "I", "tools": [TOOL]}
    counted = call_thinking("POST", "/v1/responses/input_tokens", json=fields).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": respond(**fields).json()["usage"]["input_tokens"],
    }


def test_text_is_bound_by_its_format(respond: Any, engine: Any) -> None:
    schema = {"type": "object", "properties": {}}
    form = {"type": "json_schema", "name": "n", "schema": schema, "strict": True}
    body = respond(text={"format": form}).json()
    assert body["text"] == {"format": form}
    assert engine.requests[0].sampling.grammar.kind == "json_schema"
    respond(text={"format": {"type": "text"}})
    assert engine.requests[1].sampling.grammar is None


def test_text_is_bound_by_structured_outputs(respond: Any, engine: Any) -> None:
    assert respond(structured_outputs={"regex": "a+"}).status_code == 200
    assert engine.requests[0].sampling.grammar == Grammar("regex", "a+")


def test_logprobs_are_included_where_asked_for(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged("</think>Yes")
    assert respond(top_logprobs=0).status_code == 200
    body = respond(include=["message.output_text.logprobs"], top_logprobs=1).json()
    OpenAIResponse.model_validate(body)
    told = body["output"][0]["content"][0]["logprobs"]
    assert "".join(token["token"] for token in told) == "Yes"
    assert len(told[0]["top_logprobs"]) == 1
    deltas = [e for e in events_of(respond(include=["message.output_text.logprobs"], stream=True).text) if "delta" in e]
    assert [token["token"] for event in deltas for token in event["logprobs"]] == ["Y", "e", "s"]


@pytest.mark.parametrize("step", [1, 3, 1000])
def test_the_tokens_of_a_call_are_nothing_that_was_said(respond: Any, engine: Any, tagged: Any, step: int) -> None:
    engine.reply, engine.step = tagged(THOUGHT + CALL), step
    asked = {"include": ["message.output_text.logprobs"], "tools": [TOOL]}
    whole = respond(**asked).json()
    assert [item["type"] for item in whole["output"]] == ["reasoning", "function_call"]
    last = events_of(respond(**asked, stream=True).text)[-1]
    assert last["type"] == "response.completed"
    assert [without_ids(item) for item in last["response"]["output"]] == [without_ids(item) for item in whole["output"]]


def test_text_and_calls_stay_in_their_order_and_what_was_cut_is_the_last(
    respond: Any, engine: Any, tagged: Any
) -> None:
    engine.reply = tagged(THOUGHT + CALL + "\nThat was a call.")
    length = len(engine.reply) - 5
    whole = respond(tools=[TOOL], max_output_tokens=length).json()
    told = events_of(respond(tools=[TOOL], max_output_tokens=length, stream=True).text)[-1]["response"]
    shape = [(item["type"], item["status"]) for item in whole["output"][1:]]
    assert shape == [("function_call", "completed"), ("message", "incomplete")]
    assert [without_ids(item) for item in told["output"]] == [without_ids(item) for item in whole["output"]]


def test_reasoning_belongs_to_the_assistant_s_message_behind_it(respond: Any, engine: Any) -> None:
    thought = {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "Hm."}]}
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    result = {"type": "function_call_output", "call_id": "c", "output": "d"}
    asked = {"role": "user", "content": "a"}
    messages = messages_of(
        read_input([asked, thought, call, result, thought, {"role": "assistant", "content": "b"}]), None
    )
    assert [message.get("reasoning_content") for message in messages] == [None, "Hm.", None, "Hm."]
    assert messages_of(read_input([asked, thought, asked]), None) == [asked, asked]
    assert respond(input=[asked, {**thought, "content": ["Hm."]}]).status_code == 400


def test_what_a_kept_response_said_may_be_named_instead_of_sent(respond: Any, engine: Any, tagged: Any) -> None:
    engine.reply = tagged(THOUGHT + CALL)
    asked = {"role": "user", "content": "a"}
    items = respond(input=[asked], tools=[TOOL]).json()["output"]
    result = {"type": "function_call_output", "call_id": items[-1]["call_id"], "output": "d"}
    named = [{"type": "item_reference", "id": item["id"]} for item in items]
    assert len({item["id"] for item in items}) == len(items)
    assert respond(input=[asked, *named, result]).status_code == 200
    assert respond(input=[asked, {"id": items[0]["id"]}, named[1], result]).status_code == 200
    assert respond(input=[asked, *items, result]).status_code == 200
    assert prompt_of(engine.requests[1]) == prompt_of(engine.requests[2]) == prompt_of(engine.requests[3])
    for unknown in ("fc_nothing", "fc", items[0]["id"][:-1] + "9"):
        refused = respond(input=[asked, {"type": "item_reference", "id": unknown}])
        assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input[1].id")
    unkept = respond(input=[asked], store=False).json()["output"][0]["id"]
    assert respond(input=[{"type": "item_reference", "id": unkept}]).status_code == 400


def test_items_that_are_named_are_no_more_than_could_have_been_sent(
    respond: Any, engine: Any, tagged: Any, thinking_services: Any
) -> None:
    engine.reply = tagged(THOUGHT + "x" * 200)
    named = {"id": respond().json()["output"][-1]["id"]}
    object.__setattr__(thinking_services, "limits", replace(thinking_services.limits, max_body_bytes=2000))
    assert respond(input=[{"role": "user", "content": "a"}, named]).status_code == 200
    refused = respond(input=[named] * 9)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "input")


def test_log_probabilities_of_text_that_was_held_back_come_with_it() -> None:
    def token(name: str) -> tuple[int, TokenLogprobs]:
        return 0, TokenLogprobs(ord(name), -1.0, [])

    items = ResponseItems("resp_1", lambda event: [{"token": chr(each.token_id)} for _, each in event.logprobs])
    call = [CallBegun(0, 0, "c", "f"), CallDelta(0, 0, "{}"), TextDelta(0, "", [token("c")])]
    for event in (
        TextDelta(0, "", [token("a")]),
        TextDelta(0, "ab", [token("b")]),
        *call,
        TextDelta(0, "d", [token("d")]),
    ):
        items.add(event)
    items.close()
    first, _, last = items.output
    assert [each["token"] for each in first["content"][0]["logprobs"]] == ["a", "b"]
    assert [each["token"] for each in last["content"][0]["logprobs"]] == ["d"]
    events = [TextDelta(0, "", [token("a")]), TextDelta(0, "ab", [token("b")]), *call, TextDelta(0, "d", [token("d")])]
    answer = Answer(0)
    for event in events:
        answer.add(event)
    told = [[chr(each.token_id) for _, each in part.logprobs] for part in answer.parts if isinstance(part, Text)]
    assert told == [["a", "b"], ["d"]]


def test_items_of_one_id_do_not_keep_a_client_paging(respond: Any, call_thinking: Any) -> None:
    items = [{"role": "user", "content": text, "id": "same"} for text in "abc"]
    path = f"/v1/responses/{respond(input=items).json()['id']}/input_items"
    page = call_thinking("GET", path, params={"limit": 1}).json()
    assert call_thinking("GET", path, params={"limit": 1, "after": page["last_id"]}).json()["data"] == []


def test_calls_and_results_are_listed_with_a_status(respond: Any, call_thinking: Any) -> None:
    path = f"/v1/responses/{respond(input=ITEMS).json()['id']}/input_items"
    for item in call_thinking("GET", path).json()["data"]:
        assert item["type"] == "reasoning" or item["status"] == "completed"


def test_effort_is_a_budget(respond: Any, engine: Any) -> None:
    body = respond(reasoning={"effort": "low"}).json()
    assert body["reasoning"] == {"effort": "low", "summary": None}
    assert engine.requests[0].sampling.max_reasoning_tokens == 1024
    respond(thinking_token_budget=9)
    assert engine.requests[1].sampling.max_reasoning_tokens == 9


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"input": None}, "input"),
    ({"input": []}, "input"),
    ({"input": [1]}, "input[0]"),
    ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].id"),
    ({"input": [{"role": "tool", "content": "a"}]}, "input[0].role"),
    ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input[0].content[0].type"),
    ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
    ({"input": [{"type": "function_call_output", "call_id": "c"}]}, "input[0].output"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input"),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ({"tools": [{"type": "function", "name": "a b"}]}, "tools[0].name"),
    ({"max_tokens": 1}, "max_tokens"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    ({"n": 2}, "n"),
    ({"background": True}, "background"),
    ({"truncation": "auto"}, "truncation"),
    (
        {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}},
        "stream_options.continuous_usage_stats",
    ),
    ({"include": ["file_search_call.results"]}, "include"),
    ({"top_logprobs": 1}, "top_logprobs"),
    ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
    ({"text": {"verbosity": "high"}}, "text.verbosity"),
    ({"structured_outputs": {"regex": 1}}, "structured_outputs.regex"),
    ({"structured_outputs": {"regex": "a"}, "text": {"format": {"type": "json_object"}}}, "structured_outputs"),
    ({"conversation": "c"}, "conversation"),
    ({"prompt": {"id": "p"}}, "prompt"),
    ({"context_management": [{"type": "compaction"}]}, "context_management"),
    ({"reasoning": {"effort": "huge"}}, "reasoning.effort"),
    ({"max_output_tokens": 5000}, "max_output_tokens"),
]


@pytest.mark.parametrize(("fields", "param"), WRONG, ids=[f"{n}-{param}" for n, (_, param) in enumerate(WRONG)])
def test_what_is_wrong_is_named(respond: Any, fields: dict[str, Any], param: str) -> None:
    response = respond(**fields)
    assert (response.status_code, response.json()["error"]["param"]) == (400, param)


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/responses/input_tokens"])
def test_who_sends_the_messages_of_a_chat_is_told_their_name_here(call: Any, path: str) -> None:
    response = call("POST", path, json={"model": "ernie", "messages": [{"role": "user", "content": "Hi"}]})
    error = response.json()["error"]
    assert (response.status_code, error["param"]) == (400, "input")
    assert error["message"] == "`input` is missing. Send there what chat takes as `messages`, or a string."
