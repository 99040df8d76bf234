"""Keys and values of sequences that join and leave between steps.

Axis letters: B rows of a step, H key-value heads, T tokens per row, D head dimension.
"""

from __future__ import annotations

import torch
from torch import Tensor


class RowCache:
    """What a Hugging Face decoder asks of a cache, with one row per sequence.

    Rows in use are the first ones, so that a step reads them as a view; a row that is freed is
    filled by the last one. Memory is taken once, at the first step of each layer.

    Attention masks are the engine's: it gives them whole, so a model asks for no sizes here.

    Args:
        num_rows: sequences that fit.
        max_len: tokens of each.
    """

    def __init__(self, num_rows: int, max_len: int) -> None:
        self._shape = (num_rows, max_len)
        self._layers: list[tuple[Tensor, Tensor]] = []
        self._first_row = 0
        self._positions: Tensor | None = None
        self._length = 0

    def prefill(self, first_row: int) -> None:
        """The next forward pass fills rows from `first_row` on, from position 0 on."""
        self._first_row, self._positions = first_row, None

    def decode(self, positions: Tensor, length: int) -> None:
        """The next forward pass adds a token to each row in use.

        Args:
            positions: [B] int64, where each row's token goes; B rows are in use.
            length: tokens of the longest row, the new one included.
        """
        self._positions, self._length = positions, length

    def move(self, source: int, into: int) -> None:
        """Make one row a copy of another."""
        for pair in self._layers:
            for tensor in pair:
                tensor[into].copy_(tensor[source])

    def update(
        self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object
    ) -> tuple[Tensor, Tensor]:
        """Take a layer's new keys and values; called by the model's attention.

        Args:
            keys: [B, H, T, D].
            values: [B, H, T, D].
            layer_idx: which layer.
        Returns:
            Keys and values to attend to, each [B, H, length, D].
        """
        if layer_idx == len(self._layers):
            self._layers.append((self._allocate(keys), self._allocate(values)))
        if self._positions is None:
            rows = slice(self._first_row, self._first_row + keys.shape[0])
            for stored, new in zip(self._layers[layer_idx], (keys, values), strict=True):
                stored[rows, :, : new.shape[2]] = new
            return keys, values
        num_rows = keys.shape[0]
        row = torch.arange(num_rows, device=keys.device)
        for stored, new in zip(self._layers[layer_idx], (keys, values), strict=True):
            stored[row, :, self._positions] = new[:, :, 0]
        stored_keys, stored_values = self._layers[layer_idx]
        return (
            stored_keys[:num_rows, :, : self._length],
            stored_values[:num_rows, :, : self._length],
        )

    def _allocate(self, like: Tensor) -> Tensor:
        num_rows, max_len = self._shape
        # Zeros, not whatever was there: a masked NaN is still a NaN after the product.
        return like.new_zeros(num_rows, like.shape[1], max_len, like.shape[3])
