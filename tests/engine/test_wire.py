from multiprocessing import Pipe

import pytest
from engine_fakes import make_core, make_info, make_request

from ernie_serve.engine import wire
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
    TokenLogprobs,
)


@pytest.mark.parametrize(
    "command", [Generate(make_request("r", [1, 2], logit_bias={5: -1.0}, stop_token_ids=(2,))), Abort("r"), Shutdown()]
)
def test_commands_arrive_as_they_were_sent(command):
    api, engine = Pipe()
    with api, engine:
        wire.send(api, command)
        assert wire.receive_command(engine) == command


@pytest.mark.parametrize(
    "report",
    [
        Loading(0.25, "shard 1 of 4"),
        Ready(make_info(make_core())),
        Stepped(
            [
                EngineOutput(
                    request_id="r", token_ids=[3], logprobs=[TokenLogprobs(3, -0.5, [(3, -0.5), (4, float("-inf"))])]
                ),
                EngineOutput(request_id="s", finish_reason="error", error="why"),
            ],
            EngineStats(step=3, num_blocks=5, blocks_free=5),
        ),
        Failed("why"),
    ],
)
def test_reports_arrive_as_they_were_sent(report):
    api, engine = Pipe()
    with api, engine:
        wire.send(engine, report)
        assert wire.receive_report(api) == report


def test_the_end_of_the_other_side_is_an_eof():
    api, engine = Pipe()
    engine.close()
    with api, pytest.raises(EOFError):
        wire.receive_report(api)
