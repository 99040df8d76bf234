"""The placement as the device sees it, changed in place so that captured graphs stay valid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.spans import Spans
from equipoise.dispatch.turns import SPREAD, ReplicaChoice
from equipoise.errors import PlacementError
from equipoise.placement import Placement
from equipoise.topology import IntArray


class PlacementMaps:
    """Device copies of a placement's maps.

    Owner: the forward thread. It reads them in every layer and writes them in `switch`, on the
    same stream, so stream order is their only protocol.

    Args:
        placement: to begin with.
        device: where tokens are.
        choice: which replica of its expert a token goes to.
    Attributes:
        slot_to_expert: [L, P] int64, -1 for an empty slot.
        expert_to_slots: [L, E, P - E + 1] int64, padded with -1.
        replica_counts: [L, E] int64.
        turns: [L, E, W] int64, the slots that an expert's tokens go to, by their position.
        num_turns: [L, E] int64, how many of them take turns.
    """

    def __init__(
        self, placement: Placement, device: torch.device, choice: ReplicaChoice = SPREAD
    ) -> None:
        self.placement = placement
        self.choice = choice
        every = range(placement.num_layers)
        rows = prepare_maps(placement, placement, every, device, choice)
        self.slot_to_expert = rows.slot_to_expert
        self.expert_to_slots = rows.expert_to_slots
        self.replica_counts = rows.replica_counts
        self.turns = rows.turns
        self.num_turns = rows.num_turns

    def commit(self, placement: Placement, layers: Iterable[int] | None = None) -> None:
        """Switch layers to what `placement` says of them.

        Args:
            placement: of the same layers, experts and topology.
            layers: which; None for all. The others keep what they have.
        Collective: none; every rank at the same step.
        Raises: PlacementError if the shapes differ.
        """
        device = self.slot_to_expert.device
        self.switch(prepare_maps(self.placement, placement, layers, device, self.choice))

    def switch(self, prepared: PreparedMaps) -> None:
        """Switch to what was prepared from the placement that stands.

        Collective: none; every rank at the same step.
        """
        for name in _NAMES:
            getattr(self, name).index_copy_(0, prepared.index, getattr(prepared, name))
        prepared.outlive_stream()
        self.adopt(prepared)

    def list_copies(self, prepared: PreparedMaps) -> tuple[Spans, Spans]:
        """What `switch` copies, for whoever copies it with other things: from where, and to where.

        Args:
            prepared: for these maps.
        Collective: none; any thread may ask.
        """
        sources, destinations, num_bytes = [], [], []
        for name in _NAMES:
            rows, all_rows = getattr(prepared, name), getattr(self, name)
            size = rows[0].numel() * rows.element_size()
            sources.append(rows.data_ptr() + np.arange(len(prepared.layers)) * size)
            destinations.append(all_rows.data_ptr() + prepared.layers * size)
            num_bytes.append(np.full(len(prepared.layers), size))
        lengths = np.concatenate(num_bytes)
        return Spans(np.concatenate(sources), lengths), Spans(np.concatenate(destinations), lengths)

    def adopt(self, prepared: PreparedMaps) -> None:
        """Call the placement the one that stands, as its rows were copied. Collective: none."""
        self.placement = prepared.placement


@dataclass(frozen=True)
class PreparedMaps:
    """Rows that maps are to take over, on the device already. Any thread may make them.

    Attributes:
        placement: once they have.
        layers: [l] int64, which, on the host.
        packed: [bytes] uint8, memory of all the others.
        index: [l] int64, the layers.
        slot_to_expert: [l, P] int64.
        expert_to_slots: [l, E, P - E + 1] int64.
        replica_counts: [l, E] int64.
        turns: [l, E, W] int64.
        num_turns: [l, E] int64.
    """

    placement: Placement
    layers: IntArray
    packed: Tensor
    index: Tensor
    slot_to_expert: Tensor
    expert_to_slots: Tensor
    replica_counts: Tensor
    turns: Tensor
    num_turns: Tensor

    def outlive_stream(self) -> None:
        """Keep the rows until the current stream, which is not theirs, has used them."""
        if self.packed.is_cuda:
            self.packed.record_stream(torch.cuda.current_stream(self.packed.device))


_NAMES = ("slot_to_expert", "expert_to_slots", "replica_counts", "turns", "num_turns")
_ALIGNMENT = 16
"""Of each tensor among the packed ones, so that copies take the widest words."""


def prepare_maps(
    standing: Placement,
    target: Placement,
    layers: Iterable[int] | None,
    device: torch.device,
    choice: ReplicaChoice = SPREAD,
) -> PreparedMaps:
    """Make what `PlacementMaps.switch` takes.

    Args:
        standing: the placement that will stand then.
        target: of the same layers, experts and topology.
        layers: to be switched to `target`; None for all.
        device: of the maps.
        choice: that of the maps.
    Collective: none.
    Raises: PlacementError if the shapes differ.
    """
    if (
        target.num_experts != standing.num_experts
        or target.topology != standing.topology
        or target.num_layers != standing.num_layers
    ):
        raise PlacementError("a placement of another shape cannot take these maps over")
    chosen = list(range(target.num_layers)) if layers is None else sorted(set(layers))
    table = standing.slot_to_expert.copy()
    table[chosen] = target.slot_to_expert[chosen]
    turns = choice.take_turns(target, chosen)
    layers = np.array(chosen, dtype=np.int64)
    arrays = {
        "index": layers,
        "slot_to_expert": target.slot_to_expert[chosen],
        "expert_to_slots": target.expert_to_slots[chosen],
        "replica_counts": target.replica_counts[chosen],
        "turns": turns.slots,
        "num_turns": turns.counts,
    }
    packed, rows = _pack(arrays, device)
    return PreparedMaps(
        placement=Placement(table, target.num_experts, target.topology),
        layers=layers,
        packed=packed,
        **rows,
    )


def _pack(arrays: dict[str, IntArray], device: torch.device) -> tuple[Tensor, dict[str, Tensor]]:
    """Bring arrays of int64 to the device by one copy: its memory, and the tensors in it."""
    sizes = [-(-array.nbytes // _ALIGNMENT) * _ALIGNMENT for array in arrays.values()]
    host = np.zeros(sum(sizes), dtype=np.uint8)
    starts = np.cumsum([0, *sizes]).tolist()
    for array, start in zip(arrays.values(), starts, strict=False):
        host[start : start + array.nbytes] = np.ascontiguousarray(array).view(np.uint8).ravel()
    packed = torch.from_numpy(host).to(device)
    tensors = {
        name: packed[start : start + array.nbytes].view(torch.int64).view(array.shape)
        for (name, array), start in zip(arrays.items(), starts, strict=False)
    }
    return packed, tensors
