"""The schedule may never change the text, and every block comes back."""

import random
from collections import Counter

import msgspec
import pytest
from engine_fakes import FakeRunner, make_core, make_request, plain_loop

from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.pace import Pace
from ernie_serve.engine.scheduler import Scheduler
from ernie_serve.messages import NO_TOKEN


def run(core, *requests):
    """All outputs of some requests that start together, by id."""
    for request in requests:
        core.add(request)
    return drain(core)


def drain(core, max_steps: int = 5000):
    outputs = {}
    for _ in range(max_steps):
        if not core.has_work:
            break
        for output in core.step():
            outputs.setdefault(output.request_id, []).append(output)
        core.scheduler.check()
    else:
        pytest.fail("the engine does not come to an end")
    core.scheduler.pool.check()
    return outputs


def text(outputs) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


def plan_sizes(core) -> dict[str, int]:
    """Make, run and book one step; how many tokens each row had."""
    plan = core.scheduler.schedule()
    core.scheduler.update(plan, core.runner.execute(plan))
    return {row.request_id: len(row.token_ids) for row in plan.rows}


def some_tokens(count: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(40), k=count)


@pytest.mark.parametrize("first_seed", range(0, 400, 50))
def test_the_schedule_never_changes_the_text(first_seed):
    for seed in range(first_seed, first_seed + 50):
        check_workload(random.Random(seed))


