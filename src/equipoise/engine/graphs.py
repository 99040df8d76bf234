"""Decode steps as CUDA graphs, where what tokens travel by can stand in one.

Maps, counts and slots are read and written where they are, so a graph stays right while experts
move. Axis letters: B rows of a graph, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equipoise.topology import IntArray

_LEAST_KEYS = 128

Decode = Callable[[Tensor, int], Tensor]
"""Of inputs [4, B] int64 (token, position, whether there is one, position of token 0 among all) and
the positions to look at: logits [B, V]."""


class _Captured(NamedTuple):
    graph: torch.cuda.CUDAGraph
    inputs: Tensor
    logits: Tensor


class DecodeGraphs:
    """One graph for each number of rows and of positions, both rounded up.

    Each is captured once its forward pass has run outside of one: that took part in what the ranks
    did together, and a capture takes part in nothing. Owner: the forward thread.
    """

    def __init__(self, decode: Decode, max_rows: int, max_len: int) -> None:
        self._decode, self._most = decode, (max_rows, max_len)
        self._captured: dict[tuple[int, int], _Captured] = {}
        self._pool: Any = None

    def run(self, columns: IntArray, longest: int, device: torch.device) -> Tensor:
        """Decode a token of each row, [4, rows] int64; gives [rows, V] until the next call.

        Few calls of torch: each lets other threads have the interpreter, and waits to get it back.
        Collective: as the forward pass.
        """
        num_rows = columns.shape[1]
        shape = _round_up(num_rows, self._most[0]), _round_up(longest, self._most[1], _LEAST_KEYS)
        inputs = torch.from_numpy(np.pad(columns, ((0, 0), (0, shape[0] - num_rows))))
        captured = self._captured.get(shape)
        if captured is None:
            there = inputs.to(device)
            logits = self._decode(there, shape[1]).clone()
            self._captured[shape] = self._capture(there, shape[1])
        else:
            captured.inputs.copy_(inputs, non_blocking=True)
            captured.graph.replay()
            logits = captured.logits
        return logits[:num_rows]

    def clear(self) -> None:
        """Forget all graphs: they are of a generation that serves no more. Collective: none."""
        self._captured.clear()
        self._pool = None

    def _capture(self, inputs: Tensor, longest: int) -> _Captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._decode(inputs, longest)
        self._pool = self._pool or graph.pool()
        return _Captured(graph, inputs, logits)


def _round_up(value: int, most: int, least: int = 1) -> int:
    return min(most, max(least, 1 << (value - 1).bit_length()))
