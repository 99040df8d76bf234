"""Tokens by all_to_all_single, over NCCL or gloo.

Axis letters: T tokens of this rank, K slots per token, R ranks, M token rows (sent or received,
each for one rank), N outputs (one per slot of a token), D hidden, B bytes of a row that travels.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.dispatch.base import Dispatched, DispatchedRows, TokenDispatcher
from equipoise.dispatch.packing import Packer, TorchPacker, lay_out_row
from equipoise.dispatch.routes import sum_by_weight
from equipoise.errors import TransferError
from equipoise.topology import Topology

_SPIN_S = 5e-3
_POLL_S = 5e-5
"""How the device is waited for: first without a pause, then asked again and again.

A pause is slept through by up to twice its length, and the device idles until then: so none within
what a layer takes.
"""


@dataclass(frozen=True)
class _Handle:
    """The way home.

    Attributes:
        source_P: [T * K] int64, which output that comes home is whose; behind the last for none.
        sent: outputs sent to each rank.
        received: outputs received from each rank.
    """

    source_P: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(TokenDispatcher):
    """A token travels once to each rank that has slots of it; each slot's output travels home.

    A dispatch exchanges two counts per pair of ranks, then the rows, each with the slots it is for;
    a combine exchanges outputs. Outputs are summed at home alone, all K at once, so the sum does
    not depend on where experts are. Over gloo, tensors of a GPU travel through pinned memory.
    After an error only `close` is of use.

    Args:
        group: the ranks that exchange tokens.
        topology: their slots.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, group: RankGroup, topology: Topology) -> None:
        self._group = group
        is_cuda = group.device.type == "cuda"
        self._is_nccl = is_cuda and group.device_group is not group.cpu_group
        self._staged = is_cuda and not self._is_nccl
        self._even = [1] * topology.num_ranks
        self._counts = torch.empty(
            2, topology.num_ranks, 2, dtype=torch.int64, pin_memory=group.device.type == "cuda"
        )
        self._packer = _create_packer(group.device, topology)

    @property
    def prepares_beside(self) -> bool:
        """Not over NCCL: to connect ranks waits for the device, and so for another group's tokens.

        Those wait for peers, which may wait for this rank meanwhile: seen to be for good.
        """
        return not self._is_nccl or len(self._even) == 1

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """As the contract says; rows come ordered by source rank, then by token, then by k."""
        hidden_TD, slot_TK = hidden_TD.contiguous(), slot_TK.long().contiguous()
        routed = self._packer.route(slot_TK)
        going_R2, coming_R2 = routed.count_2R2
        self._exchange(coming_R2, going_R2, self._even, self._even)
        self._counts.copy_(routed.count_2R2, non_blocking=True)
        counted = self._mark()
        # Rows are laid out while counts travel.
        row_MB, source_P = self._packer.pack(routed, hidden_TD, slot_TK)
        # The one wait for the device: splits are numbers of the host.
        self._await(counted)
        going, coming = self._counts.tolist()
        rows_sent, outputs_received = ([count[i] for count in going] for i in range(2))
        rows_received, outputs_sent = ([count[i] for count in coming] for i in range(2))

        came_MB = row_MB.new_empty(sum(rows_received), row_MB.shape[1])
        self._exchange(came_MB, row_MB[: sum(rows_sent)], rows_received, rows_sent)
        layout = lay_out_row(hidden_TD, slot_TK.shape[1])
        row_N, slot_N = self._packer.unpack(
            came_MB, layout, slot_TK.shape[1], coming_R2, sum(outputs_sent)
        )
        return DispatchedRows(
            received_MD=came_MB[:, : layout.hidden_bytes].view(hidden_TD.dtype),
            row_N=row_N,
            slots=slot_N,
            handle=_Handle(source_P, outputs_sent, outputs_received),
        )

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """As the contract says."""
        assert isinstance(dispatched, DispatchedRows)
        handle: _Handle = dispatched.handle
        num_outputs = sum(handle.received)
        # One row more: what went nowhere reads zeros.
        home_ND = output_ND.new_empty(num_outputs + 1, output_ND.shape[1])
        if num_outputs < weight_TK.numel():
            home_ND[num_outputs].zero_()
        sent, into = output_ND.contiguous().view(torch.uint8), home_ND[:-1].view(torch.uint8)
        self._exchange(into, sent, handle.received, handle.sent)
        return sum_by_weight(home_ND, handle.source_P, weight_TK)

    def prepare(self, hidden_TD: Tensor, slot_TK: Tensor) -> None:
        """As the contract says: NCCL connects ranks at its first exchange, kernels are compiled."""
        came = self.dispatch(hidden_TD, slot_TK)
        weight_TK = torch.ones(slot_TK.shape, device=slot_TK.device)
        self.combine(came.hidden_ND, weight_TK, came)
        self.check()

    def detour(self, is_on: bool) -> None:
        """As the contract says: over gloo instead of NCCL."""
        if self._is_nccl:
            self.check()
            self._staged = is_on

    def check(self) -> None:
        """Wait for the device, which over NCCL alone knows whether a peer came.

        Collective: none.
        Raises: TransferError if it is not through within the deadline.
        """
        self._await(self._mark())

    def _mark(self) -> torch.Event | None:
        """Where the device's work stands; None where there is nothing to wait for."""
        if self._group.device.type != "cuda":
            return None
        reached = torch.Event(self._group.device)
        reached.record()
        return reached

    def _await(self, reached: torch.Event | None) -> None:
        if reached is None:
            return
        started_s = time.monotonic()
        while not reached.query():
            waited_s = time.monotonic() - started_s
            if waited_s > _SPIN_S and self._group.is_over:
                raise self._explain("a rank is known to be dead")
            if waited_s > self._group.timeout.total_seconds():
                raise self._explain("the device still waits")
            if waited_s > _SPIN_S:
                time.sleep(_POLL_S)
        if self._group.is_over:
            # It may be through only because what it waited for was given up.
            raise self._explain("a rank is known to be dead")

    def _exchange(self, into: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> None:
        if len(sent) == 1:
            # A rank alone: no wire is needed, nor connected.
            into.copy_(rows)
        elif self._staged:
            landed = torch.empty_like(into, device="cpu", pin_memory=True)
            left = torch.empty_like(rows, device="cpu", pin_memory=True)
            left.copy_(rows)
            self._all_to_all(landed, left, received, sent)
            into.copy_(landed)
        else:
            self._all_to_all(into, rows, received, sent)

    def _all_to_all(self, into: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> None:
        group = self._group.cpu_group if self._staged else self._group.device_group
        try:
            work = group.alltoall_base(into, rows, received, sent)
            if self._is_nccl and not self._staged:
                # In stream order alone: a wait with a deadline asks NCCL once a millisecond.
                work.wait()
            else:
                work.wait(self._group.timeout)
        except RuntimeError as error:
            raise self._explain(error) from error

    def _explain(self, cause: object) -> TransferError:
        return TransferError(
            f"rank {self._group.rank}: tokens were not exchanged; a rank died, or did not take "
            f"part within {self._group.timeout.total_seconds():.1f} s: {cause}",
            rank=self._group.rank,
        )


def _create_packer(device: torch.device, topology: Topology) -> Packer:
    if device.type == "cpu":
        return TorchPacker(topology)
    from equipoise.dispatch.packing_kernel import KernelPacker

    return KernelPacker(topology)
