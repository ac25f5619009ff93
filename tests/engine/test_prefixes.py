from engine_fakes import make_request

from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.prefixes import Prefixes
from ernie_serve.engine.request import Request


class Room:
    """A pool and its prefixes, with requests numbered as they come."""

    def __init__(self, *, min_tokens: int = 4, enable_prefix_caching: bool = True) -> None:
        self.pool = BlockPool(20, 4, enable_prefix_caching=enable_prefix_caching)
        self.prefixes = Prefixes(self.pool, min_tokens)
        self.num_arrived = 0

    def arriving(self, prompt, **sampling) -> Request:
        self.num_arrived += 1
        return Request.arriving(make_request(f"r{self.num_arrived}", list(prompt), **sampling), self.num_arrived)

    def started(self, prompt, **sampling) -> Request:
        request = self.arriving(prompt, **sampling)
        found = self.prefixes.find(request)
        self.pool.share(found)
        request.start(found + self.pool.take(self.pool.blocks_for(request.num_tokens) - len(found)), len(found), 4)
        self.prefixes.start(request)
        return request

    def waits(self, request: Request) -> bool:
        return self.prefixes.is_worth_waiting(request, len(self.prefixes.find(request)))


def test_blocks_are_found_once_they_are_computed():
    room = Room()
    first = room.started(range(10))
    second = room.arriving(range(10))
    assert room.prefixes.find(second) == []
    room.prefixes.publish(first, 7)
    assert room.prefixes.find(second) == first.block_ids[:1]
    room.prefixes.publish(first, 10)
    assert room.prefixes.find(second) == first.block_ids[:2]


def test_one_token_is_always_left_to_compute():
    room = Room()
    room.prefixes.publish(room.started(range(8)), 8)
    assert len(room.prefixes.find(room.arriving(range(8)))) == 1
    assert len(room.prefixes.find(room.arriving(range(9)))) == 2


def test_nobody_waits_for_a_prompt_that_is_scored_but_its_blocks_are_found():
    room = Room()
    first = room.started(range(20), prompt_logprobs=0)
    later = room.arriving(range(20))
    assert not room.waits(later)
    room.prefixes.publish(first, 20)
    assert len(room.prefixes.find(later)) == 4


def test_a_later_request_waits_for_what_an_earlier_one_computes():
    room = Room()
    early = room.arriving(range(20))
    first = room.started(range(20))
    later = room.arriving(range(20))
    assert room.waits(later)
    assert not room.waits(early)
    room.prefixes.publish(first, 20)
    assert not room.waits(later)


def test_a_request_does_not_wait_for_the_lesser_part_of_what_it_lacks():
    room = Room()
    room.started(range(8))
    assert room.waits(room.arriving([*range(8), *[30] * 8]))
    assert not room.waits(room.arriving([*range(8), *[30] * 9]))


def test_a_request_does_not_wait_for_few_tokens():
    room = Room(min_tokens=9)
    room.started(range(12))
    assert not room.waits(room.arriving([*range(8), 30]))
    assert room.waits(room.arriving([*range(12), 30]))


def test_nobody_waits_for_one_that_stopped():
    room = Room()
    first = room.started(range(20))
    room.prefixes.stop(first)
    assert not room.waits(room.arriving(range(20)))


def test_without_prefix_caching_nothing_is_found_or_waited_for():
    room = Room(enable_prefix_caching=False)
    room.prefixes.publish(room.started(range(20)), 20)
    later = room.arriving(range(20))
    assert room.prefixes.find(later) == []
    assert not room.waits(later)
    assert later.digests == []
