"""Which rows travel and where outputs come home, by three kernels: as `packing` does it.

Axis letters: T tokens of this rank, K slots per token, R ranks, M rows (sent or received),
N outputs (one per slot of a token), D hidden, B bytes of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from equipoise.dispatch.packing import Routed, RowLayout, lay_out_row
from equipoise.topology import Topology

_TOKENS = 1024
_ELEMENTS = 2048

# Where the second half of what was made in one piece begins, depends on how many there are: kernels
# would be compiled again for it, beside steps.


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["begin"])
def _route(  # type: ignore[no-untyped-def]
    slots,
    counts,
    row_at,
    begin,
    num_tokens,
    slots_per_rank,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    TOKENS: tl.constexpr,
):
    rank = tl.program_id(0)
    choice = tl.arange(0, CHOICES)[None, :]
    num_rows = tl.full((), 0, tl.int32)
    num_outputs = tl.full((), 0, tl.int32)
    for start in range(0, num_tokens, TOKENS):
        token = start + tl.arange(0, TOKENS)
        is_token = token < num_tokens
        slot = tl.load(
            slots + token[:, None] * TOP_K + choice,
            mask=is_token[:, None] & (choice < TOP_K),
            other=-1,
        )
        local = slot - rank * slots_per_rank
        outputs = tl.sum(((local >= 0) & (local < slots_per_rank)).to(tl.int32), axis=1)
        goes = (outputs > 0).to(tl.int32)
        row = num_rows + tl.cumsum(goes, 0) - goes
        at = rank * num_tokens + token
        tl.store(row_at + at, tl.where(goes > 0, row, -1), mask=is_token)
        tl.store(begin + at, num_outputs + tl.cumsum(outputs, 0) - outputs, mask=is_token)
        num_rows += tl.sum(goes, 0)
        num_outputs += tl.sum(outputs, 0)
    tl.store(counts + 2 * rank, num_rows.to(tl.int64))
    tl.store(counts + 2 * rank + 1, num_outputs.to(tl.int64))


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["begin"])
def _pack(  # type: ignore[no-untyped-def]
    hidden,
    slots,
    counts,
    row_at,
    begin,
    rows,
    words,
    source,
    num_tokens,
    num_ranks,
    slots_per_rank,
    width,
    hidden_stride,
    row_stride,
    word_stride,
    first_word,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    RANKS: tl.constexpr,
    ELEMENTS: tl.constexpr,
):
    token = tl.program_id(0)
    rank = tl.program_id(1)
    choice = tl.arange(0, CHOICES)
    slot = tl.load(slots + token * TOP_K + choice, mask=choice < TOP_K, other=-1)
    other = tl.arange(0, RANKS)
    outputs = tl.load(counts + 2 * other + 1, mask=other < num_ranks, other=0)
    if rank == 0:
        is_absent = (slot < 0) & (choice < TOP_K)
        tl.store(source + token * TOP_K + choice, tl.sum(outputs, 0) + 0 * slot, mask=is_absent)
    at = tl.load(row_at + rank * num_tokens + token)
    if at >= 0:
        is_before = other < rank
        before = tl.load(counts + 2 * other, mask=is_before, other=0)
        row = tl.sum(before, 0) + at
        first = tl.load(begin + rank * num_tokens + token)
        local = slot - rank * slots_per_rank
        is_there = (local >= 0) & (local < slots_per_rank) & (choice < TOP_K)
        home = tl.sum(tl.where(is_before, outputs, 0), 0) + first
        home += tl.cumsum(is_there.to(tl.int64), 0) - 1
        tl.store(source + token * TOP_K + choice, home, mask=is_there)
        word = words + row * word_stride + first_word
        tl.store(word, first)
        tl.store(
            word + 1 + choice,
            tl.where(is_there, local, -1).to(tl.int32),
            mask=choice < TOP_K,
        )
        for start in range(0, width, ELEMENTS):
            element = start + tl.arange(0, ELEMENTS)
            is_one = element < width
            values = tl.load(hidden + token.to(tl.int64) * hidden_stride + element, mask=is_one)
            tl.store(rows + row * row_stride + element, values, mask=is_one)


@triton.jit(do_not_specialize_on_alignment=["slot_of"])
def _unpack(  # type: ignore[no-untyped-def]
    words,
    counts,
    row_of,
    slot_of,
    num_ranks,
    word_stride,
    first_word,
    TOP_K: tl.constexpr,
    CHOICES: tl.constexpr,
    RANKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    rank = tl.arange(0, RANKS)
    num_rows = tl.load(counts + 2 * rank, mask=rank < num_ranks, other=0)
    outputs = tl.load(counts + 2 * rank + 1, mask=rank < num_ranks, other=0)
    # Senders whose rows all come before this one.
    is_before = (tl.cumsum(num_rows, 0) <= row) & (rank < num_ranks)
    word = words + row * word_stride + first_word
    first = tl.sum(tl.where(is_before, outputs, 0), 0) + tl.load(word)
    choice = tl.arange(0, CHOICES)
    local = tl.load(word + 1 + choice, mask=choice < TOP_K, other=-1)
    is_there = local >= 0
    at = first + tl.cumsum(is_there.to(tl.int64), 0) - 1
    tl.store(row_of + at, row + 0 * at, mask=is_there)
    tl.store(slot_of + at, local.to(tl.int64), mask=is_there)


class KernelPacker:
    """By one kernel each, on a GPU.

    Args:
        topology: slots of the ranks.
    """

    def __init__(self, topology: Topology) -> None:
        self._num_ranks = topology.num_ranks
        self._slots_per_rank = topology.slots_per_rank
        self._ranks = triton.next_power_of_2(topology.num_ranks)

    def route(self, slot_TK: Tensor) -> Routed:
        """As the protocol says."""
        num_tokens, top_k = slot_TK.shape
        count_2R2 = slot_TK.new_empty(2, self._num_ranks, 2)
        at_2RT = slot_TK.new_empty(2, self._num_ranks, num_tokens, dtype=torch.int32)
        _route[(self._num_ranks,)](
            slot_TK,
            count_2R2,
            at_2RT[0],
            at_2RT[1],
            num_tokens,
            self._slots_per_rank,
            TOP_K=top_k,
            CHOICES=triton.next_power_of_2(top_k),
            TOKENS=_TOKENS,
            num_warps=8,
        )
        return Routed(count_2R2, at_2RT)

    def pack(self, routed: Routed, hidden_TD: Tensor, slot_TK: Tensor) -> tuple[Tensor, Tensor]:
        """As the protocol says; room for as many rows as there can be, as only the device knows."""
        (num_tokens, width), top_k = hidden_TD.shape, slot_TK.shape[1]
        layout = lay_out_row(hidden_TD, top_k)
        most = num_tokens * min(top_k, self._num_ranks)
        row_MB = torch.empty(most, layout.num_bytes, dtype=torch.uint8, device=slot_TK.device)
        source_P = slot_TK.new_empty(slot_TK.numel())
        if num_tokens:
            rows, words = row_MB.view(hidden_TD.dtype), row_MB.view(torch.int32)
            _pack[(num_tokens, self._num_ranks)](
                hidden_TD,
                slot_TK,
                routed.count_2R2,
                routed.state[0],
                routed.state[1],
                rows,
                words,
                source_P,
                num_tokens,
                self._num_ranks,
                self._slots_per_rank,
                width,
                hidden_TD.stride(0),
                rows.shape[1],
                words.shape[1],
                layout.first_word,
                TOP_K=top_k,
                CHOICES=triton.next_power_of_2(top_k),
                RANKS=self._ranks,
                ELEMENTS=min(_ELEMENTS, triton.next_power_of_2(width)),
            )
        return row_MB, source_P

    def unpack(
        self, row_MB: Tensor, layout: RowLayout, top_k: int, count_R2: Tensor, num_outputs: int
    ) -> tuple[Tensor, Tensor]:
        """As the protocol says."""
        row_N, slot_N = count_R2.new_empty(2, num_outputs)
        if len(row_MB):
            words = row_MB.view(torch.int32)
            _unpack[(len(row_MB),)](
                words,
                count_R2,
                row_N,
                slot_N,
                self._num_ranks,
                words.shape[1],
                layout.first_word,
                TOP_K=top_k,
                CHOICES=triton.next_power_of_2(top_k),
                RANKS=self._ranks,
                num_warps=1,
            )
        return row_N, slot_N
