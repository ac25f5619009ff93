from engine_fakes import make_request

from ernie_serve.engine.request import Request


def arriving(prompt, output=(), **options) -> Request:
    request = Request.arriving(make_request("r", list(prompt), **options), 1)
    request.output_ids += output
    return request


def test_tokens_run_across_prompt_and_output():
    request = arriving(range(5), [5, 6, 7])
    everything = list(range(8))
    for start in range(9):
        for stop in range(start, 9):
            assert request.tokens(start, stop) == everything[start:stop]


def test_counts_follow_from_the_facts():
    request = arriving(range(5), [5, 6])
    request.num_computed = 4
    assert (request.num_tokens, request.num_pending) == (7, 3)


def test_a_digest_stands_for_all_tokens_before_and_for_the_salt():
    one = arriving(range(8)).block_digests(2, 4)
    assert arriving(range(8), [1, 2]).block_digests(2, 4) == one
    assert arriving(range(5), [5, 6, 7]).block_digests(2, 4) == one
    other_end = arriving([0, 1, 2, 3, 9, 5, 6, 7]).block_digests(2, 4)
    assert other_end[0] == one[0]
    assert other_end[1] != one[1]
    other_start = arriving([9, 1, 2, 3, 4, 5, 6, 7]).block_digests(2, 4)
    salted = arriving(range(8), cache_salt="mine").block_digests(2, 4)
    assert not {*one} & {*other_start, *salted}


def test_lower_priority_then_earlier_arrival_comes_first():
    orders = [Request.arriving(make_request("r", [1], priority=p), n).order for n, p in enumerate([1, 0, 0, -1])]
    assert sorted(range(4), key=orders.__getitem__) == [3, 1, 2, 0]


def test_restart_keeps_what_is_said_and_leaves_the_lists_of_a_plan_alone():
    request = arriving(range(4), [4])
    request.block_ids += [7, 8]
    request.num_computed = 5
    table = request.block_ids
    request.restart()
    assert (request.output_ids, request.num_pending, request.block_ids) == ([4], 5, [])
    assert table == [7, 8]
