"""What a request passes before it is scheduled: its grammar is compiled, which may take a while.

Knows requests, grammars and constraints. Knows nothing about blocks, steps or tensors. Requests without a grammar go
straight through; those with one wait here and hold up nobody.
"""

from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from ernie_serve.engine.constraint import Constraint
from ernie_serve.errors import InvalidRequest
from ernie_serve.grammar.compiler import GrammarCompiler
from ernie_serve.grammar.matcher import Matcher
from ernie_serve.messages import EngineRequest

Admitted = tuple[EngineRequest, Constraint | None, str]
"""A request that is ready, what binds it, and why it cannot run, if it cannot."""


class Admission:
    """Requests between their arrival and the scheduler. Not safe for threads; compiles in threads of its own."""

    def __init__(self, grammars: GrammarCompiler | None, *, patience_seconds: float = 0.01) -> None:
        self._grammars = grammars
        self._patience_seconds = patience_seconds
        self._threads = ThreadPoolExecutor(2, thread_name_prefix="grammars")
        self._compiling: dict[str, tuple[EngineRequest, Future[Matcher]]] = {}

    @property
    def is_waiting(self) -> bool:
        """Whether a request waits for its grammar."""
        return bool(self._compiling)

    def add(self, request: EngineRequest) -> Admitted | None:
        """A request that needs no waiting, at once; another comes out of `take` once it is ready."""
        sampling, grammars = request.sampling, self._grammars
        if not sampling.is_constrained:
            return request, None, ""
        if grammars is None:
            return request, None, "This engine has no vocabulary to constrain answers with."
        if request.request_id in self._compiling:
            return request, None, f"A request with the id {request.request_id!r} is under way; ids must differ."
        if sampling.grammar is None:
            return request, Constraint(sampling, grammars.vocabulary.size), ""
        if matcher := grammars.cached(sampling.grammar):
            return request, Constraint(sampling, grammars.vocabulary.size, matcher), ""
        self._compiling[request.request_id] = (request, self._threads.submit(grammars.matcher, sampling.grammar))
        return None

    def abort(self, request_id: str) -> None:
        """Forget a request; unknown ids are ignored."""
        if found := self._compiling.pop(request_id, None):
            found[1].cancel()

    def take(self, *, patiently: bool) -> Iterator[Admitted]:
        """What has become ready, each request once; `patiently` it waits a moment for the first."""
        if patiently and self._compiling:
            futures = [future for _, future in self._compiling.values()]
            wait(futures, timeout=self._patience_seconds, return_when=FIRST_COMPLETED)
        for request_id, (request, future) in list(self._compiling.items()):
            if future.done():
                del self._compiling[request_id]
                yield self._compiled(request, future)

    def _compiled(self, request: EngineRequest, future: Future[Matcher]) -> Admitted:
        assert self._grammars is not None, "only a compiler compiles"
        try:
            matcher = future.result()
        except InvalidRequest as error:
            return request, None, error.message
        return request, Constraint(request.sampling, self._grammars.vocabulary.size, matcher), ""
