"""What runs on a node of a Ray cluster: one rank in a process of its own."""

from __future__ import annotations

import os
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from equipoise.elastic.launcher import RankSeat


class RankActor:
    """A rank, as Ray starts it: the process is Ray's, and ends when the launcher says so."""

    def run(self, seat: RankSeat) -> int:
        """Serve until the controller says that it is over.

        Args:
            seat: of the rank; node and device are found out here.
        Returns:
            The exit code, as `equipoise.elastic.rank.run_rank`.
        Collective: as `run_rank`.
        """
        ray: Any = import_module("ray")
        # Before torch is loaded. torch says in C++ what does not matter here; and between processes
        # the kernel copies weights page by page, through huge pages a fifth faster.
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        context = ray.get_runtime_context()
        device = seat.device
        if device == "cuda":
            (gpu,) = context.get_accelerator_ids()["GPU"]
            device = f"cuda:{find_gpu(gpu, os.environ.get('CUDA_VISIBLE_DEVICES'))}"
        from equipoise.elastic.rank import run_rank

        return run_rank(replace(seat, node=context.get_node_id(), device=device))


def find_gpu(gpu: str, visible: str | None) -> int:
    """The number by which torch knows a GPU that Ray has given.

    Args:
        gpu: Ray's name of it.
        visible: CUDA_VISIBLE_DEVICES of this process, if it is set.
    Collective: none.
    """
    shown = visible.split(",") if visible else []
    return shown.index(gpu) if gpu in shown else int(gpu)
