"""Which parts of stored tensors experts are made of."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ModelError
from equipoise.models.contract import ExpertLayer
from equipoise.models.headers import StoredTensor
from equipoise.models.read_ahead import Span
from equipoise.models.skeleton import DTYPES, Conversion

BATCH_BYTES = 128 << 20
"""What is worth being converted at once on a GPU."""


@dataclass(frozen=True)
class Part:
    """What is read of a stored tensor.

    Attributes:
        stored: the tensor.
        experts: rows [first, end) of one that has a row for each expert; None for all of it.
    """

    stored: StoredTensor
    experts: tuple[int, int] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is read."""
        if self.experts is None:
            return self.stored.shape
        first, end = self.experts
        return (end - first, *self.stored.shape[1:])

    @property
    def span(self) -> Span:
        """Where it is."""
        stored = self.stored
        if self.experts is None:
            return Span(stored.file, stored.begin, stored.num_bytes)
        first, end = self.experts
        row_bytes = stored.num_bytes // stored.shape[0]
        return Span(stored.file, stored.begin + first * row_bytes, (end - first) * row_bytes)

    @property
    def index(self) -> Any:
        """What safetensors' slices take for it."""
        return ... if self.experts is None else slice(*self.experts)

    def shaped(self, data: Tensor) -> Tensor:
        """Its bytes as a tensor."""
        dtype = DTYPES[self.stored.dtype]
        if data.storage_offset() % dtype.itemsize:
            # Behind one of smaller numbers in memory.
            data = data.clone()
        return data.view(dtype).view(self.shape)

    def on_meta(self) -> Tensor:
        """A tensor like it without data."""
        return torch.empty(self.shape, dtype=DTYPES[self.stored.dtype], device="meta")


@dataclass(frozen=True)
class Batch:
    """Experts that are read and converted together.

    Attributes:
        layer: whose.
        experts: which, consecutive.
        parts: what is read for them, in the order of the files.
    """

    layer: ExpertLayer
    experts: range
    parts: tuple[Part, ...]


def pick_parts(conversion: Conversion, layer: ExpertLayer, experts: range) -> dict[str, list[Part]]:
    """What consecutive experts are made of, by the conversion's patterns.

    Where there are several tensors for each expert, block after block, they have some of each
    block.

    Collective: none.
    """
    num_experts = layer.num_experts
    picked: dict[str, list[Part]] = {}
    for pattern, several in conversion.sources.items():
        if _has_one_each(several, layer):
            blocks = range(0, len(several), num_experts)
            picked[pattern] = [Part(several[first + e]) for first in blocks for e in experts]
        else:
            rows = experts.start, experts.stop
            picked[pattern] = [
                Part(stored, rows if _has_rows(stored, layer) else None) for stored in several
            ]
    return picked


def make_batches(
    conversions: Sequence[Conversion],
    layer: ExpertLayer,
    experts: Sequence[int],
    most_bytes: int,
) -> Iterator[Batch]:
    """Divide a layer's experts, in ascending order, into what is converted at once.

    Args:
        conversions: of the layer.
        layer: whose experts.
        experts: which.
        most_bytes: of a batch, if a single expert does not take more.
    Collective: none.
    """
    separable = all(
        _has_one_each(several, layer) or all(_has_rows(stored, layer) for stored in several)
        for conversion in conversions
        for several in conversion.sources.values()
    )
    most = 1
    if separable:
        one = _sort_parts(conversions, layer, range(1))
        most = max(1, most_bytes // max(1, sum(part.span.num_bytes for part in one)))
    first = 0
    while first < len(experts):
        end = first + 1
        while end < len(experts) and end - first < most and experts[end] == experts[end - 1] + 1:
            end += 1
        together = range(experts[first], experts[end - 1] + 1)
        yield Batch(layer, together, _sort_parts(conversions, layer, together))
        first = end


def check_complete(directory: Path, layer: ExpertLayer, several: list[StoredTensor]) -> None:
    """Refuse a pattern that has tensors for some experts only, or one that is not as the others.

    Raises: ModelError that names the expert or the tensor.
    """
    if len(several) == 1:
        return
    if len(several) % layer.num_experts:
        raise ModelError(
            f"{directory}: {layer.name} lacks expert {_find_gap(layer, several)} of "
            f"{layer.num_experts}: {len(several)} tensors are stored like {several[0].name}"
        )
    for stored in several:
        check_shape(stored, several[0].shape)


def check_shape(stored: StoredTensor, wanted: Any) -> None:
    """Refuse a tensor of another shape. Raises: ModelError that names it."""
    if tuple(stored.shape) != tuple(wanted):
        raise ModelError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, but {list(wanted)} is "
            "wanted"
        )


def _has_one_each(several: Sequence[StoredTensor], layer: ExpertLayer) -> bool:
    return len(several) >= layer.num_experts and len(several) % layer.num_experts == 0


def _has_rows(stored: StoredTensor, layer: ExpertLayer) -> bool:
    return bool(stored.shape) and stored.shape[0] == layer.num_experts


def _sort_parts(
    conversions: Iterable[Conversion], layer: ExpertLayer, experts: range
) -> tuple[Part, ...]:
    parts = (
        part
        for conversion in conversions
        for several in pick_parts(conversion, layer, experts).values()
        for part in several
    )
    return tuple(sorted(parts, key=lambda part: (part.span.file, part.span.begin)))


def _find_gap(layer: ExpertLayer, several: list[StoredTensor]) -> str:
    numbers = [[int(n) for n in re.findall(r"\d+", stored.name)] for stored in several]
    places = {len(found) for found in numbers}
    if len(places) == 1:
        for column in zip(*numbers, strict=True):
            if len(set(column)) == len(several):
                gap = sorted(set(range(layer.num_experts)) - set(column))
                return ", ".join(map(str, gap))
    return "or another"
