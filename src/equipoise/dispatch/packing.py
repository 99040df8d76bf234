"""Which rows travel and where outputs come home, by PyTorch.

A row that travels is a hidden state, then where its outputs begin among all that its rank computes
for the sender, then the slots of that rank that it is for, -1 for those of another.

Axis letters: T tokens of this rank, K slots per token, R ranks, M rows (sent or received),
N outputs (one per slot of a token), D hidden, B bytes of a row.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from equipoise.topology import Topology

_ALIGNMENT = 16
_WORD_BYTES = 4


@dataclass(frozen=True)
class RowLayout:
    """Where things are in a row.

    Attributes:
        hidden_bytes: of the hidden state, first.
        first_word: 4-byte word at which the outputs' beginning stands; K slots follow.
        num_bytes: B.
    """

    hidden_bytes: int
    first_word: int
    num_bytes: int


def lay_out_row(hidden_TD: Tensor, top_k: int) -> RowLayout:
    """The layout of rows with these hidden states. Collective: none."""
    hidden_bytes = hidden_TD.shape[1] * hidden_TD.element_size()
    first = _round_up(hidden_bytes)
    return RowLayout(
        hidden_bytes, first // _WORD_BYTES, _round_up(first + (1 + top_k) * _WORD_BYTES)
    )


@dataclass(frozen=True)
class Routed:
    """Tokens that were looked at.

    Attributes:
        count_2R2: [2, R, 2] int64, rows to each rank, and outputs that come home from it; and room
            for what the others say of this rank.
        state: the packer's own.
    """

    count_2R2: Tensor
    state: Any

    @property
    def count_R2(self) -> Tensor:
        """[R, 2] int64, what goes."""
        return self.count_2R2[0]


class Packer(Protocol):
    """What does it, on one kind of device; no host sync but what PyTorch makes on the CPU."""

    def route(self, slot_TK: Tensor) -> Routed:
        """Count what goes where."""

    def pack(self, routed: Routed, hidden_TD: Tensor, slot_TK: Tensor) -> tuple[Tensor, Tensor]:
        """Lay out what travels.

        Returns:
            [at least M, B] uint8, rows by rank, then by token; and [T * K] int64, for each pair of
            token and slot which output is its own, by rank, then by token, then by k; N for none.
        """

    def unpack(
        self, row_MB: Tensor, layout: RowLayout, top_k: int, count_R2: Tensor, num_outputs: int
    ) -> tuple[Tensor, Tensor]:
        """Find out what came: `count_R2` has rows and outputs by sender.

        Returns:
            [N] int64 each: for each output by sender, then by token, then by k, its row and its
            local slot.
        """


class TorchPacker:
    """By PyTorch's own operations, on the CPU.

    Args:
        topology: slots of the ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self._topology = topology
        first_slot_R = torch.arange(topology.num_ranks) * topology.slots_per_rank
        self._first_slot_R11 = first_slot_R[:, None, None]

    def route(self, slot_TK: Tensor) -> Routed:
        """As the protocol says."""
        local_RTK = slot_TK - self._first_slot_R11
        is_there_RTK = (local_RTK >= 0) & (local_RTK < self._topology.slots_per_rank)
        num_RT = is_there_RTK.sum(2)
        goes_RT = num_RT > 0
        count_R2 = torch.stack((goes_RT.sum(1), num_RT.sum(1)), dim=1)
        count_2R2 = torch.stack((count_R2, torch.empty_like(count_R2)))
        return Routed(count_2R2, (local_RTK.masked_fill_(~is_there_RTK, -1), num_RT, goes_RT))

    def pack(self, routed: Routed, hidden_TD: Tensor, slot_TK: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol says."""
        local_RTK, num_RT, goes_RT = routed.state
        num_rows, num_outputs = routed.count_R2.sum(0).tolist()
        layout = lay_out_row(hidden_TD, slot_TK.shape[1])
        rank_M, token_M = goes_RT.nonzero_static(size=num_rows).unbind(1)
        row_MB = torch.empty(num_rows, layout.num_bytes, dtype=torch.uint8)
        hidden_MD = row_MB[:, : layout.hidden_bytes].view(hidden_TD.dtype)
        torch.index_select(hidden_TD, 0, token_M, out=hidden_MD)
        word_MW = row_MB.view(torch.int32)[:, layout.first_word :]
        begin_RT = num_RT.cumsum(1) - num_RT
        word_MW[:, 0] = begin_RT[rank_M, token_M]
        word_MW[:, 1 : 1 + slot_TK.shape[1]] = local_RTK[rank_M, token_M]
        pair_N = (local_RTK >= 0).flatten(1).nonzero_static(size=num_outputs)[:, 1]
        source_P = pair_N.new_full((slot_TK.numel(),), num_outputs)
        source_P[pair_N] = torch.arange(num_outputs)
        return row_MB, source_P

    def unpack(
        self,
        row_MB: Tensor,
        layout: RowLayout,
        top_k: int,
        count_R2: Tensor,  # noqa: ARG002 - rows come in order, and PyTorch counts them itself
        num_outputs: int,
    ) -> tuple[Tensor, Tensor]:
        """As the protocol says."""
        slot_MK = row_MB.view(torch.int32)[:, layout.first_word + 1 :][:, :top_k]
        row_N, choice_N = (slot_MK >= 0).nonzero_static(size=num_outputs).unbind(1)
        return row_N, slot_MK[row_N, choice_N].long()


def _round_up(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
