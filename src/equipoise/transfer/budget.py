"""How much memory a transfer may stage in, and when memory may be touched."""

from __future__ import annotations

import torch

from equipoise.comm.groups import RankGroup
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray

NUM_HALVES = 2
"""Of staging memory on a GPU: one fills slots while the next chunk travels into the other."""

_SHARE_OF_FREE = 16
_MOST_HALF_BYTES = 4 << 30


def choose_chunk_bytes(
    plan: TransferPlan,
    expert_bytes: IntArray,
    staging_bytes: int | None,
    group: RankGroup,
    device: torch.device,
) -> int | None:
    """Most that a chunk may bring to any rank; None for the least that works.

    On a GPU a larger chunk pays, as ranks agree once for each: half of what was given, if a layer
    fits that; or by default a sixteenth of what is free on the rank that has least.

    Args:
        plan: what moves.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        staging_bytes: given bound, of all halves.
        group: of all ranks.
        device: of the weights.
    Returns:
        The same on every rank.
    Collective: on CUDA every rank of the group.
    Raises: MembershipError if a rank does not come.
    """
    if device.type != "cuda":
        return staging_bytes
    largest = int(plan.staged_bytes(expert_bytes).max(initial=0))
    if staging_bytes is not None:
        half = staging_bytes // NUM_HALVES
        return half if largest <= half else staging_bytes
    free = torch.tensor(torch.cuda.mem_get_info(device)[0] // _SHARE_OF_FREE)
    group.all_reduce(free, "min")
    return max(largest, min(int(free), _MOST_HALF_BYTES))


def settle(device: torch.device) -> None:
    """Wait on the host for what stands on the current stream; nothing on the CPU.

    Collective: none.
    """
    if device.type == "cuda":
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(torch.cuda.current_stream(device))
        event.synchronize()
