"""What the masks of a step forbid, as the most that a score may be: minus infinity where a token is forbidden.

Knows packed bits and rows of scores. Knows nothing of grammars, sampling parameters or chance.
"""

import numpy as np
import torch
from torch import Tensor

from ernie_serve.messages import TokenMasks

# R rows of scores, V token ids

_CAPS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little") == 1, np.inf, -np.inf
).astype(np.float32)  # [256, 8]: what a byte of a mask leaves of its eight tokens


class Bounds:
    """The masks of a step, unpacked a few rows at a time where they are needed: those fit in a core's cache."""

    def __init__(self, masks: TokenMasks, places: dict[str, int], num_ids: int) -> None:
        self.rows = [places[request_id] for request_id in masks.request_ids]
        self._place = {row: place for place, row in enumerate(self.rows)}
        self._packed = np.frombuffer(masks.bits, np.uint8).reshape(len(self.rows), masks.bytes_per_row)
        self._num_ids = num_ids

    def __contains__(self, row: int) -> bool:
        return row in self._place

    def allows(self, row: int, token_id: int) -> bool:
        """Whether a row may yield a token; a row without a mask may yield any."""
        place = self._place.get(row)
        return place is None or bool(self._packed[place, token_id >> 3] >> (token_id & 7) & 1)

    def applied(self, scores: Tensor, rows: list[int]) -> Tensor:
        """The `scores` [len(rows), V] of rows that all have masks, without what is forbidden; a copy."""
        return torch.minimum(scores, self._caps(rows, scores.device))

    def applied_to_all(self, scores: Tensor) -> Tensor:
        """The `scores` [R, V] of the whole step, without what is forbidden; a copy."""
        at = torch.tensor(self.rows, device=scores.device)
        return scores.index_copy(0, at, self.applied(scores[at], self.rows))

    def _caps(self, rows: list[int], device: torch.device) -> Tensor:
        packed = self._packed[[self._place[row] for row in rows]]
        if device.type == "cpu":
            caps = torch.from_numpy(_CAPS.take(packed, axis=0))
        else:  # only the bits travel
            caps = torch.from_numpy(_CAPS).to(device)[torch.from_numpy(packed).to(device).long()]
        return caps.flatten(1)[:, : self._num_ids]
