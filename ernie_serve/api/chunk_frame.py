"""What OpenAI's chat and text completions share: what stands around the choices, in chunks and at their end.

Knows ids, models and usage. Knows nothing of what a choice says.
"""

import time
from typing import Any

import orjson

from ernie_serve.api.services import Services
from ernie_serve.api.sse import DONE, error_event
from ernie_serve.api.telling import Job
from ernie_serve.errors import RequestError


class ChunkFrame:
    """What stays the same from chunk to chunk is encoded once.

    `whole` and `chunk` are what OpenAI calls either object, `said` the field of a choice that holds what it says.
    `extra` stands beside all of it.
    """

    def __init__(
        self, services: Services, job: Job, *, whole: str, chunk: str, said: str, extra: dict[str, Any]
    ) -> None:
        self._tokenizer = services.tokenizer
        self._with_logprobs = job.text.logprobs
        self._with_token_ids = job.with_token_ids
        self._about = {
            "id": job.id,
            "object": whole,
            "created": int(time.time()),
            "model": services.model_name,
            "system_fingerprint": "fp_ernie_serve",
            **extra,
        }
        self._said = said.encode()
        self._begun: set[int] = set()
        self._include_usage = job.include_usage
        self._chunk_about = {**self._about, "object": chunk}
        self._head = b"data: " + orjson.dumps(self._chunk_about)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"

    def count(self, usage: dict[str, Any]) -> None:
        """What the chunks from here on tell as the usage so far."""
        self._tail = b',"usage":%b}\n\n' % orjson.dumps(usage)

    def closing(self, usage: dict[str, Any]) -> bytes:
        """The usage, in a chunk without choices, if it was asked for; then the end."""
        if not self._include_usage:
            return DONE
        return b"data: %b\n\n%b" % (orjson.dumps({**self._chunk_about, "choices": [], "usage": usage}), DONE)

    def failure(self, error: RequestError) -> bytes:
        """What a stream that breaks ends with."""
        return error_event(error)

    def _choice(
        self, index: int, said: bytes, logprobs: bytes = b"null", reason: bytes = b"null", more: bytes = b""
    ) -> bytes:
        """A chunk of one choice, from what is spelled already; `more` are fields."""
        return b'%b{"index":%d,"%b":%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._head,
            index,
            self._said,
            said,
            logprobs,
            reason,
            more,
            self._tail,
        )
