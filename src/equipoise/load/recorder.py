"""Tokens per slot of the step that runs, counted on the device."""

from __future__ import annotations

import torch
from torch import Tensor


class LoadRecorder:
    """Counts the tokens that each slot of all ranks is sent by this rank.

    Owner: the forward thread. Buffers keep their addresses and no shape depends on data, so
    `record` may stand in a captured CUDA graph, and `enabled` switches it without a new capture.

    Args:
        num_layers: L, MoE layers.
        num_slots: P, slots of all ranks.
        device: where slot ids will be.
    """

    def __init__(self, num_layers: int, num_slots: int, device: torch.device) -> None:
        # One column more takes what must not count.
        self._buffer = torch.zeros(num_layers, num_slots + 1, dtype=torch.int64, device=device)
        self._weight = torch.ones(1, dtype=torch.int64, device=device)
        self._enabled = True

    @property
    def counts(self) -> Tensor:
        """[L, P] int64, a view: tokens per slot since the last `clear`."""
        return self._buffer[:, :-1]

    @property
    def enabled(self) -> bool:
        """Whether tokens count; off for dummy steps and warm-up. Switches in stream order."""
        return self._enabled

    @enabled.setter
    def enabled(self, on: bool) -> None:
        self._weight.fill_(int(on))
        self._enabled = on

    def record(self, layer: int, slot_ids: Tensor) -> None:
        """Count one token for each slot id.

        Args:
            layer: which MoE layer, 0..L-1.
            slot_ids: any shape, integer, on the recorder's device; global slots 0..P-1, or -1 for
                padding, which is not counted.
        Collective: none; no host sync.
        """
        flat = slot_ids.reshape(-1).to(torch.int64)
        trash = self._buffer.shape[1] - 1
        index = torch.where(flat < 0, trash, flat)
        self._buffer[layer].scatter_add_(0, index, self._weight.expand_as(index))

    def clear(self) -> None:
        """Start again at zero. Collective: none; no host sync."""
        self._buffer.zero_()
