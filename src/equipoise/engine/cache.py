"""Keys and values of sequences that join and leave between steps.

Axis letters: N tokens of a step, H key-value heads, D head dimension.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.errors import ConfigError

logger = logging.getLogger(__name__)

_GIB = 1 << 30


@dataclass(frozen=True)
class LayerShape:
    """What one token leaves in a layer, key and value (H, D); and if attention is told a window."""

    key: tuple[int, int]
    value: tuple[int, int]
    dtype: torch.dtype
    knows_window: bool

    @property
    def num_bytes(self) -> int:
        """Of one token."""
        return (self.key[0] * self.key[1] + self.value[0] * self.value[1]) * self.dtype.itemsize


@dataclass(frozen=True)
class CacheMemory:
    """What a cache takes, known before it is taken.

    Attributes:
        num_rows: sequences that fit.
        max_len: tokens of each.
        token_bytes: of one token, all layers.
        free_bytes: that the device had left before; None where that cannot be found out.
        device: where.
    """

    num_rows: int
    max_len: int
    token_bytes: int
    free_bytes: int | None
    device: torch.device

    @property
    def num_bytes(self) -> int:
        """All of it."""
        return self.num_rows * self.max_len * self.token_bytes

    def check(self) -> None:
        """Say in the log what will be taken. Raises: ConfigError if it does not fit."""
        needed = (
            f"keys and values of {self.num_rows} sequences of {self.max_len} tokens take "
            f"{self.num_bytes / _GIB:.2f} GiB"
        )
        free = "" if self.free_bytes is None else f"{self.free_bytes / _GIB:.2f} GiB free"
        if self.free_bytes is not None and self.num_bytes > self.free_bytes:
            raise ConfigError(
                f"{needed}, and {self.device} has {free}: ask for fewer sequences at once, or "
                "for shorter ones"
            )
        logger.info("%s; %s has %s", needed, self.device, free or "an unknown amount free")


class KVCache:
    """A row of fixed length for each sequence, in every layer.

    Rows in use are the first ones, so that a step reads them as a view. Memory is taken once.
    """

    def __init__(self, shapes: Mapping[int, LayerShape], memory: CacheMemory) -> None:
        self.memory = memory
        rows, length, device = memory.num_rows, memory.max_len, memory.device
        # Zeros, not whatever was there: a masked NaN is still a NaN after the product.
        self._layers = {
            number: tuple(
                torch.zeros(rows, heads, length, size, dtype=shape.dtype, device=device)
                for heads, size in (shape.key, shape.value)
            )
            for number, shape in shapes.items()
        }

    def store(
        self, layer: int, rows: Tensor, positions: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values [1, H, N, D], for rows [N] at positions [N].

        Returns: all of the layer's, each [rows, H, max_len, D]. Collective: none; no host sync.
        """
        keys, values = self._layers[layer]
        keys[rows, :, positions] = key[0].transpose(0, 1)
        values[rows, :, positions] = value[0].transpose(0, 1)
        return keys, values

    @torch.inference_mode()
    def move(self, source: int, into: int, length: int) -> None:
        """Make the first tokens of one row a copy of another's. Collective: none."""
        for pair in self._layers.values():
            for tensor in pair:
                tensor[into, :, :length] = tensor[source, :, :length]
