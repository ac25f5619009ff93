"""The masks of a step, made in another thread while the step is computed.

Knows constraints and how their matchers are filled in. Knows nothing about tensors, text or the schedule.
"""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from ernie_serve.engine.constraint import Constraint
from ernie_serve.grammar.matcher import MaskFiller
from ernie_serve.messages import TokenMasks

logger = logging.getLogger(__name__)

Masks = Callable[[], TokenMasks]
"""Waits for the masks of a step; to be called once its logits are there."""


class MaskMaker:
    """Makes the masks of one step at a time. `start`, then let the step call what it returned, then `wait`.

    In between nobody else may touch the constraints.
    """

    def __init__(self, bytes_per_row: int, num_threads: int | None = None) -> None:
        self._bytes_per_row = bytes_per_row
        self._filler = MaskFiller(num_threads)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="masks")
        self._future: Future[TokenMasks] | None = None

    def start(self, constraints: dict[str, Constraint]) -> Masks | None:
        """Begin the masks of these requests, by id; None when each of them is free this time."""
        bound = {request_id: each for request_id, each in constraints.items() if not each.is_idle}
        if not bound:
            return None
        self._future = self._thread.submit(self._make, bound)
        return self._future.result

    def wait(self) -> None:
        """Return once the masks that were begun are made, also if nobody asked for them."""
        if self._future is not None:
            self._future.exception()
            self._future = None

    def _make(self, constraints: dict[str, Constraint]) -> TokenMasks:
        size = self._bytes_per_row
        masks = TokenMasks(list(constraints), bytearray(size * len(constraints)), size)
        rows = list(constraints.values())
        matchers = [(matcher, n) for n, each in enumerate(rows) if (matcher := each.matcher) is not None]
        if matchers:
            self._filler.fill(matchers, masks.bits, size)
        bits = np.frombuffer(masks.bits, np.uint8).reshape(len(rows), size)
        for each, row in zip(rows, bits, strict=True):
            each.finish_mask(row)
        return masks
