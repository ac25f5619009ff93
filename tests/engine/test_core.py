from collections import deque

import pytest
from engine_fakes import make_core, make_request, plain_loop
from msgspec import msgpack

from ernie_serve.messages import Abort, EngineCommand, EngineReport, Failed, Generate, Shutdown, Stepped


class ScriptedConnection:
    """Gives the engine its commands, each once so many reports have come back; then the other side is gone."""

    def __init__(self, *script: tuple[int, EngineCommand]) -> None:
        self.script = deque(script)
        self.reports: list[EngineReport] = []
        self.idle_polls = 0

    def poll(self, timeout: float | None = 0.0) -> bool:
        if timeout is None:
            self.idle_polls += 1
            return True
        return bool(self.script) and len(self.reports) >= self.script[0][0]

    def recv_bytes(self) -> bytes:
        if not self.script:
            raise EOFError
        return msgpack.encode(self.script.popleft()[1])

    def send_bytes(self, buf: bytes) -> None:
        self.reports.append(msgpack.decode(buf, type=EngineReport))

    def close(self) -> None: ...

    def tokens(self, request_id: str) -> list[int]:
        return [
            token
            for report in self.reports
            if isinstance(report, Stepped)
            for output in report.outputs
            if output.request_id == request_id
            for token in output.token_ids
        ]


def test_a_step_plans_runs_and_books():
    core = make_core()
    request = make_request("r", [1, 2, 3], max_tokens=2)
    core.add(request)
    outputs = [core.step(), core.step()]
    assert [output.token_ids for (output,) in outputs] == [[token] for token in plain_loop(request, 200)[0]]
    assert not core.has_work
    assert core.step() == []


def test_a_failing_step_ends_its_requests_and_gives_their_blocks_back():
    core = make_core(max_num_seqs=1)
    core.add(make_request("unlucky", [1, 2, 3]))
    core.add(make_request("waiting", [4, 5]))
    core.runner.failures = [RuntimeError("secret text")]
    (output,) = core.step()
    assert (output.request_id, output.finish_reason) == ("unlucky", "error")
    assert "RuntimeError" in output.error
    assert "secret" not in output.error
    core.scheduler.pool.check()
    assert [output.request_id for output in core.step()] == ["waiting"]


def test_nothing_of_a_failed_step_is_found_by_a_later_prompt():
    core = make_core()
    core.add(make_request("unlucky", list(range(20))))
    core.runner.failures = [RuntimeError()]
    core.step()
    core.add(make_request("later", list(range(20))))
    assert core.step()[0].num_cached_tokens == 0


def test_failures_with_a_good_step_between_them_do_not_end_the_engine():
    core = make_core()
    for n in range(4):
        core.add(make_request(f"unlucky {n}", [1, 2, 3]))
        core.runner.failures = [RuntimeError()]
        assert core.step()[0].finish_reason == "error"
        core.add(make_request(f"lucky {n}", [1, 2, 3], max_tokens=1))
        assert core.step()[0].finish_reason == "length"


def test_a_second_failure_in_a_row_is_raised():
    core = make_core()
    core.runner.failures = [ValueError("two"), ValueError("one")]
    core.add(make_request("a", [1]))
    core.step()
    core.add(make_request("b", [1]))
    with pytest.raises(RuntimeError, match="Two steps in a row failed; the last with ValueError: two"):
        core.step()


def test_serve_reports_each_step_once_and_waits_when_idle():
    core = make_core()
    request = make_request("r", [1, 2, 3], max_tokens=5)
    connection = ScriptedConnection((0, Generate(request)))
    core.serve(connection)
    assert connection.tokens("r") == plain_loop(request, 200)[0]
    assert [report.stats.step for report in connection.reports] == [1, 2, 3, 4, 5]
    assert connection.idle_polls == 2  # before the request, and at the end


def test_serve_takes_commands_between_steps():
    core = make_core()
    old, new = make_request("old", [1, 2, 3], max_tokens=9), make_request("new", [4, 5], max_tokens=3)
    connection = ScriptedConnection((0, Generate(old)), (2, Generate(new)), (4, Abort("old")))
    core.serve(connection)
    assert connection.tokens("old") == plain_loop(old, 200)[0][:4]
    assert connection.tokens("new") == plain_loop(new, 200)[0]
    assert connection.reports[-1].stats.blocks_used == 0


def test_serve_reports_the_counts_after_an_abort_that_leaves_it_idle():
    core = make_core()
    connection = ScriptedConnection((0, Generate(make_request("r", [1, 2, 3]))), (1, Abort("r")))
    core.serve(connection)
    assert [report.stats.blocks_used for report in connection.reports] == [1, 0]


def test_serve_ends_on_shutdown_with_requests_running():
    core = make_core()
    connection = ScriptedConnection((0, Generate(make_request("r", [1, 2, 3]))), (3, Shutdown()))
    core.serve(connection)
    assert len(connection.reports) == 3


def test_serve_ends_when_the_other_side_breaks_off():
    class Broken(ScriptedConnection):
        def send_bytes(self, buf: bytes) -> None:
            raise BrokenPipeError

    make_core().serve(Broken((0, Generate(make_request("r", [1, 2, 3])))))


def test_serve_reports_why_the_engine_ends_and_raises():
    core = make_core()
    core.runner.failures = [ConnectionError("two"), ConnectionError("one")]
    connection = ScriptedConnection((0, Generate(make_request("a", [1]))), (1, Generate(make_request("b", [1]))))
    with pytest.raises(RuntimeError, match="Two steps"):
        core.serve(connection)
    assert connection.reports[0].outputs[0].finish_reason == "error"
    assert isinstance(connection.reports[-1], Failed)
    assert "ConnectionError: two" in connection.reports[-1].message


def test_a_request_that_ends_as_it_comes_is_reported():
    core = make_core()
    connection = ScriptedConnection((0, Generate(make_request("r", [], max_tokens=5))))
    core.serve(connection)
    assert connection.reports[0].outputs[0].finish_reason == "error"
