"""A queue of one request's outputs that holds at most one: what is not yet read is merged.

Knows how outputs add up. Knows nothing about where they come from. Belongs to one event loop.
"""

import asyncio

from ernie_serve.messages import EngineOutput, TokenLogprobs


class OutputQueue:
    """Between an engine that never waits and a reader that may be slow."""

    def __init__(self) -> None:
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] = []
        self._prompt_logprobs: list[TokenLogprobs] = []
        self._last: EngineOutput | None = None
        self._num_cached = 0
        self._began_at: float | None = None
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def put(self, output: EngineOutput) -> None:
        """Add an output to what is unread."""
        self._token_ids += output.token_ids
        self._logprobs += output.logprobs
        self._prompt_logprobs += output.prompt_logprobs
        self._last = output
        self._num_cached = max(self._num_cached, output.num_cached_tokens)
        self._began_at = self._began_at or output.began_at
        self._news.set()

    def fail(self, error: Exception) -> None:
        """End the queue: once all is read, the reader gets this error."""
        self._error = error
        self._news.set()

    async def get(self) -> EngineOutput:
        """Everything unread as one output; waits while there is nothing. Raises what `fail` was given."""
        await self._news.wait()
        last = self._last
        if last is None:
            assert self._error is not None, "news without an output or an error"
            raise self._error
        merged = EngineOutput(
            request_id=last.request_id,
            token_ids=self._token_ids,
            logprobs=self._logprobs,
            prompt_logprobs=self._prompt_logprobs,
            finish_reason=last.finish_reason,
            stop_token_id=last.stop_token_id,
            num_cached_tokens=self._num_cached,
            began_at=self._began_at,
            error=last.error,
            error_code=last.error_code,
        )
        self._token_ids, self._logprobs, self._prompt_logprobs, self._last = [], [], [], None
        if self._error is None:
            self._news.clear()
        return merged
