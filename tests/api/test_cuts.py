"""Random answers in random cuts: merged or not, streamed or whole, every endpoint tells the same."""

import json
import random
from typing import Any

import pytest

from ernie_serve.api import chat, completions, responses
from ernie_serve.api.events import Answer, Finished
from ernie_serve.api.response_store import ResponseStore
from ernie_serve.api.telling import Telling
from ernie_serve.messages import EngineOutput, TokenLogprobs

EOS = 256
PIECES = ["Yes", " é🎉", "\n", "\n\n", " ", "<", "{", "}", "ab</b>", "\xff"]
TAGS = ["<think>", "</think>", "<response>", "</response>", "<tool_call>", "</tool_call>"]
CALLS = [f'<tool_call>\n{{"name": "{name}", "arguments": {{"a": [1]}}}}\n</tool_call>' for name in ("f", "g")]
FUNCTION = {"name": "f", "parameters": {"type": "object"}}
STOPS = ["e", "é", "\n", "</", "Yes", "}"]
USAGE = {
    "prompt_tokens": 1,
    "completion_tokens": 1,
    "total_tokens": 2,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


def some_ids(chance: random.Random, tagged: Any) -> list[int]:
    """Pieces, tags as tokens and in letters, and calls, some of them broken off."""
    ids: list[int] = tagged("<think>", parse_special=False) if chance.random() < 0.2 else []
    for _ in range(chance.randint(0, 9)):
        piece = chance.choice([chance.choice(PIECES), chance.choice(TAGS), chance.choice(CALLS)])
        piece_ids = tagged(piece, parse_special=chance.random() < 0.7)
        ids += piece_ids[: chance.randint(1, len(piece_ids))] if chance.random() < 0.2 else piece_ids
    return [*ids, EOS]


def some_body(chance: random.Random, endpoint: str) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "ernie", "seed": 1}
    for name, value in (("include_stop_str_in_output", True), ("skip_special_tokens", False), ("min_tokens", 5)):
        if chance.random() < 0.2:
            body[name] = value
    if chance.random() < 0.4:
        body["stop"] = chance.sample(STOPS, 2)
    scored, calls = chance.random() < 0.7, chance.random() < 0.6
    if endpoint == "completions":
        return body | {"prompt": "é", "max_tokens": 99} | ({"logprobs": 0} if scored else {})
    if chance.random() < 0.5:
        body["add_generation_prompt"] = False  # the answer then begins before any reasoning
    if calls:
        body |= {"parallel_tool_calls": chance.random() < 0.7}
    if endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": "Hi"}]} | ({"logprobs": True} if scored else {})
        return body | ({"tools": [{"type": "function", "function": FUNCTION}]} if calls else {})
    body |= {"input": "Hi"} | ({"include": ["message.output_text.logprobs"]} if scored else {})
    return body | ({"tools": [{"type": "function", "strict": False, **FUNCTION}]} if calls else {})


def prepared(services: Any, endpoint: str, body: dict[str, Any]) -> Any:
    if endpoint == "responses":
        return responses.Preparation(ResponseStore(), b"").prepare(services, body)
    return {"chat": chat, "completions": completions}[endpoint].prepare(services, body)


def told(services: Any, endpoint: str, body: dict[str, Any], ids: list[int], cuts: list[int], reason: str) -> Any:
    """What is told of these ids, cut like this: in one piece, and added up from a stream."""
    (job, whole), (_, stream) = (prepared(services, endpoint, body) for _ in range(2))
    telling, answer, events = Telling(services.tokenizer, job.choices[0], job), Answer(0), []
    for start, end in zip([0, *cuts], [*cuts, len(ids)], strict=True):
        output = EngineOutput(
            request_id="r",
            token_ids=ids[start:end],
            logprobs=[TokenLogprobs(ids[at], -float(at), []) for at in range(start, end)] if job.text.logprobs else [],
            finish_reason=reason if end == len(ids) else None,
            stop_token_id=EOS if end == len(ids) else None,
        )
        events += telling.push(output)
        if events and isinstance(events[-1], Finished):
            break
    for event in events:
        answer.add(event)
    chunks = stream.opening() + b"".join(map(stream.chunk, events)) + stream.closing(USAGE)
    data = [json.loads(line[6:]) for line in chunks.decode().splitlines() if line.startswith("data: {")]
    one = json.loads(whole.whole([answer])(USAGE))
    return one, data