def check_workload(rng: random.Random) -> None:
    """One random workload: requests arrive, end and are aborted while steps run, up to two plans at a time."""
    block_size = rng.choice([1, 2, 3, 4, 4, 8, 8])
    num_blocks = max(3, rng.randint(12, 200) // block_size)
    max_model_len = rng.choice([16, 40, 70])
    max_len = min(max_model_len, num_blocks * block_size)
    caching = rng.random() < 0.8
    pool = BlockPool(num_blocks, block_size, enable_prefix_caching=caching)
    scheduler = Scheduler(
        pool,
        max_num_seqs=rng.choice([1, 8, 8, 8, 12]),
        max_num_batched_tokens=rng.choice([1, 8, 16, 24, 64, 64]),
        max_model_len=max_model_len,
        min_tokens_worth_waiting=rng.choice([1, 128]),
        pace=Pace(rng.choice([0.0, 0.1, 0.1]), first_tokens=rng.choice([1, 4])),
    )
    runner = FakeRunner(num_blocks, block_size)
    depth = rng.choice([1, 1, 2])
    arrival_rate = rng.choice([0.2, 0.7, 0.9])
    bases = [rng.choices(range(40), k=max_len) for _ in range(2)]
    coming = [random_request(rng, f"r{number}", bases, max_len) for number in range(rng.randint(2, 14))]
    requests = {request.request_id: request for request in coming}
    outputs = {request_id: [] for request_id in requests}
    aborted, in_flight = set(), []

    for _ in range(3000):
        while coming and rng.random() < arrival_rate:
            request = coming.pop()
            if ended := scheduler.add(request):
                outputs[request.request_id].append(ended)
        plan = scheduler.schedule()
        if plan is not None:
            assert plan.num_tokens <= scheduler.max_num_batched_tokens
            assert len(plan.rows) <= scheduler.max_num_seqs
            for row in plan.rows:
                stop = row.start + len(row.token_ids)
                written = row.block_ids[row.start // block_size : pool.blocks_for(stop)]
                assert all(pool._owners[block_id] == 1 for block_id in written), "a shared block is written"
            refuse_sharing_across_salts(plan, requests)
            in_flight.append((plan, runner.execute(plan)))
            scheduler.took(plan, rng.choice([0.0, 0.01, 0.01, 0.5]) * rng.random() * plan.num_tokens)
        if rng.random() < 0.02:
            aborted.add(request_id := rng.choice(list(requests)))
            scheduler.abort(request_id)
        if len(in_flight) >= depth or (plan is None and in_flight):
            for output in scheduler.update(*in_flight.pop(0)):
                outputs[output.request_id].append(output)
        scheduler.check()
        stats = scheduler.stats
        assert stats.blocks_used + stats.blocks_cached + stats.blocks_free == stats.num_blocks
        assert stats.num_running <= scheduler.max_num_seqs
        if not coming and not in_flight and not scheduler.has_work:
            break
    else:
        pytest.fail("the schedule does not come to an end")

    pool.check()
    assert pool.num_used == 0
    assert caching or pool.num_cached == 0
    for request_id, request in requests.items():
        check_outputs(request, outputs[request_id], max_len, request_id in aborted)


def random_request(rng: random.Random, request_id: str, bases, max_len: int):
    shared = rng.choice(bases)[: rng.randint(0, rng.choice([4, max_len // 2, max_len]))]
    own = rng.choices(range(40), k=rng.randint(0 if shared else 1, rng.choice([3, 3, 10, max_len])))
    return make_request(
        request_id,
        (shared + own)[: max_len + 1],
        max_tokens=rng.choice([0, 1, 5, 30, 30, 60]),
        min_tokens=rng.choice([0, 0, 3]),
        stop_token_ids=tuple(rng.choices(range(40), k=rng.choice([0, 0, 1, 2]))),
        seed=rng.randint(0, 5),
        priority=rng.choice([0, 0, 0, 1, 5]),
        cache_salt=rng.choice(["", "", "", "mine"]),
    )


def refuse_sharing_across_salts(plan, requests) -> None:
    salts = {}
    for row in plan.rows:
        for block_id in row.block_ids:
            salt = requests[row.request_id].cache_salt
            assert salts.setdefault(block_id, salt) == salt, "two salts share a block"


def check_outputs(request, outputs, max_len: int, was_aborted: bool) -> None:
    if len(request.prompt_token_ids) > max_len and outputs:
        assert [output.finish_reason for output in outputs] == ["error"]
        return
    tokens, reason, stop_token_id = plain_loop(request, max_len)
    got = text(outputs)
    finished = [output for output in outputs if output.finish_reason]
    if was_aborted and not finished:
        assert got == tokens[: len(got)]
        return
    assert got == tokens
    assert finished == outputs[-1:]
    assert (finished[0].finish_reason, finished[0].stop_token_id) == (reason, stop_token_id)


def test_preempted_is_undisturbed():
    requests = [make_request(f"r{n}", some_tokens(9, n), max_tokens=30, seed=n) for n in range(4)]
    core = make_core(num_blocks=14, block_size=4, enable_prefix_caching=False)
    outputs = run(core, *requests)
    assert core.scheduler.stats.num_preempted > 0
    assert {r.request_id: text(outputs[r.request_id]) for r in requests} == {
        r.request_id: plain_loop(r, 56)[0] for r in requests
    }


def test_the_newest_is_preempted_and_comes_back_before_those_that_wait():
    core = make_core(num_blocks=8, block_size=4, max_num_seqs=2, enable_prefix_caching=False)
    outputs = run(core, *[make_request(f"r{n}", some_tokens(8, n), max_tokens=16) for n in range(3)])
    assert core.scheduler.stats.num_preempted > 0
    assert list(outputs) == ["r0", "r1", "r2"]
    assert [len(outputs[f"r{n}"]) for n in range(3)] == [16, 16, 16]


def test_cached_prefix_equals_uncached():
    prompt = some_tokens(30)
    core = make_core()
    first = run(core, make_request("first", prompt))["first"]
    computed = core.runner.num_computed
    second = run(core, make_request("second", prompt))["second"]
    assert text(first) == text(second)
    assert [first[-1].num_cached_tokens, second[-1].num_cached_tokens] == [0, 28]
    assert core.runner.num_computed - computed == computed - 28


def test_a_wholly_cached_prompt_still_computes_its_last_block():
    core = make_core(block_size=4)
    run(core, make_request("first", some_tokens(16)))
    assert run(core, make_request("second", some_tokens(16)))["second"][-1].num_cached_tokens == 12


def test_the_output_of_one_turn_is_cached_for_the_next():
    core = make_core(block_size=4)
    prompt = some_tokens(10)
    said = text(run(core, make_request("turn 1", prompt, max_tokens=10))["turn 1"])
    outputs = run(core, make_request("turn 2", prompt + said + [1, 2, 3]))
    assert outputs["turn 2"][-1].num_cached_tokens == 16  # 19 of these tokens had been computed


def test_salts_share_nothing():
    core = make_core()
    mine = run(core, make_request("mine", some_tokens(30), cache_salt="a"))["mine"]
    yours = run(core, make_request("yours", some_tokens(30), cache_salt="b"))["yours"]
    assert yours[-1].num_cached_tokens == 0
    assert text(mine) == text(yours)


def test_prefix_caching_can_be_switched_off():
    core = make_core(enable_prefix_caching=False)
    run(core, make_request("first", some_tokens(30)))
    assert run(core, make_request("second", some_tokens(30)))["second"][-1].num_cached_tokens == 0
    assert core.scheduler.stats.blocks_cached == 0


def test_lower_priority_runs_first_then_the_oldest():
    core = make_core(max_num_seqs=1)
    outputs = run(core, *[make_request(f"{n}", [n + 1], max_tokens=1, priority=p) for n, p in enumerate([5, 0, 5, -1])])
    assert list(outputs) == ["3", "1", "0", "2"]


def test_an_urgent_request_takes_the_seat_of_a_lesser_one_whose_text_stays_whole():
    core = make_core(max_num_seqs=1)
    slow = make_request("slow", some_tokens(6), max_tokens=20, priority=1)
    core.add(slow)
    first = [core.step()[0] for _ in range(5)]
    core.add(make_request("urgent", some_tokens(5), max_tokens=3))
    assert list(plan_sizes(core)) == ["urgent"]
    rest = drain(core)
    assert text(first + rest["slow"]) == plain_loop(slow, 200)[0]


@pytest.mark.parametrize(("length", "told"), [(6, [5.0, None, None]), (40, [5.0, 5.0, None, None])])
def test_when_a_request_began_is_told_with_its_first_output_and_its_first_token(length, told):
    now = iter([5.0, 9.0])
    core = make_core(max_num_seqs=1, clock=lambda: next(now))
    core.add(make_request("first", some_tokens(length), max_tokens=3))
    core.add(make_request("next", some_tokens(5), max_tokens=1))
    outputs = drain(core)
    assert [output.began_at for output in outputs["first"]] == told
    assert [output.began_at for output in outputs["next"]] == [9.0]


def test_a_request_that_is_preempted_began_when_it_first_ran():
    core = make_core(max_num_seqs=1)
    core.add(make_request("slow", some_tokens(40), max_tokens=2, priority=1))
    (begun,) = core.step()
    core.add(make_request("urgent", some_tokens(5), max_tokens=1))
    outputs = drain(core)
    assert begun.began_at is not None
    assert outputs["slow"][0].token_ids
    assert begun.began_at == outputs["slow"][0].began_at < outputs["urgent"][0].began_at


def test_equals_wait_for_their_turn():
    core = make_core(max_num_seqs=1)
    core.add(make_request("old", some_tokens(6)))
    core.step()
    core.add(make_request("new", some_tokens(6)))
    assert list(plan_sizes(core)) == ["old"]
    assert core.scheduler.stats.num_preempted == 0


def test_a_long_prompt_leaves_a_token_to_each_that_decodes():
    core = make_core(max_num_batched_tokens=8, max_num_seqs=4)
    core.add(make_request("long", some_tokens(60), priority=0))
    for n in range(3):
        core.add(make_request(f"short {n}", [n], max_tokens=20, priority=-1))
    core.step()
    assert plan_sizes(core) == {"short 0": 1, "short 1": 1, "short 2": 1, "long": 5}
    core = make_core(max_num_batched_tokens=8, max_num_seqs=4)
    for n in range(3):
        core.add(make_request(f"short {n}", [n], max_tokens=20, priority=1))
    core.step()
    core.add(make_request("long", some_tokens(60), priority=0))
    assert plan_sizes(core) == {"long": 5, "short 0": 1, "short 1": 1, "short 2": 1}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget():
    core = make_core(max_num_batched_tokens=8)
    core.add(make_request("long", some_tokens(20)))
    assert [plan_sizes(core)["long"] for _ in range(4)] == [8, 8, 4, 1]


def test_requests_with_one_long_beginning_compute_it_once():
    core = make_core(num_blocks=400, max_num_batched_tokens=512, max_model_len=400)
    requests = [make_request(f"r{n}", [*some_tokens(200), n], max_tokens=4, seed=n) for n in range(8)]
    outputs = run(core, *requests)
    assert core.runner.num_computed == 201 + 7 + 8 * 3
    for request in requests:
        assert text(outputs[request.request_id]) == plain_loop(request, 400)[0]


def test_a_short_beginning_is_not_waited_for():
    core = make_core(num_blocks=400, max_num_batched_tokens=512, max_model_len=400)
    for n in range(3):
        core.add(make_request(f"r{n}", some_tokens(100)))
    assert plan_sizes(core) == {"r0": 100, "r1": 100, "r2": 100}


def test_others_pass_those_that_wait_for_their_beginning():
    core = make_core(num_blocks=400, max_num_batched_tokens=160, max_model_len=400)
    for name, seed in [("first", 0), ("same", 0), ("other", 1)]:
        core.add(make_request(name, some_tokens(300, seed)))
    assert plan_sizes(core) == {"first": 160}
    assert plan_sizes(core) == {"first": 140, "other": 20}
    assert plan_sizes(core) == {"first": 1, "same": 4, "other": 155}


def test_nobody_waits_for_a_beginning_that_is_given_up():
    core = make_core(num_blocks=400, max_num_batched_tokens=150, max_model_len=400)
    core.add(make_request("first", some_tokens(200)))
    core.add(make_request("same", some_tokens(200)))
    core.step()
    core.abort("first")
    assert plan_sizes(core) == {"same": 52}  # what "first" did is found


def test_a_newcomer_waits_until_it_fits_as_a_whole():
    core = make_core(num_blocks=10, block_size=4)
    core.add(make_request("first", some_tokens(20), max_tokens=4))
    core.step()
    core.add(make_request("second", some_tokens(20, seed=1)))
    assert list(plan_sizes(core)) == ["first"]
    assert core.scheduler.stats.num_waiting == 1
    assert len(text(drain(core)["second"])) == 8
    assert core.scheduler.stats.num_preempted == 0


def test_aborting_a_queued_request_leaves_a_decoding_one_as_it_was():
    alone = run(make_core(clock=lambda: 1.0), make_request("decoding", some_tokens(5), max_tokens=150))
    core = make_core(max_num_seqs=1, clock=lambda: 1.0)
    core.add(make_request("decoding", some_tokens(5), max_tokens=150))
    outputs = []
    for n in range(150):
        core.add(make_request(f"queued {n}", some_tokens(5, n)))
        outputs += core.step()
        core.abort(f"queued {n}")
    assert outputs == alone["decoding"]
    assert not core.has_work
    core.scheduler.pool.check()


def test_an_abort_between_schedule_and_update_drops_the_result():
    core = make_core()
    core.add(make_request("gone", some_tokens(5)))
    core.add(make_request("here", some_tokens(6)))
    plan = core.scheduler.schedule()
    sampled = core.runner.execute(plan)
    core.abort("gone")
    core.abort("gone")
    assert [output.request_id for output in core.scheduler.update(plan, sampled)] == ["here"]
    core.scheduler.check()


def test_the_result_of_an_aborted_request_is_not_given_to_one_that_reuses_its_id():
    core = make_core()
    core.add(make_request("same", some_tokens(5)))
    plan = core.scheduler.schedule()
    sampled = core.runner.execute(plan)
    core.abort("same")
    again = make_request("same", some_tokens(5, seed=1))
    core.add(again)
    assert core.scheduler.update(plan, sampled) == []
    assert text(drain(core)["same"]) == plain_loop(again, 200)[0]


def test_a_prompt_that_can_never_fit_ends_at_once():
    core = make_core(num_blocks=4, block_size=4, max_model_len=100)
    (output,) = run(core, make_request("big", some_tokens(17)))["big"]
    assert output.finish_reason == "error"
    assert "17 tokens" in output.error
    assert "holds 16" in output.error
    (output,) = run(core, make_request("bigger", some_tokens(101)))["bigger"]
    assert "max_model_len is 100" in output.error


def test_a_prompt_that_fills_the_whole_cache_yields_one_token():
    core = make_core(num_blocks=4, block_size=4, max_model_len=100)
    (output,) = run(core, make_request("full", some_tokens(16)))["full"]
    assert (len(output.token_ids), output.finish_reason) == (1, "length")


def test_a_request_without_a_token_because_of_its_numbers_fails_alone():
    core = make_core()
    core.add(make_request("overflows", [1, 2, 3]))
    core.add(make_request("a", [1, 2, 3, 4, 5, 6]))
    core.step()
    plan = core.scheduler.schedule()
    sampled = [
        msgspec.structs.replace(each, token_id=NO_TOKEN) if each.request_id == "overflows" else each
        for each in core.runner.execute(plan)
    ]
    failed, *others = core.scheduler.update(plan, sampled)
    assert (failed.request_id, failed.finish_reason, failed.token_ids) == ("overflows", "error", [])
    assert "no numbers" in failed.error
    assert [each.finish_reason for each in others] == [None]
    assert drain(core)["a"][-1].finish_reason == "length"


def test_an_empty_prompt_and_a_double_id_end_with_an_error():
    core = make_core()
    assert "at least one" in run(core, make_request("empty", []))["empty"][0].error
    core.add(make_request("double", [1]))
    assert "ids must differ" in core.scheduler.add(make_request("double", [2])).error
    assert len(drain(core)["double"]) == 8


def test_max_tokens_0_ends_without_running():
    core = make_core()
    (output,) = run(core, make_request("none", [1], max_tokens=0))["none"]
    assert (output.token_ids, output.finish_reason) == ([], "length")
    assert core.scheduler.stats.step == 0


def test_a_stop_token_ends_the_text_and_is_part_of_it():
    tokens = plain_loop(make_request("plain", [3, 4], max_tokens=20), 200)[0]
    stop = tokens[10]
    length = tokens.index(stop) + 1
    outputs = run(make_core(), make_request("stop", [3, 4], max_tokens=20, stop_token_ids=(stop,)))["stop"]
    assert text(outputs) == tokens[:length]
    assert (outputs[-1].finish_reason, outputs[-1].stop_token_id) == ("stop", stop)


def test_a_stop_token_before_min_tokens_does_not_end_the_text():
    tokens = plain_loop(make_request("plain", [3, 4], max_tokens=20), 200)[0]
    everything = tuple(range(40))
    request = make_request("stop", [3, 4], max_tokens=20, min_tokens=5, stop_token_ids=everything)
    assert text(run(make_core(), request)["stop"]) == tokens[:6]


def test_text_ends_where_the_model_reads_no_further():
    outputs = run(make_core(max_model_len=12), make_request("long", some_tokens(9), max_tokens=50))["long"]
    assert (len(text(outputs)), outputs[-1].finish_reason) == (3, "length")


def test_a_plan_refers_to_the_growing_lists_and_does_not_copy_them():
    core = make_core()
    core.add(make_request("r", some_tokens(5)))
    rows = []
    for _ in range(4):
        plan = core.scheduler.schedule()
        rows += plan.rows
        core.scheduler.update(plan, core.runner.execute(plan))
    assert len({id(row.block_ids) for row in rows}) == len({id(row.output_token_ids) for row in rows}) == 1
    assert [len(row.token_ids) for row in rows] == [5, 1, 1, 1]


def test_each_block_is_hashed_once(monkeypatch):
    from ernie_serve.engine import request as module

    hashed = Counter()
    digest = module._digest
    monkeypatch.setattr(module, "_digest", lambda data: hashed.update([data]) or digest(data))
    core = make_core(num_blocks=12, block_size=4)
    run(core, make_request("a", some_tokens(16), max_tokens=25), make_request("b", some_tokens(16, 1), max_tokens=25))
    assert core.scheduler.stats.num_preempted > 0
    assert max(count for data, count in hashed.items() if data) == 1


def test_limits_below_one_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        Scheduler(BlockPool(1, 1), max_num_seqs=0, max_num_batched_tokens=8, max_model_len=8)


def told_scores(outputs):
    return [(each.token_id, each.logprob) for output in outputs for each in output.prompt_logprobs]


def expected_scores(prompt):
    return [(token, float(at)) for at, token in enumerate(prompt)][1:]


@pytest.mark.parametrize("max_scored_tokens", [1, 5, 256])
def test_a_prompt_is_scored_whole_and_once_in_whatever_chunks(max_scored_tokens):
    core = make_core(max_num_batched_tokens=7, max_scored_tokens=max_scored_tokens)
    requests = [make_request(f"r{n}", some_tokens(9 + 5 * n, n), prompt_logprobs=n) for n in range(3)]
    outputs = run(core, *requests, make_request("plain", some_tokens(20)))
    for request in requests:
        assert told_scores(outputs[request.request_id]) == expected_scores(request.prompt_token_ids)
        assert text(outputs[request.request_id]) == plain_loop(request, 200)[0]
    assert told_scores(outputs["plain"]) == []


def test_a_step_scores_no_more_tokens_than_it_may():
    core = make_core(max_scored_tokens=6)
    for n in range(4):
        core.add(make_request(f"r{n}", some_tokens(9, n), prompt_logprobs=0))
    sizes = [plan_sizes(core) for _ in range(6)]
    assert sizes[0] == {"r0": 6}
    assert sum(each.get("r3", 0) for each in sizes) >= 9


def test_what_a_step_does_not_score_is_left_to_the_prompts_of_others():
    core = make_core(max_num_batched_tokens=32, max_scored_tokens=6)
    core.add(make_request("scored", some_tokens(60), prompt_logprobs=0))
    core.add(make_request("other", some_tokens(60, 1)))
    assert plan_sizes(core) == {"scored": 6, "other": 26}
    assert plan_sizes(core) == {"scored": 6, "other": 26}
    assert plan_sizes(core) == {"scored": 6, "other": 8}


def test_a_cached_prompt_is_scored_all_the_same():
    core = make_core()
    run(core, make_request("first", some_tokens(30)))
    outputs = run(core, make_request("second", some_tokens(30), prompt_logprobs=2))["second"]
    assert told_scores(outputs) == expected_scores(some_tokens(30))
    assert outputs[-1].num_cached_tokens == 0
    assert run(core, make_request("third", some_tokens(30)))["third"][-1].num_cached_tokens == 28


def test_a_preempted_prompt_is_not_told_twice():
    requests = [
        make_request(f"r{n}", some_tokens(9 + 3 * n, n), max_tokens=30, seed=n, prompt_logprobs=1) for n in range(4)
    ]
    core = make_core(num_blocks=14, block_size=4, max_num_batched_tokens=8)
    outputs = run(core, *requests)
    assert core.scheduler.stats.num_preempted > 0
    for request in requests:
        assert told_scores(outputs[request.request_id]) == expected_scores(request.prompt_token_ids)
        assert text(outputs[request.request_id]) == plain_loop(request, 56)[0]


@pytest.mark.parametrize("length", [1, 2, 40])
def test_a_prompt_is_scored_without_a_token_of_answer(length):
    core = make_core(max_num_batched_tokens=16)
    outputs = run(core, make_request("r", some_tokens(length), max_tokens=0, prompt_logprobs=0))["r"]
    assert told_scores(outputs) == expected_scores(some_tokens(length))
    assert text(outputs) == []
    assert [output.finish_reason for output in outputs if output.finish_reason] == ["length"]
    assert core.scheduler.stats.blocks_used == 0


def test_a_prompt_that_takes_several_steps_says_that_it_has_begun():
    core = make_core(max_num_batched_tokens=8)
    short, long = run(core, make_request("short", [1, 2], 2))["short"], None
    long = run(core, make_request("long", some_tokens(30), 2))["long"]
    assert [output.token_ids == [] for output in short] == [False, False]
    assert [output.token_ids == [] for output in long] == [True, False, False]
    assert long[0].finish_reason is None
