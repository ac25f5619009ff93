"""Where one answer stands in its grammar, and the masks of many at once.

Knows llguidance's matchers. Knows no requests and no tensors.
"""

from collections.abc import Sequence
from ctypes import addressof, c_char

from llguidance import LLExecutor, LLMatcher


class Matcher:
    """One answer's place in a grammar. Holds an error rather than raise it: see `error`."""

    def __init__(self, matcher: LLMatcher) -> None:
        self._matcher = matcher

    def copy(self) -> "Matcher":
        """Another answer at the same place; what is prepared is shared."""
        return Matcher(self._matcher.deep_copy())

    def advance(self, token_id: int) -> None:
        """The answer goes on with this token, which the last mask allowed."""
        self._matcher.consume_token(token_id)

    @property
    def has_ended(self) -> bool:
        """Whether nothing can follow."""
        return self._matcher.is_stopped()

    @property
    def error(self) -> str:
        """What went wrong; empty as long as nothing did. An error is for good."""
        return self._matcher.get_error() if self._matcher.is_error() else ""


class MaskFiller:
    """Computes masks of many matchers at once, in threads of its own and without the interpreter lock."""

    def __init__(self, num_threads: int | None = None) -> None:
        self._executor = LLExecutor(num_threads)

    def fill(self, matchers: Sequence[tuple[Matcher, int]], bits: bytearray, bytes_per_row: int) -> None:
        """Write the mask of each matcher into its row of `bits`; a matcher that fails holds an error afterwards."""
        healthy = [(m._matcher, row) for m, row in matchers if not m._matcher.is_error()]
        if healthy:
            start = c_char.from_buffer(bits)
            num_rows = len(bits) // bytes_per_row
            self._executor.unsafe_compute_mask_ptr(healthy, addressof(start), bytes_per_row, num_rows)
