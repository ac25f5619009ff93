"""Hands out the blocks of the KV cache, and finds those that already hold a prefix.

Knows block ids, owners' counts and digests. Knows nothing about requests, scheduling or what a block's bytes are.

A block is in exactly one of three states:

    used     one owner or more                        findable once published
    cached   no owner, but its digest is known        findable until it is reused, the longest unused first
    free     no owner, nothing worth finding
"""

from collections.abc import Iterable, Sequence
from itertools import islice


class BlockPool:
    """`num_blocks` blocks of `block_size` tokens. Who takes or shares a block gives it back once."""

    def __init__(self, num_blocks: int, block_size: int, *, enable_prefix_caching: bool = True) -> None:
        if num_blocks < 1 or block_size < 1:
            raise ValueError(f"A pool needs blocks and tokens in them, not {num_blocks} blocks of {block_size}.")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_caching = enable_prefix_caching
        self._owners = [0] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))
        self._cached: dict[int, None] = {}  # insertion order is the order of reuse
        self._digest_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def num_used(self) -> int:
        """Blocks with an owner."""
        return self.num_blocks - len(self._free) - len(self._cached)

    @property
    def num_cached(self) -> int:
        """Blocks without an owner that can still be found."""
        return len(self._cached)

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing."""
        return len(self._free)

    @property
    def num_available(self) -> int:
        """Blocks that `take` can hand out."""
        return len(self._free) + len(self._cached)

    def blocks_for(self, num_tokens: int) -> int:
        """How many blocks hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def take(self, count: int) -> list[int]:
        """Blocks to write, each with one owner. What the longest unused cached blocks held is forgotten."""
        assert count <= self.num_available, f"{count} blocks wanted, {self.num_available} available"
        blocks = []
        for _ in range(count):
            block_id = self._free.pop() if self._free else self._evict()
            self._owners[block_id] = 1
            blocks.append(block_id)
        return blocks

    def find(self, digests: Sequence[bytes], limit: int) -> list[int]:
        """The blocks that hold the longest known prefix of the first `limit` digests; nothing changes hands."""
        blocks = []
        for digest in islice(digests, limit):
            block_id = self._block_of.get(digest)
            if block_id is None:
                break
            blocks.append(block_id)
        return blocks

    def num_available_beside(self, blocks: Iterable[int]) -> int:
        """Blocks that `take` could hand out once these are shared."""
        return self.num_available - sum(not self._owners[block_id] for block_id in blocks)

    def share(self, blocks: Iterable[int]) -> None:
        """Become one more owner of blocks that were found. They are for reading only."""
        for block_id in blocks:
            if not self._owners[block_id]:
                del self._cached[block_id]
            self._owners[block_id] += 1

    def publish(self, block_id: int, digest: bytes) -> None:
        """Let others find a block that is full and written. The first of two equal blocks is the one found."""
        assert self._owners[block_id], f"block {block_id} is published without an owner"
        if self.enable_prefix_caching and digest not in self._block_of:
            self._block_of[digest] = block_id
            self._digest_of[block_id] = digest

    def release(self, blocks: Sequence[int]) -> None:
        """Give blocks back, the tail first, so that a prefix outlives its continuations."""
        for block_id in reversed(blocks):
            assert self._owners[block_id], f"block {block_id} is given back twice"
            self._owners[block_id] -= 1
            if self._owners[block_id]:
                continue
            if block_id in self._digest_of:
                self._cached[block_id] = None
            else:
                self._free.append(block_id)

    def check(self, tables: Iterable[Sequence[int]] = ()) -> None:
        """Assert that exactly these block tables own blocks, and that every block is in exactly one state.

        Without tables: assert that the pool is idle. Takes time in proportion to the pool.
        """
        owners = [0] * self.num_blocks
        for table in tables:
            for block_id in table:
                owners[block_id] += 1
        assert owners == self._owners, "owners do not match the block tables"
        used = {block_id for block_id, count in enumerate(owners) if count}
        assert sorted([*used, *self._cached, *self._free]) == list(range(self.num_blocks)), "a block is lost or double"
        assert self._cached.keys() <= self._digest_of.keys(), "a cached block has no digest"
        assert not self._digest_of.keys() & set(self._free), "a free block has a digest"
        assert {digest: block for block, digest in self._digest_of.items()} == self._block_of, "an index is wrong"

    def _evict(self) -> int:
        block_id = next(iter(self._cached))
        del self._cached[block_id]
        del self._block_of[self._digest_of.pop(block_id)]
        return block_id
