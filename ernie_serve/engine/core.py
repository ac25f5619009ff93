"""The engine's loop: plan a step, run it, take the results.

Knows a scheduler, something that runs plans, and one pipe. Knows nothing about tensors, text or HTTP.
"""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple, Protocol

from ernie_serve.engine import wire
from ernie_serve.engine.admission import Admission
from ernie_serve.engine.constraint import Constraint
from ernie_serve.engine.masks import MaskMaker, Masks
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.errors import DeviceLost
from ernie_serve.grammar.compiler import GrammarCompiler
from ernie_serve.messages import (
    Abort,
    EngineCommand,
    EngineOutput,
    EngineReport,
    EngineRequest,
    Failed,
    Generate,
    Sampled,
    Shutdown,
    Stepped,
    StepPlan,
    Working,
)

logger = logging.getLogger(__name__)

WORKING_SECONDS = 1.0
"""Time after which an engine that computes says that it does, if it has said nothing else."""


class Runner(Protocol):
    """Turns plans into tokens, where it can while the host goes on."""

    def execute(
        self, plan: StepPlan, masks: Masks | None = None, is_wanted: Callable[[], bool] | None = None
    ) -> list[Sampled]:
        """Compute every row of the plan; what was sampled for each row that wants something, in any order.

        `masks` is given where some rows may not yield every token. It waits for the masks, which are made meanwhile,
        so it is called as late as possible: when the logits are there. A long step asks `is_wanted` now and then;
        once that says no, the step may be broken off, and nothing need come of it.
        """

    def launch(self, plan: StepPlan) -> Any:
        """Start a step, which may take a token that the step before still makes; what `collect` wants of it.

        `None` where it has to be executed. What suits once suits for all its steps.
        """

    def collect(self, flight: Any) -> list[Sampled]:
        """Wait for a step that was started, and for none after it."""


class _Flight(NamedTuple):
    plan: StepPlan
    ticket: Any


