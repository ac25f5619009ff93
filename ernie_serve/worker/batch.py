"""Turns a plan into the tensors of one step.

Knows token ids, positions and blocks. Knows nothing about the network, sampling or memory.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ernie_serve.kernels.layout import Ends, Layout, Span
from ernie_serve.messages import PlanRow, StepPlan
from ernie_serve.worker.recent import Recent

# T tokens of the step, R rows of the plan

_Ints = np.ndarray[tuple[int, ...], np.dtype[np.int32]]
_Numbers = list[int] | np.ndarray[tuple[int, ...], np.dtype[np.integer[Any]]]


@dataclass(frozen=True, slots=True)
class ForwardBatch:
    """What the network reads in a step, and the rows of the plan whose logits it yields.

    First one for each of `sampled_rows`, in order, then, for each of `scored_rows`, one for every token of the row
    that has a successor in the prompt.
    """

    ids: Tensor  # [T] int64
    layout: Layout
    logit_indices: Tensor  # [len(sampled_rows) + sum(map(num_scored, scored_rows))] int64, into T
    sampled_rows: list[PlanRow]
    scored_rows: list[PlanRow]
    ends: Ends | None
    """The tokens at `logit_indices`, where each is the last of its row and there are others beside them."""


class BatchBuilder:
    """Builds batches for one device.

    Block tables are kept from step to step as arrays, for up to `max_requests` requests, so that a decode step costs
    the host a comparison and a copy of each table rather than a walk over it in Python.
    """

    def __init__(self, block_size: int, device: torch.device, max_requests: int) -> None:
        self.block_size = block_size
        self.device = device
        self._is_cpu = device.type == "cpu"
        self._tables: Recent[_Table] = Recent(max_requests)

    def build(self, plan: StepPlan) -> ForwardBatch:
        """The step's tensors. Every row of the plan has at least one token, and there is at least one row."""
        rows = plan.rows
        lens = [len(row.token_ids) for row in rows]
        assert all(lens), "a row of a plan has tokens"
        query_starts = [0, *accumulate(lens)]
        contexts = [row.start + count for row, count in zip(rows, lens, strict=True)]
        tables = self._block_tables(rows, contexts)
        positions, slots = self._places(rows, contexts, tables)
        layout = Layout(
            positions=self._upload(positions, torch.int64),
            slots=self._upload(slots, torch.int64),
            block_tables=self._upload(tables, torch.int32),
            query_starts=self._upload(query_starts, torch.int32),
            context_lens=self._upload(contexts, torch.int32),
            spans=tuple(map(Span, query_starts, lens, contexts)),
            block_size=self.block_size,
        )
        ids = [token_id for row in rows for token_id in row.token_ids]
        asked = [r for r, row in enumerate(rows) if row.wants_token]
        scored = [
            start + i
            for row, start in zip(rows, query_starts, strict=False)  # one start more, where the last row ends
            if row.wants_prompt_logprobs
            for i in range(num_scored(row))
        ]
        ends = None if scored or len(asked) == len(ids) else layout.ends(asked)
        wanted = [query_starts[r + 1] - 1 for r in asked]
        return ForwardBatch(
            ids=self._upload(ids, torch.int64),
            layout=layout,
            logit_indices=self._upload(wanted + scored, torch.int64) if ends is None else ends.tokens,
            sampled_rows=[rows[r] for r in asked],
            scored_rows=[row for row in rows if row.wants_prompt_logprobs],
            ends=ends,
        )

    def _places(self, rows: list[PlanRow], contexts: list[int], tables: _Ints) -> tuple[_Numbers, _Numbers]:
        """Positions and slots of the step's tokens. One token a row is so little that arrays only add calls."""
        S = self.block_size
        if all(len(row.token_ids) == 1 for row in rows):
            return [row.start for row in rows], [row.block_ids[row.start // S] * S + row.start % S for row in rows]
        each = [np.arange(row.start, stop) for row, stop in zip(rows, contexts, strict=True)]
        slots = [table[at // S].astype(np.int64) * S + at % S for table, at in zip(tables, each, strict=True)]
        return np.concatenate(each), np.concatenate(slots)

    def _block_tables(self, rows: list[PlanRow], contexts: list[int]) -> _Ints:
        """[R, most blocks a row needs]; a shorter row ends in zeros."""
        counts = [-(-context // self.block_size) for context in contexts]
        tables = np.zeros((len(rows), max(counts)), np.int32)
        for row, count, out in zip(rows, counts, tables, strict=True):
            assert len(row.block_ids) >= count, "a row's blocks cover its tokens"
            table = self._tables.get(row.request_id)
            if table is None:
                table = _Table()
                self._tables.put(row.request_id, table)
            out[:count] = table.follow(row.block_ids)[:count]
        return tables

    def _upload(self, values: _Numbers, dtype: torch.dtype) -> Tensor:
        made = torch.as_tensor(values, dtype=dtype)
        return made if self._is_cpu else made.to(self.device, non_blocking=True)


def num_scored(row: PlanRow) -> int:
    """How many tokens of a row have a successor in the prompt, so that their logits score it."""
    return max(0, min(len(row.token_ids), len(row.prompt_token_ids) - 1 - row.start))


class _Table:
    """One request's block ids, as the list that came last and as an array with room to grow."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.array: _Ints = np.zeros(16, np.int32)

    def follow(self, block_ids: list[int]) -> _Ints:
        """The array of `block_ids`: what was added is appended; after a preemption all of it is read again."""
        known = len(self.ids)
        if known == len(block_ids) and self.ids == block_ids:
            return self.array
        if self.ids != block_ids[:known]:
            known = 0
            self.ids = []
        if len(block_ids) > len(self.array):
            grown = np.zeros(2 * len(block_ids), np.int32)
            grown[:known] = self.array[:known]
            self.array = grown
        self.array[known : len(block_ids)] = block_ids[known:]
        self.ids += block_ids[known:]
        return self.array
