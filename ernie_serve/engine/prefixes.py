"""Which beginnings of a request are in the cache, and which will be soon.

Knows requests and the pool that finds blocks by digest. Knows nothing about budgets, seats or tensors.
"""

from itertools import islice

from ernie_serve.engine.kv_cache import BlockPool
from ernie_serve.engine.request import Request


class Prefixes:
    """Asked before a request starts; told when it starts, has filled blocks, and stops.

    Of requests that arrive together with one long beginning, the first computes it and the others wait for it, if
    that spares each at least `min_tokens_worth_waiting`: fewer are computed sooner than a step passes.
    """

    def __init__(self, pool: BlockPool, min_tokens_worth_waiting: int) -> None:
        self._pool = pool
        self._min_tokens_worth_waiting = min_tokens_worth_waiting
        self._coming: dict[bytes, tuple[int, int]] = {}  # digest -> order of the request that computes the block

    def find(self, request: Request) -> list[int]:
        """Blocks that hold the request's beginning; at least one token is left to compute, for its logits.

        None for a request that wants the logprobs of its prompt: it computes all of it.
        """
        if not self._pool.enable_prefix_caching or request.wants_scores:
            return []
        limit = self._limit(request)
        return self._pool.find(request.block_digests(limit, self._pool.block_size), limit)

    def is_worth_waiting(self, request: Request, num_found: int) -> bool:
        """Whether requests that come before this one compute, right now, half or more of what it lacks."""
        if request.wants_scores:
            return False
        num_coming = 0
        for digest in islice(request.digests, num_found, self._limit(request)):
            if self._coming.get(digest, request.order) >= request.order:
                break
            num_coming += 1
        num_missing = request.num_tokens - num_found * self._pool.block_size
        num_spared = num_coming * self._pool.block_size
        return num_spared >= max(self._min_tokens_worth_waiting, num_missing / 2)

    def start(self, request: Request) -> None:
        """The request will compute its unpublished blocks; one that scores its prompt, too slowly to wait for."""
        if self._pool.enable_prefix_caching and not request.wants_scores:
            size = self._pool.block_size
            for digest in request.block_digests(request.num_tokens // size, size)[request.num_published :]:
                self._coming.setdefault(digest, request.order)

    def publish(self, request: Request, num_computed: int) -> None:
        """Let others find the blocks that are full, now that so many tokens are computed."""
        num_full = num_computed // self._pool.block_size
        if num_full <= request.num_published or not self._pool.enable_prefix_caching:
            return
        digests = request.block_digests(num_full, self._pool.block_size)
        for index in range(request.num_published, num_full):
            self._pool.publish(request.block_ids[index], digests[index])
            self._coming.pop(digests[index], None)
        request.num_published = num_full

    def stop(self, request: Request) -> None:
        """The request computes no more, or starts over later."""
        for digest in request.digests[request.num_published :]:
            if self._coming.get(digest) == request.order:
                del self._coming[digest]

    def _limit(self, request: Request) -> int:
        return (request.num_tokens - 1) // self._pool.block_size