class EngineCore:
    """One scheduler and one runner. Not safe for threads: one caller at a time.

    Without `grammars` a request that is constrained in any way ends with an error.
    """

    def __init__(self, scheduler: Scheduler, runner: Runner, grammars: GrammarCompiler | None = None) -> None:
        self.scheduler = scheduler
        self.runner = runner
        self.failure: type[Exception] | None = None
        """What the last step failed with; its type alone, since an error holds all that the step had."""
        self._admission = Admission(grammars)
        self._masks = MaskMaker(grammars.vocabulary.bytes_per_mask) if grammars else None
        self._ended: list[EngineOutput] = []  # outputs of requests that ended as they came
        self._connection: wire.Connection | None = None  # while serving
        self._is_closing = False
        self._told_at = 0.0  # when it reported last, by `time.monotonic`
        self._flight: _Flight | None = None  # a step that has been started ahead of the results before it

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return self.scheduler.has_work or self._flight is not None or bool(self._ended) or self._admission.is_waiting

    def add(self, request: EngineRequest) -> None:
        """Queue a request; all its outputs come from `step`."""
        if admitted := self._admission.add(request):
            self._accept(*admitted)

    def abort(self, request_id: str) -> None:
        """Forget a request; no output says so. Unknown ids are ignored."""
        self._admission.abort(request_id)
        self.scheduler.abort(request_id)

    def step(self) -> list[EngineOutput]:
        """Run one step.

        A step that fails ends its requests with an error and the engine goes on; a second failure in a row is
        raised, because what broke does not heal. A device that is lost is raised at once.
        """
        self._admit()
        outputs, self._ended = self._ended, []
        flight, self._flight = self._flight, None
        plan = flight.plan if flight else self.scheduler.schedule()
        if plan is None:
            return outputs
        began = time.monotonic()
        try:
            flight = flight or self._launch(plan)
            sampled = self._collect(flight) if flight else self._execute(plan)
        except DeviceLost:
            raise
        except Exception as error:
            is_second, self.failure = self.failure is not None, type(error)
            self._flight = None  # its requests are those of the plan that failed
            if is_second:
                raise RuntimeError(f"Two steps in a row failed; the last with {_told(error)}") from error
            logger.exception("step %d failed; its %d requests end with an error", plan.step, len(plan.rows))
            return outputs + self.scheduler.fail(plan, f"The engine failed on this request ({type(error).__name__}).")
        self.failure = None
        if self._is_closing:  # the step may have been broken off, and nobody waits for it
            return outputs
        if self.scheduler.has_any_of(plan):  # one that was broken off does not say how long a step takes
            self.scheduler.took(plan, time.monotonic() - began)
        return outputs + self.scheduler.update(plan, sampled)

    def _launch(self, plan: StepPlan) -> _Flight | None:
        """Start a step, if the runner does that and nothing binds its tokens."""
        ticket = None if self.scheduler.constraints(plan) else self.runner.launch(plan)
        return None if ticket is None else _Flight(plan, ticket)

    def _collect(self, flight: _Flight) -> list[Sampled]:
        """Start the step after this one, where it can be known, and then wait for this one."""
        if ahead := self.scheduler.schedule_ahead(flight.plan):
            self._flight = self._launch(ahead)
            assert self._flight, "what follows a recorded step can be recorded"
        return self.runner.collect(flight.ticket)

    def _admit(self) -> None:
        """Let in the requests whose grammars are ready; wait a moment for one when there is nothing else to do."""
        if self._admission.is_waiting:
            for admitted in self._admission.take(patiently=not self.scheduler.has_work and not self._ended):
                self._accept(*admitted)

    def _accept(self, request: EngineRequest, constraint: Constraint | None, error: str) -> None:
        ended = EngineOutput(request_id=request.request_id, finish_reason="error", error=error) if error else None
        if ended := ended or self.scheduler.add(request, constraint):
            self._ended.append(ended)

    def _execute(self, plan: StepPlan) -> list[Sampled]:
        """Run a plan, while the masks of its rows are made in another thread."""
        is_wanted = partial(self._is_wanted, plan) if self._connection else None
        constraints = self.scheduler.constraints(plan)
        if not constraints:
            return self.runner.execute(plan, None, is_wanted)
        assert self._masks is not None, "a constrained request got past admission"
        masks = self._masks.start(constraints)
        if masks is None:
            return self.runner.execute(plan, None, is_wanted)
        try:
            return self.runner.execute(plan, masks, is_wanted)
        finally:
            self._masks.wait()

    def _is_wanted(self, plan: StepPlan) -> bool:
        """Whether anybody still waits for a plan that is being computed, by the commands that have come meanwhile."""
        assert self._connection is not None, "only a served engine is asked"
        try:
            if time.monotonic() - self._told_at > WORKING_SECONDS:
                self._tell(self._connection, Working())
            self._is_closing = self._is_closing or not self._obey_commands(self._connection, 0.0)
        except (EOFError, ConnectionError):
            self._is_closing = True  # the loop finds out for itself
        return not self._is_closing and self.scheduler.has_any_of(plan)

    def serve(self, connection: wire.Connection) -> None:
        """Obey commands until `Shutdown` or until the other side is gone; report every step in one message.

        A command is always followed by a report, and a step that takes long says so now and then.
        Waits without using the processor while there is no work. An exception that ends the engine is reported
        as `Failed`, then raised.
        """
        self._connection = connection
        try:
            while not self._is_closing and self._obey_commands(connection, 0.0 if self.has_work else None):
                self._told_at = time.monotonic()  # nothing was to be said while there was no work
                self._tell(connection, Stepped(self.step(), self.scheduler.stats))
        except (EOFError, ConnectionError):
            logger.info("the other side of the pipe is gone; the engine ends")
        except Exception as error:
            logger.exception("the engine ends")
            with suppress(OSError):
                wire.send(connection, Failed(_told(error)))
            raise

    def _tell(self, connection: wire.Connection, report: EngineReport) -> None:
        wire.send(connection, report)
        self._told_at = time.monotonic()

    def _obey_commands(self, connection: wire.Connection, patience: float | None) -> bool:
        """Take all commands that are there, waiting for the first as long as `patience` says; False is the end."""
        while connection.poll(patience):
            if not self._obey(wire.receive_command(connection)):
                return False
            patience = 0.0
        return True

    def _obey(self, command: EngineCommand) -> bool:
        match command:
            case Generate(request):
                self.add(request)
            case Abort(request_id):
                self.abort(request_id)
            case Shutdown():
                return False
        return True


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
