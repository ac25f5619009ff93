"""OpenAI's text completion objects, whole and in chunks.

Knows their shapes. Knows nothing of how the text comes about.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import orjson

from ernie_serve.api.chunk_frame import ChunkFrame
from ernie_serve.api.events import Answer, Event, Finished, PromptScored, TextDelta
from ernie_serve.api.logprobs import completion_logprobs, placed_prompt, prompt_logprobs
from ernie_serve.api.services import Services
from ernie_serve.api.sse import UNPAID
from ernie_serve.api.telling import Job
from ernie_serve.api.whole import with_usage


class CompletionFormat(ChunkFrame):
    """With `echo`, the prompt's log-probabilities stand before the answer's own; without it, they stand beside them."""

    def __init__(self, services: Services, job: Job, *, echo: bool) -> None:
        super().__init__(services, job, whole="text_completion", chunk="text_completion", said="text", extra={})
        self._skip_special_tokens = job.text.skip_special_tokens
        self._echo = echo
        self._prompts = [(choice.request.prompt_token_ids, choice.opening) for choice in job.choices]
        self._per_prompt = len(job.choices) // (job.choices[-1].prompt_index + 1)
        self._kept = job.keep or self._per_prompt

    def opening(self) -> bytes:
        """Nothing stands before the first event."""
        return b""

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
        return self._choice(event.index, orjson.dumps(text), logprobs, reason, more)

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
