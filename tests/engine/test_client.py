"""A client over real pipes: the engine runs in a process of its own, or is played by the test."""

import asyncio
import subprocess
import sys
from collections import Counter
from contextlib import aclosing
from multiprocessing import Pipe
from pathlib import Path

import pytest
from engine_fakes import make_core, make_info, make_request, plain_loop

from ernie_serve.engine import client as client_module
from ernie_serve.engine import wire
from ernie_serve.engine.client import ProcessClient
from ernie_serve.errors import EngineFailure, EngineUnavailable
from ernie_serve.messages import (
    Abort,
    EngineOutput,
    EngineStats,
    Failed,
    Generate,
    Loading,
    Ready,
    Shutdown,
    Stepped,
    Working,
)


class PlayedProcess:
    """The process handle of an engine that the test plays at the other end of the pipe."""

    def __init__(self, pipe, exit_code: int) -> None:
        self.exit_code = exit_code
        self.pipe = pipe
        self.calls: list[str] = []

    def wait(self, timeout: float | None = None) -> int:
        return self.exit_code

    def terminate(self) -> None:
        self.calls.append("terminate")
        self.pipe.close()

    def kill(self) -> None:
        self.calls.append("kill")


class PlayedEngine:
    """The far end of a client's pipe, in the hands of a test."""

    def __init__(self, exit_code: int = 0) -> None:
        ours, self.pipe = Pipe()
        self.process = PlayedProcess(self.pipe, exit_code)
        self.client = ProcessClient(ours, self.process, close_timeout_seconds=5)

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_):
        self.pipe.close()
        await self.client.close()

    def say(self, *reports) -> None:
        for report in reports:
            wire.send(self.pipe, report)

    async def ready(self):
        self.say(Ready(make_info(make_core())))
        await until(lambda: self.client.state == "ready")

    async def hear(self):
        """The client's next command."""
        return await asyncio.to_thread(wire.receive_command, self.pipe)


async def until(condition) -> None:
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is awaited changes in another thread
            await asyncio.sleep(0.001)


def stepped(*outputs: EngineOutput, **counts) -> Stepped:
    return Stepped(list(outputs), EngineStats(**counts))


def output(request_id: str, *token_ids: int, **fields) -> EngineOutput:
    return EngineOutput(request_id=request_id, token_ids=list(token_ids), **fields)


async def collect(client, request) -> list[EngineOutput]:
    return [output async for output in client.generate(request)]


def test_it_follows_loading_until_ready_and_takes_no_requests_before():
    async def scenario():
        async with PlayedEngine() as engine:
            client = engine.client
            engine.say(Loading(0.5, "shard 1 of 2"))
            await until(lambda: client.progress == (0.5, "shard 1 of 2"))
            assert (client.state, client.info) == ("loading", None)
            with pytest.raises(EngineUnavailable, match=r"still loading \(50%, shard 1 of 2\)") as caught:
                await collect(client, make_request("r", [1]))
            assert caught.value.retry_after_seconds
            await engine.ready()
            assert client.info is not None
            assert client.failure == ""

    asyncio.run(scenario())


class Turns:
    """Counts the turns of the event loop."""

    number = 0

    def count(self):
        self.number += 1
        asyncio.get_running_loop().call_soon(self.count)


def test_each_request_gets_its_own_outputs():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            readers = [asyncio.ensure_future(collect(engine.client, make_request(name, [1]))) for name in "ab"]
            assert {(await engine.hear()).request.request_id for _ in "ab"} == {"a", "b"}
            engine.say(
                stepped(output("a", 1), output("b", 2)),
                stepped(output("b", 4, finish_reason="stop"), output("a", 3), step=2),
                stepped(output("a", 5, finish_reason="length"), step=3),
            )
            texts = [[token for output in await reader for token in output.token_ids] for reader in readers]
            assert texts == [[1, 3, 5], [2, 4]]
            assert engine.client.stats.step == 3

    asyncio.run(scenario())


