"""Process groups out of a store, beside others and without torch's default group."""

from __future__ import annotations

import logging
import os
import threading
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from equipoise.comm.exchange import name_ranks
from equipoise.comm.gloo_device import open_gloo_device
from equipoise.errors import ConfigError, MembershipError

logger = logging.getLogger(__name__)

NUM_LANES = 4
"""Connections to each peer, with a thread each, where weights on GPUs leave the cores to them: one
carries 2 GB/s at best."""

_LEAST_NCCL_TIMEOUT = timedelta(seconds=60)
_NOTICE_S = 1.0
"""How long a forward pass has to notice a death by itself."""


def meet(store: Store, rank: int, size: int, timeout: timedelta) -> None:
    """Return when every rank has come to the store.

    Args:
        store: of these ranks and this meeting alone.
        rank: this rank.
        size: R.
        timeout: longest wait for all of them.
    Collective: every rank.
    Raises: MembershipError that names who has not come.
    """
    store.set(f"here/{rank}", "yes")
    deadline = time.monotonic() + timeout.total_seconds()
    for peer in range(size):
        left = max(deadline - time.monotonic(), 0.001)
        try:
            store.wait([f"here/{peer}"], timedelta(seconds=left))
        except RuntimeError as error:
            missing = [p for p in range(size) if not store.check([f"here/{p}"])]
            raise MembershipError(
                f"rank {rank}: {name_ranks(missing or [peer])} did not come within "
                f"{timeout.total_seconds():.1f} s",
                rank=rank,
                peer=(missing or [peer])[0],
            ) from error


def create_gloo(
    store: Store, rank: int, size: int, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    """A group over gloo that torch's registry does not know; all its ranks have met at the store.

    Collective: every rank of the group.
    """
    options = dist.ProcessGroupGloo._Options()  # type: ignore[attr-defined]
    options._timeout = timeout
    num_lanes = NUM_LANES if device.type == "cuda" else 1
    options._devices = [open_gloo_device() for _ in range(num_lanes)]
    options._threads = 2 * num_lanes
    backend = dist.ProcessGroupGloo(PrefixStore("gloo/", store), rank, size, options)
    group = dist.ProcessGroup(store, rank, size)
    group._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
    return group


def create_nccl(
    store: Store, rank: int, size: int, device: torch.device, timeout: timedelta
) -> dist.ProcessGroup:
    """A group over NCCL that torch's registry does not know.

    Collective: every rank of the group.
    """
    # Its watchdog would end the process where a deadline passes, instead of leaving it to us.
    os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    options = dist.ProcessGroupNCCL.Options()
    # To abort a group may take as long; a process that takes longer is ended.
    options._timeout = max(timeout, _LEAST_NCCL_TIMEOUT)
    backend = dist.ProcessGroupNCCL(PrefixStore("nccl/", store), rank, size, options)
    group = dist.ProcessGroup(store, rank, size)
    group.bound_device_id = device
    group._register_backend(device, dist.ProcessGroup.BackendType.NCCL, backend)
    group._set_default_backend(dist.ProcessGroup.BackendType.NCCL)
    return group


def drop(groups: list[dist.ProcessGroup], owns_nccl: bool) -> None:
    """Let groups go, the last of them over NCCL or not; may block. Collective: none."""
    if owns_nccl:
        groups[-1].abort()
    groups.clear()


def abort_later(group: dist.ProcessGroup, is_closed: threading.Event) -> None:
    """Have a group over NCCL give up what it waits for, unless it is closed soon; returns at once.

    Whatever the device did since is of no use then.

    Args:
        group: over NCCL.
        is_closed: set by who closes it.
    Collective: none.
    """

    def abort() -> None:
        if not is_closed.wait(_NOTICE_S):
            logger.info("a device still waits for the dead: its NCCL group is aborted")
            group.abort()

    threading.Thread(target=abort, name="equipoise-abort-group", daemon=True).start()


def has_nccl(group: dist.ProcessGroup) -> bool:
    """Whether tensors on CUDA travel over a group by NCCL. Collective: none."""
    try:
        return str(group._get_backend(torch.device("cuda")).name()) == "nccl"
    except RuntimeError:
        return False


def check_gloo(group: dist.ProcessGroup) -> None:
    """Refuse a group that CPU tensors cannot travel over by gloo.

    Collective: none.
    Raises: ConfigError.
    """
    try:
        name = group._get_backend(torch.device("cpu")).name()
    except RuntimeError:
        name = "none"
    if name != "gloo":
        raise ConfigError(
            f"cpu_group needs the backend gloo for CPU tensors, and has {name}: make one by "
            'torch.distributed.new_group(ranks, backend="gloo")'
        )
