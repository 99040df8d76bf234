"""What a rank's process does, from its start to its end."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from typing import Any, cast

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.launch.failure import Failure, describe_error
from equipoise.launch.seats import Seat, Spec

Job = Callable[[Any, RankGroup, Callable[[Any], None]], None]
"""Gets its spec, this rank's groups, and where rank 0's records go."""

LOOPBACK = "127.0.0.1"
_PR_SET_PDEATHSIG = 1


def take_seat(
    job: str,
    spec: Spec,
    seat: Seat,
    store: Store,
    emit: Callable[[Any], None],
    tell: Callable[[BaseException], None] = lambda _: None,
) -> None:
    """Make this process one rank, and run the job in it.

    Args:
        job: "module:function" of a `Job`.
        spec: the same on every rank.
        seat: this rank's.
        store: shared by all ranks of the job.
        emit: what becomes of this rank's records; rank 0 has some.
        tell: called with what the job raises, before others see that this rank has left.
    Collective: every rank of the job.
    Raises: whatever the job raises; MembershipError if a rank does not come.
    """
    # torch takes every core, or what OMP_NUM_THREADS says, in each rank.
    torch.set_num_threads(max(1, torch.get_num_threads() // seat.local_size))
    device = torch.device(seat.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    module, _, name = job.partition(":")
    run = cast("Job", getattr(importlib.import_module(module), name))
    group = create_rank_group(
        store,
        seat.rank,
        seat.size,
        device,
        timeout=timedelta(seconds=spec.timeout_s),
        device_group=seat.device_group,
    )
    try:
        run(spec, group, emit)
    except BaseException as error:
        tell(error)
        raise
    finally:
        group.close()


def run_rank(
    job: str,
    seat: Seat,
    port: int,
    report: Connection,
    records: Connection | None,
) -> None:
    """Body of a rank's process: runs the job, reports how it ended, and ends.

    Args:
        job: as `take_seat`.
        seat: as `take_seat`.
        port: of the parent's store, on the loopback interface.
        report: brings the spec, and gets one message at the end, None or a `Failure`.
        records: gets rank 0's records.
    Collective: as `take_seat`.
    """
    # Ctrl-C reaches the whole terminal; it is for the parent to end the ranks.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _end_with_parent()
    failure: Failure | None = None

    def tell(error: BaseException) -> None:
        nonlocal failure
        if failure is None:
            failure = describe_error(seat.rank, error)
            _report(report, failure)

    try:
        spec: Spec = report.recv()
        timeout = timedelta(seconds=spec.timeout_s)
        store = TCPStore(LOOPBACK, port, is_master=False, timeout=timeout)
        take_seat(job, spec, seat, store, _discard if records is None else records.send, tell)
        _report(report, None)
    except BaseException as error:
        tell(error)
    sys.stdout.flush()
    sys.stderr.flush()
    # Threads of a group that a dead peer left hanging must not keep the process.
    os._exit(0 if failure is None else 1)


def _report(report: Connection, failure: Failure | None) -> None:
    with contextlib.suppress(OSError):  # nobody is left to be told
        report.send(failure)


def _discard(record: object) -> None:
    """Only rank 0 is listened to."""


def _end_with_parent() -> None:
    """See to it that this process does not outlive the one that started the job.

    Its parent in the eyes of the system is the forkserver, which a signal covers; the process
    that started the job is watched through multiprocessing's sentinel, a pipe that ends with it.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    starter = multiprocessing.parent_process()
    if starter is None:
        return

    def watch() -> None:
        wait([starter.sentinel])
        os._exit(1)

    threading.Thread(target=watch, name="equipoise-watch-parent", daemon=True).start()