def test_what_ends_is_handed_out_eight_in_a_turn_and_what_goes_on_one_in_a_turn():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            turns, came = Turns(), []

            async def read(name):
                async for _ in engine.client.generate(make_request(name, [1])):
                    came.append((turns.number, name[0]))
                    if name[0] == "g":
                        break

            names = [f"e{i}" for i in range(20)] + [f"g{i}" for i in range(5)]
            readers = [asyncio.ensure_future(read(name)) for name in names]
            for _ in names:
                await engine.hear()
            turns.count()
            told = [output(name, 1, finish_reason="stop" if name[0] == "e" else None) for name in names]
            engine.say(stepped(*reversed(told)))
            await asyncio.gather(*readers)
            groups = Counter(came)
            assert [groups[each] for each in sorted(groups)] == [8, 8, 4, 1, 1, 1, 1, 1]
            assert "".join(kind for _, kind in came) == 20 * "e" + 5 * "g"

    asyncio.run(scenario())


def test_a_step_is_handed_out_one_by_one_whatever_was_left_of_the_step_before():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            turns, came = Turns(), []

            async def read(name):
                async for each in engine.client.generate(make_request(name, [1])):
                    if 2 in each.token_ids:
                        came.append(turns.number)
                        break

            names = [f"r{index}" for index in range(30)]
            readers = [asyncio.ensure_future(read(name)) for name in names]
            for _ in names:
                await engine.hear()
            turns.count()
            engine.say(*[stepped(*[output(name, token) for name in names], step=token) for token in (1, 2)])
            await asyncio.gather(*readers)
            assert len(set(came)) == len(names)

    asyncio.run(scenario())


def test_what_ends_is_told_before_what_goes_on_and_no_step_overtakes_another():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            told: list[tuple[str, list[int]]] = []

            async def follow(name: str) -> None:
                async for each in engine.client.generate(make_request(name, [1])):
                    told.append((name, each.token_ids))

            names = [f"r{index}" for index in range(20)]
            readers = [asyncio.ensure_future(follow(name)) for name in names]
            for _ in names:
                await engine.hear()
            first = [output(name, 0) for name in names[:-1]] + [output("r19", 0, finish_reason="length")]
            engine.say(stepped(*first))
            await readers[-1]
            await until(lambda: len(told) == 20)
            assert told[0] == ("r19", [0])
            engine.say(
                *[stepped(*[output(name, n) for name in names[:-1]]) for n in range(1, 50)],
                stepped(*[output(name, finish_reason="length") for name in names[:-1]]),
            )
            await asyncio.gather(*readers)
            for name in names[:-1]:
                assert [token for each, tokens in told if each == name for token in tokens] == list(range(50))

    asyncio.run(scenario())


def test_a_slow_reader_gets_many_steps_at_once_and_holds_up_nobody():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            async with aclosing(engine.client.generate(make_request("slow", [1]))) as slow:
                first = asyncio.ensure_future(anext(slow))
                await engine.hear()
                engine.say(stepped(output("slow", 0)))
                assert (await first).token_ids == [0]
                other = asyncio.ensure_future(collect(engine.client, make_request("quick", [1])))
                await engine.hear()
                engine.say(*[stepped(output("slow", n), output("quick", n)) for n in range(1, 50)])
                engine.say(stepped(output("slow", 50, finish_reason="length"), output("quick", finish_reason="length")))
                assert [t for output in await other for t in output.token_ids] == list(range(1, 50))
                merged = await anext(slow)
                assert (merged.token_ids, merged.finish_reason) == (list(range(1, 51)), "length")

    asyncio.run(scenario())


def test_a_reader_that_leaves_early_aborts():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = engine.client.generate(make_request("r", [1]))
            first = asyncio.ensure_future(anext(reader))
            assert isinstance(await engine.hear(), Generate)
            engine.say(stepped(output("r", 1)))
            await first
            await reader.aclose()
            assert await engine.hear() == Abort("r")

    asyncio.run(scenario())


def test_cancelling_a_reader_that_waits_aborts():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            assert isinstance(await engine.hear(), Generate)
            reader.cancel()
            assert await engine.hear() == Abort("r")

    asyncio.run(scenario())


def test_leaving_aborts_once_and_what_a_step_still_made_is_dropped():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            reader.cancel()
            await asyncio.wait([reader])
            engine.say(stepped(output("r", 1)))  # of a step that was under way
            assert await engine.hear() == Abort("r")
            closing = asyncio.ensure_future(engine.client.close())
            assert await engine.hear() == Shutdown()
            engine.pipe.close()
            await closing

    asyncio.run(scenario())


