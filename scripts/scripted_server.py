"""A server as users meet it, with or without billing, over an engine that is scripted: it has a clock and no model.

Knows how a server is put together and what an engine says over its pipe. Measures nothing; the engine only notes when
it was given each request and when it gave the last token, by the monotonic clock that all processes share.
"""

import argparse
import asyncio
import socket
import subprocess
import sys
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path

STEP_SECONDS = 0.050
MARK_BASE = 256
"""A prompt begins with two ids that name the request, as digits in this base."""


def run_engine(connection: Connection, notes: Path) -> None:
    """Give a token to every request every 50 ms, until the pipe ends; note each request that has ended."""
    from ernie_serve.engine import wire
    from ernie_serve.messages import (
        Abort,
        EngineInfo,
        EngineOutput,
        EngineRequest,
        EngineStats,
        Generate,
        Ready,
        Shutdown,
        Stepped,
    )

    info = EngineInfo(
        device="none",
        dtype="none",
        weight_bytes=0,
        kv_bytes=0,
        num_blocks=1,
        block_size=16,
        max_model_len=4096,
        max_num_seqs=1024,
        max_num_batched_tokens=4096,
        load_seconds=0.0,
    )
    wire.send(connection, Ready(info))
    running: dict[str, tuple[EngineRequest, float, int]] = {}
    with notes.open("w") as told:
        while True:
            step_at = (time.monotonic() // STEP_SECONDS + 1) * STEP_SECONDS
            while (left := step_at - time.monotonic()) > 0:
                if not connection.poll(left):
                    continue
                command = wire.receive_command(connection)
                if isinstance(command, Generate):
                    running[command.request.request_id] = (command.request, time.monotonic(), 0)
                elif isinstance(command, Abort):
                    running.pop(command.request_id, None)
                elif isinstance(command, Shutdown):
                    return
            outputs, ended = [], []
            for request_id, (request, came_at, made) in list(running.items()):
                last = made + 1 == request.sampling.max_tokens
                running[request_id] = (request, came_at, made + 1)
                if last:
                    del running[request_id]
                    high, low = request.prompt_token_ids[:2]
                    ended.append((high * MARK_BASE + low, came_at))
                reason = "length" if last else None
                outputs.append(EngineOutput(request_id=request_id, token_ids=[5], finish_reason=reason))
            stepped_at = time.monotonic()
            if outputs:
                wire.send(connection, Stepped(outputs, EngineStats()))
            for mark, came_at in ended:
                print(mark, came_at, stepped_at, file=told, flush=True)


async def serve(url: str, notes: Path) -> None:
    """A server on a free port, which it prints, with a key of a rich account where `url` names a store."""
    import uvicorn

    from ernie_serve.api.app import create_app
    from ernie_serve.api.protocol import HttpProtocol
    from ernie_serve.api.services import Services
    from ernie_serve.billing.free import FreeMeter
    from ernie_serve.billing.meter import Meter
    from ernie_serve.billing.office import open_key
    from ernie_serve.billing.opening import open_meter
    from ernie_serve.billing.prices import Prices
    from ernie_serve.bundled import ERNIE_TINY
    from ernie_serve.engine.client import ProcessClient
    from ernie_serve.text.generation import GenerationDefaults
    from ernie_serve.text.tokenizer import Tokenizer

    meter: Meter = FreeMeter()
    key = "none"
    if url:
        meter = await open_meter(url, "bench", Prices())
        key = (await meter.change(open_key, "bench", now=1, credit_nano=10**15)).key
    ours, theirs = socket.socketpair()
    command = [sys.executable, __file__, "--engine", str(theirs.fileno()), "--notes", str(notes)]
    process = subprocess.Popen(command, pass_fds=[theirs.fileno()])  # noqa: ASYNC220  # before anybody is served
    theirs.close()
    engine = ProcessClient(Connection(ours.detach()), process)
    services = Services(
        engine=engine,
        tokenizer=Tokenizer.from_folder(ERNIE_TINY),
        template=None,
        defaults=GenerationDefaults(),
        model_names=("bench",),
        max_model_len=4096,
        meter=meter,
    )
    config = uvicorn.Config(
        create_app(services),
        http=HttpProtocol,
        port=0,
        log_config=None,
        access_log=False,
        lifespan="off",
        timeout_keep_alive=75,
    )
    server = uvicorn.Server(config)
    serving = asyncio.ensure_future(server.serve())
    while not server.started or engine.state != "ready":  # noqa: ASYNC110  # there is no event for either
        await asyncio.sleep(0.01)
    print(server.servers[0].sockets[0].getsockname()[1], key, flush=True)
    await serving
    await engine.close()
    await meter.close()


def main() -> None:
    import uvloop

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", default="")
    parser.add_argument("--notes", type=Path, required=True)
    parser.add_argument("--engine", type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine is not None:
        with suppress(EOFError, OSError):  # the server has ended
            run_engine(Connection(given.engine), given.notes)
        return
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:  # as `launch.py` does
        runner.run(serve(given.url, given.notes))


if __name__ == "__main__":
    main()
