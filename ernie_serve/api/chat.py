"""POST /v1/chat/completions: the next turn of a conversation.

Knows the endpoint's messages and its shapes. Knows nothing of how text is made.
"""

import time
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from ernie_serve.api.answer import Format, answer
from ernie_serve.api.generation import Answer, Event, Finished, Job
from ernie_serve.api.jobs import make_job
from ernie_serve.api.logprobs import chat_logprobs
from ernie_serve.api.schema.chat import ChatRequest, read_messages
from ernie_serve.api.schema.validation import validated
from ernie_serve.api.services import Services
from ernie_serve.errors import InvalidRequest


def router(services: Services) -> APIRouter:
    """The endpoint's route."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await answer(services, request, prepare)

    return routes


def prepare(services: Services, body: dict[str, Any]) -> tuple[Job, Format]:
    """Check a request and render its conversation. Raises `RequestError`."""
    fields = validated(ChatRequest, body)
    services.require_model(fields.model)
    fields.require_supported()
    messages = read_messages(fields.messages)
    if services.template is None:
        told = f"`{services.model_name}` has no chat template: it continues texts. Send the text to /v1/completions."
        raise InvalidRequest(told, param="messages")
    ids = services.template.render(messages, add_generation_prompt=fields.add_generation_prompt is not False)
    if not ids:
        raise InvalidRequest("`messages` hold no text. Say something in one of them.", param="messages")
    job = make_job(services, fields, [ids], chat=True, prompt_param="messages", default_max=None)
    return job, ChatFormat(services, job)


class ChatFormat:
    """OpenAI's chat completion objects. What stays the same from chunk to chunk is encoded once."""

    def __init__(self, services: Services, job: Job) -> None:
        self._tokenizer = services.tokenizer
        self._with_logprobs = job.text.logprobs
        self._about = {
            "id": job.id,
            "object": "chat.completion",
            "created": int(time.time()),
            "model": services.model_name,
            "system_fingerprint": services.fingerprint,
        }
        self._chunk_about = {**self._about, "object": "chat.completion.chunk"}
        self._head = b"data: " + orjson.dumps(self._chunk_about)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"
        self._begun: set[int] = set()

    def chunk(self, event: Event) -> bytes:
        """An event of a stream; the first one of a choice comes after a chunk that says who speaks."""
        opening = b""
        if event.index not in self._begun:
            self._begun.add(event.index)
            opening = self._choice(event.index, b'{"role":"assistant","content":"","refusal":null}', b"null", b"null")
        if isinstance(event, Finished):
            return opening + self._choice(event.index, b"{}", b"null", b'"%b"' % event.reason.encode())
        logprobs = orjson.dumps(chat_logprobs(self._tokenizer, event.logprobs)) if self._with_logprobs else b"null"
        return opening + self._choice(event.index, b'{"content":%b}' % orjson.dumps(event.text), logprobs, b"null")

    def usage_chunk(self, usage: dict[str, Any]) -> bytes:
        """The last chunk of a stream: no choices, and what it all came to."""
        return b"data: %b\n\n" % orjson.dumps({**self._chunk_about, "choices": [], "usage": usage})

    def whole(self, answers: list[Answer], usage: dict[str, Any]) -> bytes:
        """The body of an answer in one piece."""
        choices = [
            {
                "index": each.index,
                "message": {"role": "assistant", "content": each.text, "refusal": None},
                "logprobs": chat_logprobs(self._tokenizer, each.logprobs) if self._with_logprobs else None,
                "finish_reason": each.reason,
            }
            for each in answers
        ]
        return orjson.dumps({**self._about, "choices": choices, "usage": usage})

    def _choice(self, index: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        return b'%b{"index":%d,"delta":%b,"logprobs":%b,"finish_reason":%b}]%b' % (
            self._head,
            index,
            delta,
            logprobs,
            reason,
            self._tail,
        )