def test_a_finished_request_is_not_aborted():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            engine.say(stepped(output("r", 1, finish_reason="stop")))
            await reader
            closing = asyncio.ensure_future(engine.client.close())
            assert await engine.hear() == Shutdown()
            engine.pipe.close()
            await closing

    asyncio.run(scenario())


def test_an_id_that_is_under_way_is_refused():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            with pytest.raises(ValueError, match="ids must differ"):
                await collect(engine.client, make_request("r", [1]))
            reader.cancel()
            await asyncio.wait([reader])

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("exit_code", "reason"),
    [
        (3, "ended with exit code 3"),
        (-6, "was ended by signal 6."),
        (-9, "was ended by signal 9. The system does that when memory runs out: try --quantization int4"),
    ],
    ids=["exit", "signal", "memory"],
)
def test_the_end_of_the_engine_reaches_every_reader(exit_code, reason):
    async def scenario():
        async with PlayedEngine(exit_code) as engine:
            await engine.ready()
            readers = [asyncio.ensure_future(collect(engine.client, make_request(name, [1]))) for name in "ab"]
            for _ in readers:
                await engine.hear()
            engine.pipe.close()
            for reader in readers:
                with pytest.raises(EngineUnavailable, match=reason):
                    await reader
            assert engine.client.state == "failed"
            assert reason in engine.client.failure
            with pytest.raises(EngineUnavailable, match=reason):
                await collect(engine.client, make_request("late", [1]))

    asyncio.run(scenario())


def test_the_engines_own_reason_counts():
    async def scenario():
        async with PlayedEngine(1) as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            engine.say(Failed("out of memory"))
            engine.pipe.close()
            with pytest.raises(EngineUnavailable, match="out of memory"):
                await reader
            assert engine.client.failure == "out of memory"

    asyncio.run(scenario())


def test_an_unreadable_report_ends_the_engine_for_us():
    async def scenario():
        async with PlayedEngine() as engine:
            engine.pipe.send_bytes(b"\xc1")
            await until(lambda: engine.client.state == "failed")
            assert "could not be read" in engine.client.failure

    asyncio.run(scenario())


@pytest.mark.parametrize("fields", [{"top_k": 10**30}, {"logit_bias": {10**30: 1.0}}])
def test_a_request_that_cannot_be_told_ends_alone(monkeypatch, fields):
    async def scenario():
        async with PlayedEngine() as engine:
            client, clock = engine.client, Clock(monkeypatch)
            await engine.ready()
            reader = asyncio.ensure_future(collect(client, make_request("r", [1])))
            await engine.hear()
            async with asyncio.timeout(20):
                with pytest.raises(EngineFailure, match=r"could not be told to the engine \(OverflowError\)"):
                    await collect(client, make_request("huge", [1], **fields))
            assert await engine.hear() == Abort("huge")
            engine.say(stepped(output("r", 5, finish_reason="stop")))
            assert [each.token_ids for each in await reader] == [[5]]
            clock.now += 100
            assert (client.state, client.silent_seconds) == ("ready", 0)

    asyncio.run(scenario())


def test_closing_ends_readers_and_asks_the_engine_to_end():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            closing = asyncio.ensure_future(engine.client.close())
            assert await engine.hear() == Shutdown()
            engine.pipe.close()
            await closing
            with pytest.raises(EngineUnavailable, match="shutting down"):
                await reader
            assert engine.client.state == "closed"
            assert engine.process.calls == []
            await engine.client.close()

    asyncio.run(scenario())


def test_closing_while_it_loads_does_not_wait_for_it():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.client.close()
            assert engine.process.calls == ["terminate"]

    asyncio.run(scenario())


