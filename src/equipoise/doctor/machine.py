"""What this machine gives to processes: limits, memory, pages, settings."""

from __future__ import annotations

import os
import re
import resource
import shutil
from dataclasses import dataclass
from pathlib import Path

SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its size is looked at, nothing is written
_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
_SETTINGS = (
    "CUDA_DEVICE_",
    "CUDA_VISIBLE_",
    "EQUIPOISE_",
    "GLOO_",
    "NCCL_",
    "NIXL_",
    "OMP_NUM_THREADS",
    "THP_MEM_ALLOC_",
    "TORCH_NCCL_",
    "UCX_",
)
"""What names of variables begin with that wires, or ranks, look at."""


@dataclass(frozen=True)
class Machine:
    """Limits of this process and of the machine around it.

    Attributes:
        cores: that this process may use.
        memory_bytes: of the machine.
        free_memory_bytes: that could be used without swapping.
        shm_bytes: size of /dev/shm.
        free_shm_bytes: of it, now.
        locked_bytes: most memory that this process may lock; None for no limit.
        most_locked_bytes: what it may raise that to by itself; None for no limit.
        huge_pages: when the kernel gives transparent huge pages: "always", "madvise" or "never".
        reserved_huge_pages: number of huge pages set apart, and of free ones among them.
        has_infiniband: there is an InfiniBand or RoCE device.
        settings: variables of the environment that wires look at, as the user has set them.

    What the system does not tell is None.
    """

    cores: int
    memory_bytes: int | None
    free_memory_bytes: int | None
    shm_bytes: int | None
    free_shm_bytes: int | None
    locked_bytes: int | None
    most_locked_bytes: int | None
    huge_pages: str | None
    reserved_huge_pages: tuple[int, int] | None
    has_infiniband: bool
    settings: dict[str, str]


def look_at_machine() -> Machine:
    """Read what the system tells; before ranks are started, which sets defaults.

    Collective: none.
    """
    meminfo = _read_meminfo()
    shm = shutil.disk_usage(SHARED_MEMORY) if SHARED_MEMORY.is_dir() else None
    locked, most_locked = (
        None if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_MEMLOCK)
    )
    pages = [meminfo.get(f"HugePages_{which}") for which in ("Total", "Free")]
    return Machine(
        cores=_count_cores(),
        memory_bytes=_kib(meminfo.get("MemTotal")),
        free_memory_bytes=_kib(meminfo.get("MemAvailable")),
        shm_bytes=shm.total if shm else None,
        free_shm_bytes=shm.free if shm else None,
        locked_bytes=locked,
        most_locked_bytes=most_locked,
        huge_pages=_read_huge_pages(),
        reserved_huge_pages=None if None in pages else (pages[0] or 0, pages[1] or 0),
        has_infiniband=any(Path("/sys/class/infiniband").glob("*")),
        settings={k: v for k, v in sorted(os.environ.items()) if k.startswith(_SETTINGS)},
    )


def _count_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _read_meminfo() -> dict[str, int]:
    try:
        text = Path("/proc/meminfo").read_text()
    except OSError:
        return {}
    return {name: int(value) for name, value in re.findall(r"^(\w+): +(\d+)", text, re.MULTILINE)}


def _kib(number: int | None) -> int | None:
    return None if number is None else number * 1024


def _read_huge_pages() -> str | None:
    """The word in brackets."""
    try:
        text = (_PAGES / "enabled").read_text()
    except OSError:
        return None
    found = re.search(r"\[(\w+)\]", text)
    return found[1] if found else None
