"""Tokens by all_to_all_single, over NCCL or gloo.

Axis letters: T tokens of this rank, K slots per token, R ranks, M token rows (sent or received,
each for one rank), N outputs (one per slot of a token), D hidden, B bytes of a row that travels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.dispatch.base import Dispatched, DispatchedRows, TokenDispatcher
from equipoise.dispatch.routes import sum_by_weight
from equipoise.errors import TransferError
from equipoise.topology import Topology

_ALIGNMENT = 16
_SLOT_BYTES = 4


@dataclass(frozen=True)
class _Handle:
    """The way home.

    Attributes:
        pair_N: [N] int64, t * K + k of each output that comes home, by rank, then by token, then k.
        sent: outputs sent to each rank.
        received: outputs received from each rank.
    """

    pair_N: Tensor
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
        self._topology = topology
        self._staged = group.device.type == "cuda" and group.device_group is group.cpu_group
        self._first_slot_R11 = (
            torch.arange(topology.num_ranks, device=group.device) * topology.slots_per_rank
        )[:, None, None]

    def dispatch(self, hidden_TD: Tensor, slot_TK: Tensor) -> Dispatched:
        """As the contract says; rows come ordered by source rank, then by token, then by k."""
        num_ranks, slots_per_rank = self._topology.num_ranks, self._topology.slots_per_rank
        num_tokens, top_k = slot_TK.shape
        local_RTK = slot_TK - self._first_slot_R11
        is_there_RTK = (local_RTK >= 0) & (local_RTK < slots_per_rank)
        goes_RT = is_there_RTK.any(2)
        count_R2 = torch.stack((goes_RT.sum(1), is_there_RTK.sum((1, 2))), dim=1)
        counts = torch.stack((count_R2, torch.empty_like(count_R2)))
        even = [1] * num_ranks
        self._exchange(counts[1], counts[0], even, even)
        # The one wait for the device: splits are numbers of the host.
        sent, received = counts.tolist()
        rows_sent, outputs_received = zip(*sent, strict=True)
        rows_received, outputs_sent = zip(*received, strict=True)

        going_M2 = goes_RT.nonzero_static(size=sum(rows_sent))
        row_MB, hidden_bytes = _pack(hidden_TD, local_RTK.masked_fill(~is_there_RTK, -1), going_M2)
        came_MB = row_MB.new_empty(sum(rows_received), row_MB.shape[1])
        self._exchange(came_MB, row_MB, list(rows_received), list(rows_sent))
        slot_MK = came_MB[:, _round_up(hidden_bytes) :].view(torch.int32)[:, :top_k]
        row_N, choice_N = (slot_MK >= 0).nonzero_static(size=sum(outputs_sent)).unbind(1)
        pair_N = is_there_RTK.view(num_ranks, num_tokens * top_k)
        pair_N = pair_N.nonzero_static(size=sum(outputs_received))[:, 1]
        return DispatchedRows(
            received_MD=came_MB[:, :hidden_bytes].view(hidden_TD.dtype),
            row_N=row_N,
            slots=slot_MK[row_N, choice_N].long(),
            handle=_Handle(pair_N, list(outputs_sent), list(outputs_received)),
        )

    def combine(self, output_ND: Tensor, weight_TK: Tensor, dispatched: Dispatched) -> Tensor:
        """As the contract says."""
        assert isinstance(dispatched, DispatchedRows)
        handle: _Handle = dispatched.handle
        home_ND = output_ND.new_empty(sum(handle.received), output_ND.shape[1])
        sent, into = output_ND.contiguous().view(torch.uint8), home_ND.view(torch.uint8)
        self._exchange(into, sent, handle.received, handle.sent)
        return sum_by_weight(home_ND, handle.pair_N, weight_TK)

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


def _pack(hidden_TD: Tensor, slot_RTK: Tensor, going_M2: Tensor) -> tuple[Tensor, int]:
    """Rows as they travel: hidden state, then the slots of its rank that it is for.

    Args:
        hidden_TD: [T, D].
        slot_RTK: [R, T, K], local slots of each rank; -1 for a slot of another.
        going_M2: [M, 2], rank and token of each row.
    Returns:
        [M, B] uint8, and how many of the B bytes are the hidden state's.
    """
    rank_M, token_M = going_M2.unbind(1)
    num_rows, hidden_bytes = len(token_M), hidden_TD.shape[1] * hidden_TD.element_size()
    slot_bytes = slot_RTK.shape[2] * _SLOT_BYTES
    row_bytes = _round_up(_round_up(hidden_bytes) + slot_bytes)
    row_MB = torch.empty(num_rows, row_bytes, dtype=torch.uint8, device=hidden_TD.device)
    hidden_MD = row_MB[:, :hidden_bytes].view(hidden_TD.dtype)
    torch.index_select(hidden_TD, 0, token_M, out=hidden_MD)
    slot_at = _round_up(hidden_bytes)
    row_MB[:, slot_at : slot_at + slot_bytes].view(torch.int32)[...] = slot_RTK[rank_M, token_M]
    return row_MB, hidden_bytes


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