class RealEngine:
    """`fakes.py` in a process of its own."""

    def __init__(self) -> None:
        ours, theirs = Pipe()
        script = str(Path(__file__).with_name("fakes.py"))
        self.process = subprocess.Popen([sys.executable, script, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        self.client = ProcessClient(ours, self.process, close_timeout_seconds=20)

    async def __aenter__(self):
        await until(lambda: self.client.state == "ready")
        return self

    async def __aexit__(self, *_):
        await self.client.close()


class Clock:
    """A client's time, which passes when the test says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(client_module, "time", self)

    def monotonic(self) -> float:
        return self.now


def test_an_engine_is_silent_while_it_owes_a_word_and_not_while_it_idles(monkeypatch):
    async def scenario():
        async with PlayedEngine() as engine:
            client, clock = engine.client, Clock(monkeypatch)
            clock.now += 100
            assert client.silent_seconds == 0  # while loading
            await engine.ready()
            clock.now += 100
            assert client.silent_seconds == 0  # nobody asked for anything
            reader = asyncio.ensure_future(collect(client, make_request("r", [1])))
            await engine.hear()
            clock.now += 7
            assert client.silent_seconds == 7
            engine.say(Working())
            await until(lambda: client.silent_seconds == 0)
            clock.now += 5
            assert client.silent_seconds == 5  # it still has the request
            engine.say(stepped(output("r", 1, finish_reason="stop")))
            await reader
            clock.now += 100
            assert client.silent_seconds == 0

    asyncio.run(scenario())


def test_an_engine_that_does_not_answer_is_silent_though_its_clients_leave(monkeypatch):
    async def scenario():
        async with PlayedEngine() as engine:
            client, clock = engine.client, Clock(monkeypatch)
            await engine.ready()
            for seconds in (10, 20, 30):
                reader = asyncio.ensure_future(collect(client, make_request("r", [1])))
                await engine.hear()
                clock.now += 10
                reader.cancel()
                await asyncio.gather(reader, return_exceptions=True)
                await engine.hear()  # that it is left
                assert client.silent_seconds == seconds
            engine.say(stepped())
            await until(lambda: client.silent_seconds == 0)

    asyncio.run(scenario())


def test_an_engine_that_is_given_up_is_killed_and_its_requests_end():
    async def scenario():
        async with PlayedEngine() as engine:
            await engine.ready()
            reader = asyncio.ensure_future(collect(engine.client, make_request("r", [1])))
            await engine.hear()
            engine.client.give_up("It said nothing.")
            with pytest.raises(EngineUnavailable, match="It said nothing"):
                await reader
            assert (engine.client.state, engine.client.failure) == ("failed", "It said nothing.")
            assert engine.process.calls == ["kill"]

    asyncio.run(scenario())


def test_an_engine_process_serves_aborts_and_ends():
    async def scenario():
        async with RealEngine() as engine:
            client = engine.client
            requests = [make_request(f"r{n}", list(range(n + 1)), max_tokens=20) for n in range(16)]
            texts = await asyncio.gather(*[collect(client, request) for request in requests])
            for request, outputs in zip(requests, texts, strict=True):
                tokens = [token for output in outputs for token in output.token_ids]
                assert tokens == plain_loop(request, 4000)[0]
            prompt = list(range(4)) * 300
            async with aclosing(client.generate(make_request("left", prompt, max_tokens=2000))) as reader:
                await anext(reader)
                await until(lambda: client.stats.blocks_used >= 300)
            await until(lambda: client.stats.blocks_used == 0)
            assert client.stats.num_running == 0
        assert engine.process.returncode == 0

    asyncio.run(scenario())


def test_an_engine_process_that_is_killed_is_noticed():
    async def scenario():
        async with RealEngine() as engine:
            reader = engine.client.generate(make_request("r", [1] * 100, max_tokens=3000))
            await anext(reader)
            engine.process.kill()
            with pytest.raises(EngineUnavailable, match="signal 9"):
                async for _ in reader:
                    pass

    asyncio.run(scenario())


def deaf_engine(pipe) -> subprocess.Popen:
    """A process that holds the pipe, ignores SIGTERM and has said so on stdout."""
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('deaf', flush=True); signal.pause()"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, pass_fds=[pipe.fileno()])
    assert process.stdout.readline() == b"deaf\n"
    return process


def test_an_engine_process_that_does_not_listen_is_killed():
    async def scenario():
        ours, theirs = Pipe()
        with deaf_engine(theirs) as process:
            theirs.close()
            client = ProcessClient(ours, process, close_timeout_seconds=0.2)
            await client.close()
            assert process.returncode == -9

    asyncio.run(scenario())
