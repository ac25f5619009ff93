"""OpenAI's response objects, whole and as typed events.

Knows what stands around the items of a response, and keeps it when it is whole. Knows nothing of how its text is made.
"""

import time
from collections.abc import Callable
from itertools import count
from typing import Any

import orjson

from ernie_serve.api.events import Answer, Call, CallBegun, CallDelta, Event, Finished, ReasoningDelta, TextDelta
from ernie_serve.api.logprobs import chat_logprobs
from ernie_serve.api.response_items import ResponseItems, Typed
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import with_usage
from ernie_serve.errors import RequestError
from ernie_serve.text.tokenizer import Tokenizer

Fields = dict[str, Any]


class ResponseFormat:
    """One response. `about` is the object without what its making adds; `keep` is called with the whole one."""

    def __init__(self, tokenizer: Tokenizer, job: Job, about: Fields, keep: Callable[[Fields], None]) -> None:
        self._tokenizer = tokenizer
        self._with_logprobs = job.text.logprobs
        self._about = {**about, "object": "response", "id": job.id, "created_at": int(time.time())}
        self._keep = keep
        self._items = ResponseItems(job.id, self._logprobs)
        self._reason = "stop"
        self._unpaid = False
        self._num_events = 0

    def opening(self) -> bytes:
        """The response as it begins."""
        response = self._response("in_progress")
        return self._spell(
            [("response.created", {"response": response}), ("response.in_progress", {"response": response})]
        )

    def count(self, usage: dict[str, Any]) -> None:
        """Responses tell their usage once."""

    def chunk(self, event: Event) -> bytes:
        """What an event makes of the items."""
        if isinstance(event, Finished):
            self._reason, self._unpaid = event.reason, event.unpaid
            return b""
        return self._spell(self._items.add(event))

    def closing(self, usage: Fields) -> bytes:
        """The end of the open item and of the response."""
        told = self._close()
        response = {**self._ended(), "usage": usage_of(usage)}
        self._keep(response)
        return self._spell([*told, (f"response.{response['status']}", {"response": response})])

    def failure(self, error: RequestError) -> bytes:
        """A response that broke."""
        failed = {"error": {"code": "server_error", "message": error.message}}
        return self._spell([("response.failed", {"response": {**self._response("failed"), **failed}})])

    def whole(self, answers: list[Answer]) -> Callable[[Fields], bytes]:
        """What makes the body of a response in one piece of its usage."""
        (answer,) = answers
        for event in _events_of(answer):
            self.chunk(event)
        self._close()
        response = {name: value for name, value in self._ended().items() if name != "usage"}
        body = orjson.dumps(response)

        def told(usage: Fields) -> bytes:
            used = usage_of(usage)
            self._keep({**response, "usage": used})
            return with_usage(body, used)

        return told

    def _close(self) -> list[Typed]:
        """Close the last item; a response that says nothing has an empty message."""
        begun: list[Typed] = []
        if not any(item["type"] != "reasoning" for item in self._items.output) and self._reason != "length":
            begun = self._items.say(TextDelta(0, ""))
        return [*begun, *self._items.close("incomplete" if self._reason == "length" else "completed")]

    def _ended(self) -> Fields:
        status = "incomplete" if self._reason == "length" else "completed"
        response = self._response(status)
        if status == "incomplete":
            unpaid = {"credit_exhausted": True} if self._unpaid else {}
            response["incomplete_details"] = {"reason": "max_output_tokens", **unpaid}
        else:
            response["completed_at"] = int(time.time())
        return response

    def _response(self, status: str) -> Fields:
        return {**self._about, "status": status, "output": list(self._items.output)}

    def _logprobs(self, event: TextDelta) -> list[Fields]:
        if not self._with_logprobs:
            return []
        told: list[Fields] = chat_logprobs(self._tokenizer, event.logprobs)["content"]
        return told

    def _spell(self, events: list[Typed]) -> bytes:
        spelled = b""
        for kind, fields in events:
            data = orjson.dumps({"type": kind, "sequence_number": self._num_events, **fields})
            spelled += b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
            self._num_events += 1
        return spelled


def usage_of(usage: Fields) -> Fields:
    """Usage as Responses tells it, with what it cost where that is told."""
    return {
        **{name: usage[name] for name in ("cost", "cost_nano_usd") if name in usage},
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {
            "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
            "cache_write_tokens": 0,
        },
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"]},
        "total_tokens": usage["total_tokens"],
    }


def _events_of(answer: Answer) -> list[Event]:
    """The events that a whole answer could have been told with."""
    events: list[Event] = [ReasoningDelta(0, answer.reasoning)] if answer.reasoning else []
    numbers = count()
    if not answer.parts:  # nothing but framing
        events.append(TextDelta(0, "", answer.logprobs))
    for part in answer.parts:
        if isinstance(part, Call):
            number = next(numbers)
            events += [CallBegun(0, number, part.id, part.name), CallDelta(0, number, part.arguments)]
        else:
            events.append(TextDelta(0, part.text, part.logprobs))
    return [*events, Finished(0, answer.reason, unpaid=answer.unpaid)]
