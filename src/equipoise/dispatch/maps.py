"""The placement as the device sees it, changed in place so that captured graphs stay valid."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from equipoise.errors import PlacementError
from equipoise.placement import Placement


class PlacementMaps:
    """Device copies of a placement's maps.

    Owner: the forward thread. It reads them in every layer and writes them in `commit`, on the
    same stream, so stream order is their only protocol.

    Attributes:
        slot_to_expert: [L, P] int64, -1 for an empty slot.
        expert_to_slots: [L, E, P - E + 1] int64, padded with -1.
        replica_counts: [L, E] int64.
    """

    def __init__(self, placement: Placement, device: torch.device) -> None:
        self.placement = placement
        self.slot_to_expert = torch.tensor(placement.slot_to_expert, device=device)
        self.expert_to_slots = torch.tensor(placement.expert_to_slots, device=device)
        self.replica_counts = torch.tensor(placement.replica_counts, device=device)

    def commit(self, placement: Placement, layers: Iterable[int] | None = None) -> None:
        """Switch layers to what `placement` says of them.

        Args:
            placement: of the same layers, experts and topology.
            layers: which; None for all. The others keep what they have.
        Collective: none; every rank at the same step.
        Raises: PlacementError if the shapes differ.
        """
        standing = self.placement
        if (
            placement.num_experts != standing.num_experts
            or placement.topology != standing.topology
            or placement.num_layers != standing.num_layers
        ):
            raise PlacementError("a placement of another shape cannot take these maps over")
        chosen = list(range(placement.num_layers)) if layers is None else sorted(set(layers))
        index = torch.tensor(chosen, device=self.slot_to_expert.device)
        for name in ("slot_to_expert", "expert_to_slots", "replica_counts"):
            rows = torch.tensor(getattr(placement, name)[chosen], device=index.device)
            getattr(self, name).index_copy_(0, index, rows)
        table = standing.slot_to_expert.copy()
        table[chosen] = placement.slot_to_expert[chosen]
        self.placement = Placement(table, placement.num_experts, placement.topology)
