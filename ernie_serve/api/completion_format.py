"""OpenAI's text completion objects, whole and in chunks.

Knows their shapes. Knows nothing of how the text comes about.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from ernie_serve.api.events import Answer, Event, Finished, PromptScored, TextDelta
from ernie_serve.api.logprobs import completion_logprobs, placed_prompt, prompt_logprobs
from ernie_serve.api.services import Services
from ernie_serve.api.sse import DONE, UNPAID, error_event
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import with_usage
from ernie_serve.errors import RequestError


class CompletionFormat:
    """What stays the same from chunk to chunk is encoded once.

    With `echo`, the prompt's log-probabilities stand before the answer's own; without it, they stand beside them.
    """

    def __init__(self, services: Services, job: Job, *, echo: bool) -> None:
        self._tokenizer = services.tokenizer
        self._with_logprobs = job.text.logprobs
        self._with_token_ids = job.with_token_ids
        self._include_usage = job.include_usage
        self._skip_special_tokens = job.text.skip_special_tokens
        self._echo = echo
        self._prompts = [(choice.request.prompt_token_ids, choice.opening) for choice in job.choices]
        self._per_prompt = len(job.choices) // (job.choices[-1].prompt_index + 1)
        self._kept = job.keep or self._per_prompt
        self._about = {
            "id": job.id,
            "object": "text_completion",
            "created": int(time.time()),
            "model": services.model_name,
            "system_fingerprint": services.fingerprint,
        }
        self._head = b"data: " + orjson.dumps(self._about)[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if job.include_usage else b"}\n\n"
        self._begun: set[int] = set()

    def opening(self) -> bytes:
        """Nothing stands before the first event."""
        return b""

    def count(self, usage: dict[str, Any]) -> None:
        """What the chunks from here on tell as the usage so far."""
        self._tail = b',"usage":%b}\n\n' % orjson.dumps(usage)

    def chunk(self, event: Event) -> bytes:
        """An event of a stream."""
        text, logprobs, reason, more = "", b"null", b"null", b""
        ids: list[int] = []
        match event:
            case Finished():
                reason = b'"%b"' % event.reason.encode()
                more = UNPAID if event.unpaid else b""
            case PromptScored():
                if not self._echo:
                    return b""
                logprobs = orjson.dumps(self._logprobs_of_prompt(event))
            case TextDelta():
                text, ids = event.text, list(event.token_ids)
                if self._with_logprobs:
                    logprobs = orjson.dumps(completion_logprobs(self._tokenizer, event.logprobs))
        if self._with_token_ids:
            told: dict[str, Any] = {"token_ids": ids}
            if event.index not in self._begun:
                told["prompt_token_ids"], _ = self._prompts[event.index]
            self._begun.add(event.index)
            more += b"," + orjson.dumps(told)[1:-1]
        return b'%b{"index":%d,"text":%b,"logprobs":%b,"finish_reason":%b%b}]%b' % (
            self._head,
            event.index,
            orjson.dumps(text),
            logprobs,
            reason,
            more,
            self._tail,
        )

    def closing(self, usage: dict[str, Any]) -> bytes:
        """The usage, in a chunk without choices, if it was asked for; then the end."""
        if not self._include_usage:
            return DONE
        return b"data: %b\n\n%b" % (orjson.dumps({**self._about, "choices": [], "usage": usage}), DONE)

    def failure(self, error: RequestError) -> bytes:
        """What a stream that breaks ends with."""
        return error_event(error)

    def whole(self, answers: list[Answer]) -> Callable[[dict[str, Any]], bytes]:
        """What makes the body of an answer in one piece of its usage."""
        body = {**self._about, "choices": [self._told(each) for each in answers]}
        return partial(with_usage, orjson.dumps(body))

    def _told(self, answer: Answer) -> dict[str, Any]:
        told: dict[str, Any] = {
            "index": answer.index,
            "text": answer.text,
            "logprobs": self._logprobs(answer) if self._with_logprobs else None,
            "finish_reason": answer.reason,
        }
        if answer.unpaid:
            told["credit_exhausted"] = True
        if self._with_token_ids:
            told |= {"token_ids": answer.token_ids, "prompt_token_ids": self._prompt_of(answer.index)[0]}
        if answer.prompt_logprobs and not self._echo:
            told["prompt_logprobs"] = prompt_logprobs(self._tokenizer, answer.prompt_logprobs)
        return told

    def _prompt_of(self, index: int) -> tuple[list[int], str]:
        return self._prompts[index // self._kept * self._per_prompt]

    def _logprobs(self, answer: Answer) -> dict[str, Any]:
        own = completion_logprobs(self._tokenizer, answer.logprobs)
        if not (self._echo and answer.prompt_logprobs):
            return own
        prompt = self._logprobs_of_prompt(PromptScored(answer.index, answer.prompt_logprobs))
        return {name: values + own[name] for name, values in prompt.items()}

    def _logprobs_of_prompt(self, event: PromptScored) -> dict[str, Any]:
        ids, text = self._prompt_of(event.index)
        is_spelled = self._tokenizer.decode(ids, skip_special_tokens=False) == text  # as the client wrote it
        skips = self._skip_special_tokens and not is_spelled
        places = placed_prompt(self._tokenizer, ids, skip_special_tokens=skips)
        return completion_logprobs(self._tokenizer, list(zip(places, event.logprobs, strict=True)), ids)
