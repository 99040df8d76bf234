"""The kernel that turns experts into slots and counts them, in one launch.

Axis letters: T tokens of this rank, K experts per token, E experts, W turns, P slots of all ranks.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024
_NUM_WARPS = 8


# A layer's row may begin anywhere: it would be compiled again for where it does, beside steps.
@triton.jit(
    do_not_specialize=["num_pairs", "first"],
    do_not_specialize_on_alignment=["turns", "num_turns", "first_at", "counts"],
)
def _choose_and_count(  # type: ignore[no-untyped-def]
    experts,
    turns,
    num_turns,
    first_at,
    valid,
    weight,
    slots,
    counts,
    num_pairs,
    first,
    num_slots,
    width,
    top_k,
    READS_FIRST: tl.constexpr,  # noqa: N803
    HAS_VALID: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
    NUM_BINS: tl.constexpr,  # noqa: N803
):
    pairs = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = pairs < num_pairs
    expert = tl.load(experts + pairs, mask=inside, other=0)
    token = pairs // top_k
    position = token + first.to(tl.int64)
    if READS_FIRST:
        position += tl.load(first_at)
    turn = position % tl.load(num_turns + expert)
    slot = tl.load(turns + expert * width + turn)
    if HAS_VALID:
        slot = tl.where(tl.load(valid + token, mask=inside, other=0) != 0, slot, -1)
    tl.store(slots + pairs, slot, mask=inside)
    step = tl.load(weight)
    if step != 0:
        # One bin more takes what must not count.
        binned = tl.where(inside & (slot >= 0), slot, num_slots).to(tl.int32)
        found = tl.histogram(binned, NUM_BINS)
        bins = tl.arange(0, NUM_BINS)
        tl.atomic_add(
            counts + bins, found.to(tl.int64) * step, mask=(found > 0) & (bins < num_slots)
        )


def choose_and_count(
    expert_TK: Tensor,  # noqa: N803
    turns_EW: Tensor,  # noqa: N803
    num_turns_E: Tensor,  # noqa: N803
    first_position: int | Tensor,
    valid_T: Tensor | None,  # noqa: N803
    count_P: Tensor,  # noqa: N803
    weight: Tensor,
    dtype: torch.dtype = torch.int64,
) -> Tensor:
    """Launch the kernel on the current stream.

    Args:
        expert_TK: [T, K] integer, contiguous.
        turns_EW: [E, W] int64, contiguous: the slots that an expert's tokens go to in turn.
        num_turns_E: [E] int64, how many of them take turns.
        first_position: of token 0, not negative; a 0-d int64 tensor is read on the device.
        valid_T: [T] bool, False for padding; None if all are tokens.
        count_P: [P] int64, what is added to.
        weight: [1] int64, how much a token counts; 0 for not at all.
        dtype: of the slots.
    Returns:
        [T, K], global slots; -1 for padding.
    Collective: none; no host sync.
    """
    slots = torch.empty_like(expert_TK, dtype=dtype)
    num_pairs = expert_TK.numel()
    if not num_pairs:
        return slots
    reads_first = isinstance(first_position, Tensor)
    num_slots = count_P.numel()
    with torch.cuda.device(expert_TK.device):
        _choose_and_count[(triton.cdiv(num_pairs, _BLOCK),)](
            expert_TK,
            turns_EW,
            num_turns_E,
            first_position if reads_first else weight,
            weight if valid_T is None else valid_T,
            weight,
            slots,
            count_P,
            num_pairs,
            0 if reads_first else first_position,
            num_slots,
            turns_EW.shape[1],
            expert_TK.shape[1],
            READS_FIRST=reads_first,
            HAS_VALID=valid_T is not None,
            BLOCK=_BLOCK,
            NUM_BINS=triton.next_power_of_2(num_slots + 1),
            num_warps=_NUM_WARPS,
        )
    return slots
