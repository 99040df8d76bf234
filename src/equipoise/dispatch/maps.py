"""The placement as the device sees it, changed in place so that captured graphs stay valid."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.dispatch.turns import SPREAD, ReplicaChoice
from equipoise.errors import PlacementError
from equipoise.placement import Placement


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
        for name in (*_NAMES, *_TURNS):
            rows = getattr(prepared, name)
            getattr(self, name).index_copy_(0, prepared.index, rows)
            if rows.is_cuda:
                # Another stream made them: they must outlive this one's use of them.
                rows.record_stream(torch.cuda.current_stream(rows.device))
        if prepared.index.is_cuda:
            prepared.index.record_stream(torch.cuda.current_stream(prepared.index.device))
        self.placement = prepared.placement


@dataclass(frozen=True)
class PreparedMaps:
    """Rows that maps are to take over, on the device already. Any thread may make them.

    Attributes:
        placement: once they have.
        index: [l] int64, the layers.
        slot_to_expert: [l, P] int64.
        expert_to_slots: [l, E, P - E + 1] int64.
        replica_counts: [l, E] int64.
        turns: [l, E, W] int64.
        num_turns: [l, E] int64.
    """

    placement: Placement
    index: Tensor
    slot_to_expert: Tensor
    expert_to_slots: Tensor
    replica_counts: Tensor
    turns: Tensor
    num_turns: Tensor


_NAMES = ("slot_to_expert", "expert_to_slots", "replica_counts")
_TURNS = ("turns", "num_turns")


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
    rows = {name: torch.tensor(getattr(target, name)[chosen], device=device) for name in _NAMES}
    turns = choice.take_turns(target, chosen)
    rows |= {"turns": torch.tensor(turns.slots, device=device)}
    rows |= {"num_turns": torch.tensor(turns.counts, device=device)}
    return PreparedMaps(
        placement=Placement(table, target.num_experts, target.topology),
        index=torch.tensor(chosen, device=device),
        **rows,
    )
