import pytest

from ernie_serve.engine.kv_cache import BlockPool


def digests(*names: str) -> list[bytes]:
    return [name.encode() for name in names]


def pool_with(*names: str, num_blocks: int = 6) -> tuple[BlockPool, list[int]]:
    """A pool in which blocks with these digests have an owner."""
    pool = BlockPool(num_blocks, 4)
    blocks = pool.take(len(names))
    for block_id, digest in zip(blocks, digests(*names), strict=True):
        pool.publish(block_id, digest)
    return pool, blocks


def counts(pool: BlockPool) -> tuple[int, int, int]:
    assert pool.num_used + pool.num_cached + pool.num_free == pool.num_blocks
    return pool.num_used, pool.num_cached, pool.num_free


def test_a_block_is_used_then_cached_then_reused():
    pool, blocks = pool_with("a", "b")
    assert counts(pool) == (2, 0, 4)
    pool.release(blocks)
    assert counts(pool) == (0, 2, 4)
    pool.take(6)
    assert counts(pool) == (6, 0, 0)
    assert pool.find(digests("a", "b"), 2) == []


def test_a_block_that_was_never_published_is_free_when_given_back():
    pool = BlockPool(2, 4)
    pool.release(pool.take(2))
    assert counts(pool) == (0, 0, 2)


def test_blocks_that_hold_nothing_are_taken_before_cached_ones():
    pool, blocks = pool_with("a", num_blocks=3)
    pool.release(blocks)
    assert blocks[0] not in pool.take(2)
    assert pool.find(digests("a"), 1) == blocks


def test_the_tail_is_reused_before_the_head():
    pool, blocks = pool_with("a", "b", "c", num_blocks=3)
    pool.release(blocks)
    assert pool.take(1) == blocks[2:]
    assert pool.find(digests("a", "b", "c"), 3) == blocks[:2]


def test_the_longest_unused_is_reused_first():
    pool, (a, b) = pool_with("a", "b", num_blocks=2)
    pool.release([a])
    pool.release([b])
    pool.share([a])
    pool.release([a])
    assert pool.take(1) == [b]


def test_find_stops_at_the_first_gap_and_at_the_limit():
    pool, blocks = pool_with("a", "b", "c")
    assert pool.find(digests("a", "x", "c"), 3) == blocks[:1]
    assert pool.find(digests("a", "b", "c"), 2) == blocks[:2]
    assert pool.find(digests("b"), 1) == blocks[1:2]


def test_a_shared_block_comes_back_when_its_last_owner_lets_go():
    pool, blocks = pool_with("a")
    pool.share(blocks)
    assert pool._owners[blocks[0]] == 2
    pool.release(blocks)
    assert counts(pool)[0] == 1
    pool.release(blocks)
    assert counts(pool) == (0, 1, 5)


def test_sharing_an_idle_block_makes_it_unavailable():
    pool, blocks = pool_with("a", "b")
    pool.release(blocks[:1])
    assert pool.num_available == 5
    assert pool.num_available_beside(blocks) == 4
    pool.share(blocks)
    assert pool.num_available == 4


def test_the_first_of_two_equal_blocks_is_found_and_the_second_is_free_when_given_back():
    pool, (first, second) = pool_with("a", "b")
    (copy,) = pool.take(1)
    pool.publish(copy, b"a")
    assert pool.find(digests("a"), 1) == [first]
    pool.release([copy])
    assert counts(pool) == (2, 0, 4)
    pool.release([first, second])
    pool.check()


def test_without_prefix_caching_nothing_is_found():
    pool = BlockPool(2, 4, enable_prefix_caching=False)
    blocks = pool.take(1)
    pool.publish(blocks[0], b"a")
    assert pool.find([b"a"], 1) == []
    pool.release(blocks)
    assert counts(pool) == (0, 0, 2)


def test_blocks_for_rounds_up():
    pool = BlockPool(1, 4)
    assert [pool.blocks_for(count) for count in (0, 1, 4, 5, 8)] == [0, 1, 1, 2, 2]


def test_taking_too_much_or_giving_back_twice_is_noticed():
    pool = BlockPool(2, 4)
    with pytest.raises(AssertionError, match="3 blocks wanted, 2 available"):
        pool.take(3)
    blocks = pool.take(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="given back twice"):
        pool.release(blocks)


def test_check_notices_a_lost_block_and_a_wrong_table():
    pool, blocks = pool_with("a", "b")
    pool.check([blocks])
    with pytest.raises(AssertionError, match="owners"):
        pool.check()
    with pytest.raises(AssertionError, match="owners"):
        pool.check([blocks, blocks])
    pool._free.pop()
    with pytest.raises(AssertionError, match="lost"):
        pool.check([blocks])


def test_a_pool_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 blocks of 4"):
        BlockPool(0, 4)
