"""What one READ from another GPU's memory reaches: the most that weights can travel at."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.launch.local import run_local
from equipoise.launch.seats import assign_local_seats

_JOB = "equipoise.bench.link:read_once"
_NUM_ROUNDS = 4


@dataclass(frozen=True)
class LinkSpec:
    """One READ between two ranks.

    Attributes:
        num_bytes: of it.
        num_ranks: one reads the other's memory.
        timeout_s: longest wait of a rank for the other.
    """

    num_bytes: int = 4 << 30
    num_ranks: int = 2
    timeout_s: float = 30.0


def measure_link(spec: LinkSpec) -> float:
    """Bytes per second of one READ into registered memory, the best of several.

    Args:
        spec: of the READ.
    Collective: none; starts two ranks, and leaves none.
    Raises: JobFailed, naming the rank, if one fails; ConfigError if there are no two GPUs.
    """
    rates: list[float] = []
    run_local(spec, assign_local_seats(spec.num_ranks, "cuda"), rates.append, job=_JOB)
    return max(rates)


def read_once(spec: LinkSpec, group: RankGroup, emit: Callable[[float], None]) -> None:
    """A rank's part: rank 1 reads what rank 0 has.

    Collective: both ranks of the group.
    """
    block = torch.empty(1, spec.num_bytes, dtype=torch.uint8, device=group.device)
    wire = create_eplb_communicator(group, "nixl", [[block]])
    for _ in range(_NUM_ROUNDS):
        group.barrier()
        started = time.perf_counter()
        if group.rank == 0:
            wire.add_send(block, 1)
        else:
            wire.add_recv(block, 0)
        wire.execute()
        if group.rank == 0:
            emit(spec.num_bytes / (time.perf_counter() - started))
    wire.close()
