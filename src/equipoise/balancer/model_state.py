"""What the balancer knows of one model."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.dispatch.maps import PlacementMaps
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import Placement
from equipoise.topology import IntArray


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
    """

    name: str
    expert_weights: ExpertWeights
    maps: PlacementMaps
    recorder: LoadRecorder
    window: LoadWindow
    communicator: EplbCommunicator
    since_log: torch.Tensor = field(init=False)
    """[L, E] int64, tokens of this rank per expert since balancedness was last logged."""

    def __post_init__(self) -> None:
        self.since_log = torch.zeros_like(self.maps.replica_counts)

    @property
    def placement(self) -> Placement:
        """The placement that is committed."""
        return self.maps.placement

    @property
    def expert_bytes(self) -> IntArray:
        """[L] int64, bytes of one expert in each layer, all its tensors."""
        return np.array(
            [sum(t[0].numel() * t.element_size() for t in layer) for layer in self.expert_weights],
            dtype=np.int64,
        )

    def record_step(self) -> None:
        """Take the step's counts into the window, and start the next step at zero.

        Collective: none; no host sync.
        """
        self.window.push(self.recorder.counts, self.maps.slot_to_expert)
        self.recorder.clear()
