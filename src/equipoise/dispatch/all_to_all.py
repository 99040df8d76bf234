"""Tokens by all_to_all_single, over NCCL or gloo.

Axis letters: T tokens of this rank, K slots per token, M rows sent, N rows received, P slots of
all ranks, R ranks, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.dispatch.base import Dispatched, TokenDispatcher
from equipoise.dispatch.routes import sum_by_weight
from equipoise.errors import TransferError
from equipoise.topology import Topology


@dataclass(frozen=True)
class _Handle:
    """The way home.

    Attributes:
        row_M: [M] int64, t * K + k of each row sent, ordered by slot.
        sent: rows sent to each rank.
        received: rows received from each rank.
    """

    row_M: Tensor
    sent: list[int]
    received: list[int]


class AllToAllDispatcher(TokenDispatcher):
    """One row per token and slot, ordered by slot, so that counts alone tell who gets what.

    A dispatch exchanges each slot's row count, then the rows; a combine exchanges rows. Over gloo,
    tensors of a GPU travel through pinned memory. After an error only `close` is of use.

    Args:
        group: the ranks that exchange tokens.
        topology: their slots.
    """

    name: ClassVar[str] = "torch"

    def __init__(self, group: RankGroup, topology: Topology) -> None:
        self._group = group
        self._topology = topology
        self._staged = group.device.type == "cuda" and group.device_group is group.cpu_group

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """As the contract says; rows come ordered by source rank, then by slot."""
        num_ranks, slots_per_rank = self._topology.num_ranks, self._topology.slots_per_rank
        slot_TK1 = slot_TK.reshape(-1) + 1
        count_P1 = slot_TK1.new_zeros(self._topology.num_slots + 1)
        count_P1.index_add_(0, slot_TK1, torch.ones_like(slot_TK1))
        sent_P = count_P1[1:]
        received_P = torch.empty_like(sent_P)
        even = [slots_per_rank] * num_ranks
        self._exchange(received_P, sent_P, even, even)
        # The one wait for the device: splits are numbers of the host.
        per_rank = torch.stack([sent_P, received_P]).view(2, num_ranks, slots_per_rank).sum(2)
        sent, received = per_rank.tolist()

        num_rows = slot_TK1.numel()
        row_M = slot_TK1.argsort(stable=True)[num_rows - sum(sent) :]
        hidden_MD = hidden_TD[row_M // slot_TK.shape[1]]
        hidden_ND = self._exchange_rows(hidden_MD, sent, received)
        slot_P = torch.arange(slots_per_rank, device=slot_TK.device).repeat(num_ranks)
        slot_N = slot_P.repeat_interleave(received_P, output_size=sum(received))
        return Dispatched(hidden_ND, slot_N, _Handle(row_M, sent, received))

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """As the contract says."""
        handle: _Handle = dispatched.handle
        output_MD = self._exchange_rows(output_ND, handle.received, handle.sent)
        return sum_by_weight(output_MD, handle.row_M, weight_TK)

    def _exchange_rows(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """[rows sent, D] by destination -> [rows received, D] by source, any dtype, as bytes."""
        into = rows.new_empty(sum(received), rows.shape[1])
        self._exchange(into.view(torch.uint8), rows.contiguous().view(torch.uint8), received, sent)
        return into

    def _exchange(self, into: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> None:
        if self._staged:
            landed = torch.empty_like(into, device="cpu", pin_memory=True)
            left = torch.empty_like(rows, device="cpu", pin_memory=True)
            left.copy_(rows)
            self._all_to_all(landed, left, received, sent)
            into.copy_(landed)
        else:
            self._all_to_all(into, rows, received, sent)

    def _all_to_all(self, into: Tensor, rows: Tensor, received: list[int], sent: list[int]) -> None:
        timeout = self._group.timeout
        try:
            self._group.device_group.alltoall_base(into, rows, received, sent).wait(timeout)
        except RuntimeError as error:
            raise TransferError(
                f"rank {self._group.rank}: tokens were not exchanged; a rank died, or did not take "
                f"part within {timeout.total_seconds():.1f} s: {error}",
                rank=self._group.rank,
            ) from error
