"""What the balancer knows of one model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from equipoise.balancer.stats import ModelStats
from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.dispatch.maps import PlacementMaps, PreparedMaps, prepare_maps
from equipoise.errors import PlacementError
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import Placement
from equipoise.topology import IntArray

OnCommit = Callable[[int, IntArray], None]
"""Called with a layer and its local slots [n] int64, n > 0, that hold another expert now."""


@dataclass
class EplbModelState:
    """One model under balance. Owner: the forward thread.

    Attributes:
        name: what logs and outcomes call it.
        expert_weights: per MoE layer the tensors [S, ...] of this rank's slots.
        maps: the committed placement on the device, changed in place.
        recorder: counts the tokens of the current step.
        window: logical load of the last steps.
        communicator: the wire for its weights.
        rank: whose slots these are.
        on_commit: what the engine does with slots that have switched, or None.
        stats: its rebalances so far.
    """

    name: str
    expert_weights: ExpertWeights
    maps: PlacementMaps
    recorder: LoadRecorder
    window: LoadWindow
    communicator: EplbCommunicator
    rank: int
    on_commit: OnCommit | None = None
    stats: ModelStats = field(default_factory=ModelStats)

    def __post_init__(self) -> None:
        self._addresses = self._find_addresses()
        self.window.bind(self.recorder.counts, self.maps.expert_to_slots)

    @property
    def expert_bytes(self) -> IntArray:
        """[L] int64, bytes of one expert of each layer."""
        sizes = [sum(t[0].numel() * t.element_size() for t in each) for each in self.expert_weights]
        return np.array(sizes, dtype=np.int64)

    @property
    def placement(self) -> Placement:
        """The placement that is committed."""
        return self.maps.placement

    def record_step(self) -> None:
        """Take the step's counts into the window, and start the next step at zero.

        Collective: none; no host sync.
        """
        self.window.take(self.recorder.counts, self.maps.slot_to_expert, self.maps.expert_to_slots)

    def commit(self, target: Placement, layers: IntArray) -> None:
        """Switch the maps of layers whose slots have just been filled, and tell the engine.

        Args:
            target: what their slots hold now.
            layers: [l] int64.
        Collective: none; every rank at the same step.
        """
        self.switch(self.prepare(self.placement, target, layers))

    def prepare(
        self, standing: Placement, target: Placement, layers: Iterable[int]
    ) -> PreparedMaps:
        """What `switch` will take, once `standing` stands; any thread may call it."""
        maps = self.maps
        return prepare_maps(standing, target, layers, maps.slot_to_expert.device, maps.choice)

    def switch(self, prepared: PreparedMaps) -> None:
        """As `commit`, with maps that were prepared."""
        self._tell(prepared, self.maps.switch)

    def adopt(self, prepared: PreparedMaps) -> None:
        """As `switch`, where what `PlacementMaps.list_copies` names was copied with the slots."""
        self._tell(prepared, self.maps.adopt)

    def _tell(self, prepared: PreparedMaps, take: Callable[[PreparedMaps], None]) -> None:
        before = self.placement
        take(prepared)
        if self.on_commit is None:
            return
        for layer, slots in _find_switched(before, self.placement, self.rank):
            self.on_commit(layer, slots)

    def check_storage(self) -> None:
        """Refuse weights that have moved in memory, where a wire would not find them.

        Collective: none.
        Raises: PlacementError that names the layer and the tensor.
        """
        for (layer, tensor), then, now in zip(
            ((i, t) for i, each in enumerate(self.expert_weights) for t in range(len(each))),
            self._addresses,
            self._find_addresses(),
            strict=True,
        ):
            if then != now:
                raise PlacementError(
                    f"model {self.name!r}: layer {layer}, tensor {tensor} has moved in memory "
                    "since it was added: weights must keep their storage, copy into it instead"
                )

    def _find_addresses(self) -> list[int]:
        return [tensor.data_ptr() for layer in self.expert_weights for tensor in layer]


def _find_switched(
    before: Placement, after: Placement, rank: int
) -> Iterable[tuple[int, IntArray]]:
    num_slots = after.topology.slots_per_rank
    local = slice(rank * num_slots, (rank + 1) * num_slots)
    held = after.slot_to_expert[:, local]
    # An empty slot keeps its bytes, so there is nothing to derive from them anew.
    changed = (held != before.slot_to_expert[:, local]) & (held >= 0)
    for layer in np.flatnonzero(changed.any(axis=1)).tolist():
        yield layer, np.flatnonzero(changed[layer])