def of_response(response: dict[str, Any]) -> Any:
    items = [
        {name: value for name, value in item.items() if name not in ("id", "call_id")} for item in response["output"]
    ]
    return response["status"], items


def added_up(chunks: list[dict[str, Any]]) -> Any:
    parts: dict[str, list[Any]] = {"text": [], "reasoning": [], "calls": [], "logprobs": [], "reason": []}
    for choice in (choice for chunk in chunks for choice in chunk["choices"]):
        delta = choice.get("delta", choice)
        parts["text"].append(delta.get("content") or delta.get("text") or "")
        parts["reasoning"].append(delta.get("reasoning_content") or "")
        for call in delta.get("tool_calls", []):
            parts["calls"].append(call["function"].get("name", "") + call["function"]["arguments"])
        parts["logprobs"] += of_tokens(choice["logprobs"])
        parts["reason"].append(choice["finish_reason"] or "")
    return *("".join(parts[name]) for name in ("text", "reasoning", "calls", "reason")), parts["logprobs"]


def of_choice(choice: dict[str, Any]) -> Any:
    message = choice.get("message", choice)
    calls = [call["function"]["name"] + call["function"]["arguments"] for call in message.get("tool_calls", [])]
    text, reasoning = message.get("content") or message.get("text") or "", message.get("reasoning_content", "")
    return text, reasoning, "".join(calls), choice["finish_reason"], of_tokens(choice["logprobs"])


def of_tokens(logprobs: Any) -> list[Any]:
    if not logprobs:
        return []
    if "content" in logprobs:
        return [token["logprob"] for token in logprobs["content"]]
    return list(zip(logprobs["token_logprobs"], logprobs["text_offset"], strict=True))


def seen_in(
    services: Any, endpoint: str, body: dict[str, Any], ids: list[int], cuts: list[int], reason: str
) -> list[Any]:
    one, data = told(services, endpoint, body, ids, cuts, reason)
    if endpoint == "responses":
        return [of_response(one), of_response(data[-1]["response"])]
    return [of_choice(one["choices"][0]), added_up(data)]


@pytest.mark.parametrize("endpoint", ["chat", "responses", "completions"])
def test_the_same_is_told_however_it_is_cut(thinking_services: Any, tagged: Any, endpoint: str) -> None:
    chance = random.Random(1)
    for _ in range(150):
        ids, body, reason = some_ids(chance, tagged), some_body(chance, endpoint), chance.choice(["stop", "length"])
        seen = []
        for num_cuts in (len(ids) - 1, 0, 2, 5):
            cuts = sorted(chance.sample(range(1, len(ids)), min(num_cuts, len(ids) - 1)))
            seen += seen_in(thinking_services, endpoint, body, ids, cuts, reason)
        assert all(each == seen[0] for each in seen[1:]), (body, ids)


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("text", ["<think>Hm.</think>Yes", "Yes" + CALLS[0], "<response>\n</response>\n", "<think>"])
@pytest.mark.parametrize("parse_special", [True, False])
def test_log_probabilities_do_not_depend_on_cuts(
    thinking_services: Any, tagged: Any, endpoint: str, text: str, parse_special: bool
) -> None:
    ids = [*tagged(text, parse_special=parse_special), EOS]
    body = {"model": "ernie", "add_generation_prompt": False}
    if endpoint == "chat":
        body |= {"messages": [{"role": "user", "content": "Hi"}], "logprobs": True}
        body |= {"tools": [{"type": "function", "function": FUNCTION}]}
    else:
        body |= {"input": "Hi", "include": ["message.output_text.logprobs"]}
        body |= {"tools": [{"type": "function", "strict": False, **FUNCTION}]}
    seen = [
        each
        for cuts in ([], [2], [3, 5], list(range(1, len(ids))))
        for each in seen_in(thinking_services, endpoint, body, ids, [cut for cut in cuts if cut < len(ids)], "stop")
    ]
    assert all(each == seen[0] for each in seen[1:])
