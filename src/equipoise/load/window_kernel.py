"""The kernel that takes a step's counts into a window, in one launch.

Axis letters: L layers, E experts, P slots of all ranks, W steps of the window.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 128


# Not for a number of ranks or a place in the window: it would be compiled again beside steps.
_SIZES = ("counts_stride", "newest_stride", "num_experts", "most_slots", "row")


@triton.jit(do_not_specialize=_SIZES)
def _take_step(  # type: ignore[no-untyped-def]
    counts,
    expert_to_slots,
    ring,
    total,
    newest,
    counts_stride,
    newest_stride,
    num_experts,
    most_slots,
    row,
    BLOCK: tl.constexpr,  # noqa: N803
):
    layer = tl.program_id(0).to(tl.int64)
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = expert < num_experts
    cell = layer * num_experts + expert
    tokens = tl.zeros((BLOCK,), tl.int64)
    for number in range(most_slots):
        slot = tl.load(expert_to_slots + cell * most_slots + number, mask=inside, other=-1)
        count = counts + layer * counts_stride + slot
        tokens += tl.load(count, mask=slot >= 0, other=0)
        # A slot is one expert's, so nobody else reads what is cleared here.
        tl.store(count, tl.zeros((BLOCK,), tl.int64), mask=slot >= 0)
    at = ring + row * tl.num_programs(0).to(tl.int64) * num_experts + cell
    oldest = tl.load(at, mask=inside, other=0).to(tl.int64)
    tl.store(at, tokens.to(tl.int32), mask=inside)
    tl.store(newest + layer * newest_stride + expert, tokens, mask=inside)
    tl.store(
        total + cell, tl.load(total + cell, mask=inside, other=0) + tokens - oldest, mask=inside
    )


def bind_step(
    counts: Tensor, expert_to_slots: Tensor, ring: Tensor, total: Tensor, newest: Tensor
) -> Callable[[int], None]:
    """What takes a step into the window and clears its counts, looked up and compiled once.

    Args:
        counts: [L, P] int64, tokens per slot; rows may be apart.
        expert_to_slots: [L, E, most] int64, padded with -1.
        ring: [W, L, E] int32.
        total: [L, E] int64.
        newest: [L, E] int64; rows may be apart.
    Returns:
        Takes the row of the ring that the step goes to, and enqueues on the current stream. It
        keeps the tensors.
    Collective: none.
    """
    num_layers, num_experts, most_slots = expert_to_slots.shape
    tensors = (counts, expert_to_slots, ring, total, newest)
    sizes = (counts.stride(0), newest.stride(0), num_experts, most_slots)
    grid, device = (num_layers, triton.cdiv(num_experts, _BLOCK), 1), counts.device
    with torch.cuda.device(device):
        launch = _take_step.warmup(*tensors, *sizes, 0, _BLOCK, grid=grid)[grid]

    def take(row: int) -> None:
        stream = torch.cuda.current_stream(device).cuda_stream
        is_current = torch.cuda.current_device() == device.index
        with contextlib.nullcontext() if is_current else torch.cuda.device(device):
            launch(*(each.data_ptr() for each in tensors), *sizes, row, _BLOCK, stream=stream)

    return take
