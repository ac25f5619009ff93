"""Pieces of prompts are sized by the time that steps take, and streams get a token in every step."""

from engine_fakes import FakeRunner, make_request

from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.pace import Pace
from ernie_serve.engine.scheduler import Scheduler

ALONE, EACH = 0.1, 0.02  # seconds of a step of streams, and of each token of a prompt beside them


def settled(pace: Pace, alone: float = ALONE, each: float = EACH, start: float = 0.0) -> int:
    """The piece that a pace comes to on a machine of such speeds."""
    pace.took(1, 0, alone)
    for _ in range(20):
        count = pace.prompt_tokens(1)
        pace.took(1, count, alone + start + each * count)
    return pace.prompt_tokens(1)


def test_a_piece_comes_to_fill_the_time_there_is():
    assert settled(Pace(0.5)) == 20
    assert settled(Pace(0.5, first_tokens=1000)) == 20
    assert settled(Pace(2.0)) == 95


def test_a_piece_with_costs_of_its_own_still_fits():
    count = settled(Pace(0.5), start=0.1)
    assert 14 <= count <= 15


def test_streams_that_fill_a_step_by_themselves_leave_prompts_as_much_time_again():
    assert settled(Pace(0.5), alone=0.8) == 40


def test_streams_that_came_since_are_not_mistaken_for_slow_prompts():
    """Where prompts come without a pause no step shows what the streams take, and pieces must not dwindle."""
    pace = Pace(0.5)
    pace.took(1, 0, ALONE)
    for num_streams in [1] * 10 + list(range(2, 31)):
        count = pace.prompt_tokens(num_streams)
        pace.took(num_streams, count, ALONE + EACH * (num_streams - 1 + count))
    assert pace.prompt_tokens(1) == 20
    assert pace.prompt_tokens(11) == 15  # these take 0.3 s, and prompts as much again
    assert pace.prompt_tokens(21) == 25  # and these 0.5, so a step may take a second


def test_streams_that_were_never_alone_take_what_tokens_take():
    pace = Pace(0.5)
    for num_streams in [1] * 10 + [10] * 10:
        count = pace.prompt_tokens(num_streams)
        pace.took(num_streams, count, EACH * (num_streams + count))
    assert pace.prompt_tokens(10) == 15
    assert pace.prompt_tokens(20) == 20


def test_fewer_streams_leave_more_time():
    pace = Pace(0.5)
    pace.took(11, 0, 0.3)
    for _ in range(10):
        count = pace.prompt_tokens(11)
        pace.took(11, count, 0.3 + EACH * count)
    assert pace.prompt_tokens(11) == 15
    assert pace.prompt_tokens(1) == 20


def test_a_machine_that_becomes_slower_gets_smaller_pieces():
    pace = Pace(0.5)
    assert settled(pace) == 20
    assert settled(pace, each=0.1) == 4
    assert settled(pace, each=5.0) == 1


def test_the_end_of_a_prompt_does_not_shrink_the_next_piece():
    pace = Pace(0.5)
    settled(pace)
    pace.took(1, 2, 0.3)
    assert pace.prompt_tokens(1) == 20


def test_one_slow_step_does_not_stop_prompts():
    pace = Pace(0.5)
    settled(pace)
    pace.took(1, 20, 60.0)
    assert pace.prompt_tokens(1) == 10
    pace.took(1, 10, 0.0)
    assert pace.prompt_tokens(1) == 20


def test_nothing_is_limited_without_streams_or_without_a_time():
    assert Pace(0.5).prompt_tokens(0) is None
    assert Pace(0.0).prompt_tokens(8) is None


def run_beside_a_stream(pace: Pace) -> list[dict[str, int]]:
    """Steps, by tokens of each request, from the arrival of a long prompt beside a stream until it has its token."""
    pool = BlockPool(200, 4)
    scheduler = Scheduler(pool, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=800, pace=pace)
    runner = FakeRunner(200, 4)
    scheduler.add(make_request("stream", [1, 2, 3], max_tokens=400))
    steps = []
    for number in range(400):
        if number == 3:
            scheduler.add(make_request("long", [7] * 300, max_tokens=1))
        plan = scheduler.schedule()
        sizes = {row.request_id: len(row.token_ids) for row in plan.rows}
        scheduler.took(plan, ALONE + EACH * sizes.get("long", 0))
        outputs = scheduler.update(plan, runner.execute(plan))
        if number >= 3:
            steps.append(sizes)
        if any(output.request_id == "long" for output in outputs):
            return steps
    raise AssertionError("the long prompt never got its token")


def test_a_long_prompt_never_holds_up_a_stream_for_longer_than_the_time():
    steps = run_beside_a_stream(Pace(0.5))
    assert all(step["stream"] == 1 for step in steps)
    assert all(ALONE + EACH * step.get("long", 0) <= 0.5 for step in steps)
    assert len(steps) < 20


def test_without_a_time_a_long_prompt_goes_in_at_once():
    (step,) = run_beside_a_stream(Pace())
    assert step == {"stream": 1, "long": 300}


def test_several_prompts_share_the_time_of_one_step():
    pace = Pace(0.5)
    settled(pace)
    pool = BlockPool(400, 4, enable_prefix_caching=False)
    scheduler = Scheduler(pool, max_num_seqs=8, max_num_batched_tokens=512, max_model_len=800, pace=pace)
    scheduler.add(make_request("stream", [1], max_tokens=40))
    for name in "abc":
        scheduler.add(make_request(name, [ord(name)] * 15, max_tokens=1))
    plan = scheduler.schedule()
    assert plan.num_tokens == 46  # nothing streams yet
    scheduler.update(plan, FakeRunner(400, 4).execute(plan))
    for name in "def":
        scheduler.add(make_request(name, [ord(name)] * 15, max_tokens=1))
    plan = scheduler.schedule()
    assert {row.request_id: len(row.token_ids) for row in plan.rows} == {"stream": 1, "d": 15, "e": 5}
