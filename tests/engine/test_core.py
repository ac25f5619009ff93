import json
import random
import re
from collections import deque

import pytest
from engine_fakes import VOCAB_SIZE, make_core, make_request, plain_loop
from msgspec import msgpack

from ernie_serve.engine import core as core_module
from ernie_serve.engine.pace import Pace
from ernie_serve.errors import DeviceLost
from ernie_serve.grammar.compiler import GrammarCompiler, Vocabulary
from ernie_serve.messages import (
    Abort,
    EngineCommand,
    EngineReport,
    Failed,
    Generate,
    Grammar,
    Shutdown,
    Stepped,
    Working,
)


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


def test_a_lost_device_ends_the_engine_at_the_first_failure():
    core = make_core()
    core.runner.failures = [DeviceLost("cuda:0 is lost.")]
    connection = ScriptedConnection((0, Generate(make_request("a", [1]))))
    with pytest.raises(DeviceLost):
        core.serve(connection)
    assert connection.reports == [Failed("DeviceLost: cuda:0 is lost.")]


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


def test_a_step_that_takes_long_says_so(monkeypatch):
    prompt = make_request("r", [1, 2, 3], max_tokens=2)
    connection = ScriptedConnection((0, Generate(prompt)))
    make_core().serve(connection)
    assert not any(isinstance(report, Working) for report in connection.reports)
    monkeypatch.setattr(core_module, "WORKING_SECONDS", -1.0)
    connection = ScriptedConnection((0, Generate(prompt)))
    make_core().serve(connection)
    kinds = [type(report) for report in connection.reports]
    assert kinds == [Working, Stepped, Working, Stepped]


def serve_with(during_step_2: EngineCommand, *requests):
    """Serve requests; a command comes in while step 2 is computed."""
    core, connection = make_core(), ScriptedConnection(*((0, Generate(request)) for request in requests))

    def during(plan):
        if plan.step == 2:
            connection.script.append((0, during_step_2))

    core.runner.during = during
    core.serve(connection)
    return core, connection


def test_a_step_that_nobody_waits_for_any_more_is_broken_off_and_leaves_nothing():
    core, connection = serve_with(Abort("r"), make_request("r", list(range(1, 60)), max_tokens=9))
    assert core.runner.num_computed == 32  # of the first step; the prompt's end is not
    assert not connection.tokens("r")
    assert connection.reports[-1].stats.blocks_used == 0
    core.scheduler.check()


def test_a_step_that_somebody_waits_for_goes_on_without_those_who_left():
    stays, leaves = make_request("stays", [1, 2, 3], max_tokens=4), make_request("leaves", [4, 5], max_tokens=4)
    _, connection = serve_with(Abort("leaves"), stays, leaves)
    assert connection.tokens("stays") == plain_loop(stays, 200)[0]
    assert connection.tokens("leaves") == plain_loop(leaves, 200)[0][:1]
    assert connection.reports[-1].stats.blocks_used == 0


def test_what_comes_during_a_step_runs_after_it():
    old, new = make_request("old", [1, 2, 3], max_tokens=4), make_request("new", [4, 5], max_tokens=4)
    _, connection = serve_with(Generate(new), old)
    assert connection.tokens("old") == plain_loop(old, 200)[0]
    assert connection.tokens("new") == plain_loop(new, 200)[0]


def test_nothing_of_a_broken_off_step_is_found_by_a_later_prompt():
    prompt = list(range(1, 60))
    core, _ = serve_with(Abort("r"), make_request("r", prompt, max_tokens=9))
    core.runner.during = None
    again = make_request("again", prompt, max_tokens=9)
    connection = ScriptedConnection((0, Generate(again)))
    core.serve(connection)
    assert connection.tokens("again") == plain_loop(again, 200)[0]


def test_a_shutdown_breaks_a_step_off():
    core, connection = serve_with(Shutdown(), make_request("r", [1, 2, 3], max_tokens=9))
    assert len(connection.tokens("r")) == 1
    assert core.runner.num_computed == 3


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


