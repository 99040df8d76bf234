"""Experts over torch's own NCCL group."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch.distributed as dist

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.nccl import Message, NcclStagedCommunicator


class TorchDistNcclEplbCommunicator(NcclStagedCommunicator):
    """Batches of isend and irecv on the coordinator's device group.

    The group is the engine's: where a deadline passes, or a peer dies, it is aborted, since NCCL
    has no smaller way out, and tokens cannot travel over it any more either.

    Args:
        coordinator: whose `device_group` has NCCL.
        expert_weights: as for the base.
        timeout_s: as for the base.
    Collective: every rank of the group.
    Raises: TransferError if a rank does not come in time.
    """

    name: ClassVar[str] = "torch_nccl"

    def __init__(
        self, coordinator: GroupCoordinator, expert_weights: ExpertWeights, timeout_s: float
    ) -> None:
        self._device_group: dist.ProcessGroup | None = coordinator.device_group
        super().__init__(coordinator, expert_weights, timeout_s)
        self._connect()

    def _post(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        group = self._device_group
        assert group is not None, "closed communicators are refused before"
        if not sends and not receives:
            return
        # What torch.distributed.batch_isend_irecv does, which takes only groups that torch knows.
        device = self.device
        group._start_coalescing(device)
        for message in receives:
            group.recv([message.data], message.peer, 0)
        for message in sends:
            group.send([message.data], message.peer, 0)
        # Makes the current stream wait, not the host.
        group._end_coalescing(device).wait()

    def _take_abort(self) -> Callable[[], None] | None:
        group = self._device_group
        return None if group is None else group.abort

    def _disconnect(self) -> None:
        # The engine's; its connections stay.
        self._device_group = None
