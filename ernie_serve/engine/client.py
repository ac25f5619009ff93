"""The API's hold on the engine: start a request, read its outputs, abort it.

Knows messages and one pipe. Knows nothing about tensors, text or HTTP.
"""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

from ernie_serve.messages import EngineInfo, EngineOutput, EngineRequest, EngineStats

EngineState = Literal["loading", "ready", "failed", "closed"]


class EngineClient(Protocol):
    """What the API sees of an engine, whether it runs in another process or in this one."""

    @property
    def state(self) -> EngineState:
        """Whether requests are taken."""

    @property
    def progress(self) -> tuple[float, str]:
        """How far loading is: a share between 0 and 1, and what is being done."""

    @property
    def failure(self) -> str:
        """Why the engine ended, if it did; empty otherwise."""

    @property
    def info(self) -> EngineInfo | None:
        """What the engine said of itself when it was ready."""

    @property
    def stats(self) -> EngineStats:
        """The counts after the last step."""

    def generate(self, request: EngineRequest) -> AsyncIterator[EngineOutput]:
        """Run a request; the last output has a `finish_reason`.

        Leaving the iterator early (closing it, or cancelling the task that reads it) aborts the request.
        Raises `EngineUnavailable` when the engine is not ready or ends before the request does.
        """

    def abort(self, request_id: str) -> None:
        """Stop a request; its iterator ends with finish_reason "abort". Unknown ids are ignored."""

    async def close(self) -> None:
        """End the engine. Requests still running end with `EngineUnavailable`."""
