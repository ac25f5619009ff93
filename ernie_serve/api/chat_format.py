"""OpenAI's chat completion objects, whole and in chunks.

Knows the shapes of messages, deltas and calls of functions. Knows nothing of how they come about.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from ernie_serve.api.chunk_frame import ChunkFrame
from ernie_serve.api.events import Answer, CallBegun, CallDelta, Event, Finished, PromptScored, ReasoningDelta
from ernie_serve.api.logprobs import chat_logprobs, prompt_logprobs
from ernie_serve.api.services import Services
from ernie_serve.api.sse import UNPAID
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import with_usage


class ChatFormat(ChunkFrame):
    """Chat completions. `extra` stands beside what all chunks tell, such as a service tier."""

    def __init__(self, services: Services, job: Job, extra: dict[str, Any]) -> None:
        super().__init__(
            services, job, whole="chat.completion", chunk="chat.completion.chunk", said="delta", extra=extra
        )
        self._prompt_ids = job.choices[0].request.prompt_token_ids

    def opening(self) -> bytes:
        """The prompt's token ids in a chunk of their own, if they were asked for."""
        if not self._with_token_ids:
            return b""
        ids = b',"prompt_token_ids":%b' % orjson.dumps(self._prompt_ids)
        return b"%b]%b%b" % (self._head, ids, self._tail)

    def chunk(self, event: Event) -> bytes:
        """An event of a stream; the first one of a choice comes after a chunk that says who speaks."""
        opening, index = b"", event.index
        if index not in self._begun:
            self._begun.add(index)
            opening = self._choice(index, b'{"role":"assistant","content":"","refusal":null}')
        match event:
            case PromptScored():
                return opening
            case Finished():
                end = b'"%b"' % event.reason.encode()
                return opening + self._choice(index, b"{}", reason=end, more=UNPAID if event.unpaid else b"")
            case ReasoningDelta():
                return opening + self._choice(index, b'{"reasoning_content":%b}' % orjson.dumps(event.text))
            case CallBegun():
                function = {"name": event.name, "arguments": ""}
                call = {"index": event.call, "id": event.id, "type": "function", "function": function}
                return opening + self._choice(index, orjson.dumps({"tool_calls": [call]}))
            case CallDelta():
                delta = {"index": event.call, "function": {"arguments": event.arguments}}
                return opening + self._choice(index, orjson.dumps({"tool_calls": [delta]}))
        logprobs, more = b"null", b""
        if self._with_logprobs:
            logprobs = orjson.dumps(chat_logprobs(self._tokenizer, event.logprobs))
        if self._with_token_ids:
            more = b',"token_ids":%b' % orjson.dumps(list(event.token_ids))
        return opening + self._choice(index, b'{"content":%b}' % orjson.dumps(event.text), logprobs, more=more)

    def whole(self, answers: list[Answer]) -> Callable[[dict[str, Any]], bytes]:
        """What makes the body of an answer in one piece of its usage."""
        body: dict[str, Any] = {**self._about, "choices": [self._told(each) for each in answers]}
        if self._with_token_ids:
            body["prompt_token_ids"] = self._prompt_ids
        if answers[0].prompt_logprobs:
            body["prompt_logprobs"] = prompt_logprobs(self._tokenizer, answers[0].prompt_logprobs)
        return partial(with_usage, orjson.dumps(body))

    def _told(self, answer: Answer) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": answer.index,
            "message": message_of(answer),
            "logprobs": chat_logprobs(self._tokenizer, answer.logprobs) if self._with_logprobs else None,
            "finish_reason": answer.reason,
        }
        if answer.unpaid:
            told["credit_exhausted"] = True
        return {**told, "token_ids": answer.token_ids} if self._with_token_ids else told


def message_of(answer: Answer) -> dict[str, Any]:
    """OpenAI's message of an assistant, with its reasoning beside it. Calls alone have no content."""
    message: dict[str, Any] = {
        "role": "assistant",
        "content": answer.text or (None if answer.calls else ""),
        "refusal": None,
    }
    if answer.reasoning:
        message["reasoning_content"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [
            {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
            for call in answer.calls
        ]
    return message