LETTERS = b'abcdefghijklmnopqrstuvwxyz{}[]",:012-. '
EOS = VOCAB_SIZE - 1
VOCABULARY = Vocabulary([*(bytes([letter]) for letter in LETTERS), b"<eos>"], frozenset({EOS}))
COMPILER = GrammarCompiler(VOCABULARY)
GRAMMARS = {
    "regex": (Grammar("regex", "[a-d]{2,9}(:[0-2]+)?"), lambda text: re.fullmatch("[a-d]{2,9}(:[0-2]+)?", text)),
    "choice": (Grammar("choice", '["abc", "abd", "b-1"]'), lambda text: text in ("abc", "abd", "b-1")),
    "schema": (
        Grammar(
            "json_schema", '{"type": "object", "properties": {"a": {"type": "array", "items": {"enum": [0, "b"]}}}}'
        ),
        lambda text: isinstance(json.loads(text), dict),
    ),
    "lark": (Grammar("lark", "start: (A B)+\nA: /[a-c]/\nB: /[x-z]{2}/"), re.compile("([a-c][x-z]{2})+").fullmatch),
}


def complete(core, *requests, max_steps=5000):
    """All tokens of some requests that start together, and how each ended."""
    for request in requests:
        core.add(request)
    tokens, ends = {request.request_id: [] for request in requests}, {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            tokens[output.request_id] += output.token_ids
            if output.finish_reason:
                ends[output.request_id] = output
        core.scheduler.check()
    else:
        pytest.fail("the engine does not come to an end")
    return tokens, ends


def said(tokens):
    return b"".join(VOCABULARY.tokens[token] for token in tokens if token != EOS).decode()


def bound_request(rng, name):
    """A request of some kind, and what its text is if it ends by itself."""
    kind = rng.choice([*GRAMMARS, "free", "words", "ids", "budget", "after"])
    grammar, is_right = GRAMMARS.get(kind, (None, lambda text: True))
    options = {
        "free": {},
        "words": {"bad_words": ((1,), (2, 3), (EOS,))},
        "ids": {"allowed_token_ids": (3, 4, 5, EOS)},
        "budget": {"max_reasoning_tokens": 4, "reasoning_end_token_id": 26, "reasoning_end_forced_ids": (39, 26, 39)},
        "after": {"grammar": GRAMMARS["choice"][0], "grammar_after_token_id": 27},
    }.get(kind, {"grammar": grammar})
    prompt = rng.choices(range(VOCAB_SIZE), k=rng.randint(1, 12))
    stop = (EOS,) if kind != "budget" else ()
    options = {"stop_token_ids": stop, "max_tokens": rng.choice([3, 25, 40]), "seed": rng.randint(0, 9)} | options
    return make_request(name, prompt, **options), is_right


@pytest.mark.parametrize("seed", range(12))
def test_constraints_hold_and_no_crowd_nor_preemption_changes_a_text(seed):
    rng = random.Random(seed)
    requests = [bound_request(rng, f"r{number}") for number in range(10)]
    crowd = make_core(num_blocks=24, block_size=4, max_num_batched_tokens=12, grammars=COMPILER)
    together, ends = complete(crowd, *[request for request, _ in requests])
    for request, is_right in requests:
        name, sampling = request.request_id, request.sampling
        alone, alone_ends = complete(make_core(num_blocks=64, grammars=COMPILER), request)
        assert together[name] == alone[name]
        assert ends[name].finish_reason == alone_ends[name].finish_reason != "error"
        if ends[name].finish_reason == "stop" and sampling.grammar_after_token_id is None:
            assert is_right(said(together[name]))
        if sampling.allowed_token_ids:
            assert set(together[name]) <= set(sampling.allowed_token_ids)
        for word in sampling.bad_words:
            starts = range(len(together[name]) - len(word) + 1)
            assert not any(together[name][at : at + len(word)] == list(word) for at in starts)
        if sampling.max_reasoning_tokens is not None and len(together[name]) > 6:
            assert 26 in together[name][:6]
    crowd.scheduler.pool.check()
    assert crowd.scheduler.pool.num_used == 0


def test_the_crowds_of_that_test_are_preempted():
    core = make_core(num_blocks=12, block_size=4, grammars=COMPILER)
    grammar = Grammar("regex", "[a-z]{40}")
    requests = [make_request(f"r{n}", [n + 1] * 4, max_tokens=60, seed=n, grammar=grammar) for n in range(4)]
    tokens, ends = complete(core, *requests)
    assert core.scheduler.stats.num_preempted > 0
    assert all(re.fullmatch("[a-z]{40}", said(each)) for each in tokens.values())
    assert {end.finish_reason for end in ends.values()} == {"stop"}


def test_an_answer_that_its_grammar_ends_has_no_stop_token():
    core = make_core(grammars=COMPILER)
    tokens, ends = complete(core, make_request("r", [1], grammar=Grammar("choice", '["abc"]')))
    assert said(tokens["r"]) == "abc"
    assert (ends["r"].finish_reason, ends["r"].stop_token_id) == ("stop", None)


def test_an_answer_that_max_tokens_cuts_is_the_beginning_of_a_right_one():
    core = make_core(grammars=COMPILER)
    tokens, ends = complete(core, make_request("r", [1], max_tokens=3, grammar=Grammar("choice", '["abcde", "abcdf"]')))
    assert (said(tokens["r"]), ends["r"].finish_reason) == ("abc", "length")


def test_a_constraint_that_leaves_nothing_ends_its_request_alone():
    core = make_core(grammars=COMPILER)
    stuck = make_request("stuck", [1], grammar=Grammar("choice", '["abc"]'), bad_words=((0, 1),))
    free = make_request("free", [2])
    tokens, ends = complete(core, stuck, free)
    assert ends["stuck"].finish_reason == "error"
    assert ends["stuck"].error_code == "no_token_left"
    assert tokens["stuck"] == [0]
    assert tokens["free"] == plain_loop(free, 200)[0]


def test_a_grammar_that_does_not_compile_ends_its_request_alone():
    core = make_core(grammars=COMPILER)
    free = make_request("free", [2])
    tokens, ends = complete(core, make_request("bad", [1], grammar=Grammar("regex", "(")), free)
    assert ends["bad"].finish_reason == "error"
    assert tokens["free"] == plain_loop(free, 200)[0]


def test_an_engine_without_a_vocabulary_says_so():
    _, ends = complete(make_core(), make_request("r", [1], allowed_token_ids=(1,)))
    assert "vocabulary" in ends["r"].error


def test_a_failing_step_with_masks_ends_its_requests_and_the_engine_goes_on():
    core = make_core(grammars=COMPILER)
    core.runner.failures = [RuntimeError()]
    grammar = Grammar("choice", '["abc"]')
    assert complete(core, make_request("unlucky", [1], grammar=grammar))[1]["unlucky"].finish_reason == "error"
    assert said(complete(core, make_request("later", [1], grammar=grammar))[0]["later"]) == "abc"


def test_a_request_that_is_aborted_while_its_grammar_compiles_never_runs():
    core = make_core(grammars=GrammarCompiler(VOCABULARY))
    core.add(make_request("r", [1], grammar=Grammar("json_object")))
    core.abort("r")
    assert not core.has_work
    assert core.step() == []


def test_a_step_teaches_the_pace_unless_nobody_waits_for_it_any_more():
    class Heard(Pace):
        steps = 0

        def took(self, num_streams: int, num_prompt_tokens: int, seconds: float) -> None:
            self.steps += 1

    pace = Heard()
    core = make_core(pace=pace)
    core.add(make_request("kept", [1, 2, 3]))
    core.step()
    assert pace.steps == 1
    execute = core.runner.execute

    def abandoned(*arguments):
        core.abort("kept")
        return execute(*arguments)

    core.runner.execute = abandoned
    core.step()
    assert pace.steps == 1
