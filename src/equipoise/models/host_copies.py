"""Experts that a rank keeps in host memory for others, for when those die."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from equipoise.placement import Placement

HostBackup = Literal["none", "unreplicated", "all"]
"""Which experts some rank that has no slot of them keeps in host memory: none, those that had one
slot when the generation began, or all that not every rank holds."""


class CopyKey(NamedTuple):
    """An expert of a model.

    Attributes:
        set: of layers.
        layer: of the set.
        expert: which.
    """

    set: int
    layer: int
    expert: int


class HostCopies:
    """What one rank keeps. Experts never change, so a copy stays true wherever its expert goes.

    Owner: whoever makes it; read-only once a generation serves.

    Args:
        tensors: per expert its tensors on the CPU, each without the first dimension.
    """

    def __init__(self, tensors: Mapping[CopyKey, Sequence[Tensor]] = MappingProxyType({})) -> None:
        self._tensors = {key: tuple(some) for key, some in tensors.items()}

    def __contains__(self, key: CopyKey) -> bool:
        return key in self._tensors

    def __iter__(self) -> Iterator[CopyKey]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def __getitem__(self, key: CopyKey) -> tuple[Tensor, ...]:
        return self._tensors[key]

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        return sum(tensor.nbytes for some in self._tensors.values() for tensor in some)


def assign_copies(
    placements: Sequence[Placement], backup: HostBackup, had: Sequence[Iterable[CopyKey]]
) -> list[set[CopyKey]]:
    """Who keeps which experts: each that is kept, one rank that has no slot of it.

    Args:
        placements: per set of layers, of the same ranks.
        backup: which experts.
        had: by rank, what it keeps already, which stays there if it may.
    Returns:
        By rank.
    Collective: none; the same everywhere for the same input.
    """
    kept_by: dict[CopyKey, list[int]] = {}
    for rank, keys in enumerate(had):
        for key in keys:
            kept_by.setdefault(key, []).append(rank)
    given: list[set[CopyKey]] = [set() for _ in had]
    if backup == "none":
        return given
    for index, placement in enumerate(placements):
        ranks = range(placement.topology.num_ranks)
        slots_per_rank = placement.topology.slots_per_rank
        for layer, row in enumerate(placement.slot_to_expert.tolist()):
            holders: list[set[int]] = [set() for _ in range(placement.num_experts)]
            for slot, expert in enumerate(row):
                if expert >= 0:
                    holders[expert].add(slot // slots_per_rank)
            for expert, holding in enumerate(holders):
                others = [rank for rank in ranks if rank not in holding]
                if not others or (backup == "unreplicated" and len(holding) > 1):
                    continue
                key = CopyKey(index, layer, expert)
                before = [rank for rank in kept_by.get(key, ()) if rank not in holding]
                given[before[0] if before else others[(layer + expert) % len(others)]].add(key)
    return given
