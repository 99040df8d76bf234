"""How much memory a transfer may stage in, and when memory may be touched."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray

MOST_BUFFERS = 3
"""Of staging memory on a GPU: one fills slots, one is agreed on, and one is travelled into."""

_SHARE_OF_FREE = 8
_MOST_BYTES = 6 << 30


@dataclass(frozen=True)
class StagingBudget:
    """How much memory a transfer stages in; the same on every rank.

    Attributes:
        buffer_bytes: of one buffer, and so of a chunk; None for the least that works.
        num_buffers: most that are used.
    """

    buffer_bytes: int | None
    num_buffers: int


def find_spare(device: torch.device) -> int:
    """Bytes that staging may take of a device by default; 0 on the CPU, which is not asked.

    An eighth of what is free, up to 6 GiB. Collective: none.
    """
    if device.type != "cuda":
        return 0
    # What torch holds and does not use is free too. Its tidier functions take ten times as long.
    held = torch.cuda.memory_stats_as_nested_dict(device)
    reserved, allocated = (
        held[f"{what}_bytes"]["all"]["current"] for what in ("reserved", "allocated")
    )
    free = torch.cuda.mem_get_info(device)[0] + reserved - allocated
    return int(min(free // _SHARE_OF_FREE, _MOST_BYTES))


def choose_budget(
    plan: TransferPlan,
    expert_bytes: IntArray,
    staging_bytes: int | None,
    spare_bytes: int,
    device: torch.device,
) -> StagingBudget:
    """Share the staging memory out.

    On a GPU as many buffers as a layer fits into, up to `MOST_BUFFERS`; of what was given, or by
    default of what is spare. On the CPU copies take the time that the wire would, so there is one.

    Args:
        plan: what moves.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        staging_bytes: given bound, of all buffers.
        spare_bytes: of the rank that has least, as `find_spare` says.
        device: of the weights.
    Collective: none; the same on every rank.
    """
    if device.type != "cuda":
        return StagingBudget(staging_bytes, 1)
    largest = int(plan.staged_bytes(expert_bytes).max(initial=0))
    if staging_bytes is None:
        staging_bytes = max(largest, spare_bytes)
    num_buffers = max(1, min(MOST_BUFFERS, staging_bytes // max(1, largest)))
    return StagingBudget(staging_bytes // num_buffers, num_buffers)


def settle(device: torch.device) -> None:
    """Wait on the host for what stands on the current stream; nothing on the CPU.

    Collective: none.
    """
    if device.type != "cuda":
        return
    stream = torch.cuda.current_stream(device)
    # To be woken takes longer than to ask.
    if not stream.query():
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(stream)
        event.synchronize()
