"""Ranks as processes of this machine, watched by the process that starts them.

The parent owns the store and is no rank. Ranks come from a forkserver that has loaded torch and
the engine, so that four of them start in the time of one.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from equipoise.launch.failure import (
    Cause,
    Failure,
    JobFailed,
    describe_death,
    find_first,
)
from equipoise.launch.seats import Seat, Spec

ENGINE_JOB = "equipoise.job.job:run_job"
PRELOADED = ("equipoise.launch.rank_process", "equipoise.job.job")

GRACE_S = 1.5
"""After a first failure, how long to listen for the one that it follows from."""
STOP_S = 2.0
"""How long a rank has to end after SIGTERM, before SIGKILL."""
REAP_S = 20.0
"""How long the forkserver has to say how a rank has ended that is ending already."""


@dataclass(frozen=True)
class _Rank:
    seat: Seat
    process: BaseProcess
    report: Connection


def preload_ranks(modules: Sequence[str] = ()) -> None:
    """Start loading what ranks need, in the background; twice is fine.

    Args:
        modules: more of it; one that is not there is left out. In vain once loading has begun.
    Collective: none.
    """
    multiprocessing.get_context("forkserver").set_forkserver_preload([*PRELOADED, *modules])
    # Loading warns in C++ of what does not matter here, like a host name that does not resolve.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    # Huge pages for tensors from 2 MB: between processes the kernel copies weights page by page,
    # and through these a fifth faster. torch asks once, at its first tensor.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    # First, because starting the tracker unblocks SIGINT.
    resource_tracker.ensure_running()
    # Ctrl-C during the loading would end the forkserver with a traceback. What is blocked here
    # stays blocked in it, and in the ranks.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


def run_local(
    spec: Spec,
    seats: Sequence[Seat],
    emit: Callable[[Any], None],
    *,
    job: str = ENGINE_JOB,
    limit_s: float | None = None,
) -> None:
    """Run a job on processes of this machine, and return when all of them are done.

    On any way out, an exception in `emit` or a signal's included, no rank is left.

    Args:
        spec: what to run, of the kind that the job takes.
        seats: one per rank.
        emit: called here with each record of rank 0, in order.
        job: "module:function" that every rank calls with (spec, group, emit).
        limit_s: how long all of it may take once the ranks were started; None for as long as it
            takes.
    Collective: none; starts those who meet.
    Raises: JobFailed, naming the rank that it began with; TimeoutError if the limit passes and no
        rank has said why.
    """
    preload_ranks()
    # Here, so that it loads while the forkserver does.
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    store = TCPStore(
        "127.0.0.1",
        0,
        is_master=True,
        wait_for_workers=False,
        timeout=timedelta(seconds=spec.timeout_s),
    )
    context = multiprocessing.get_context("forkserver")
    records, records_in = context.Pipe(duplex=False)
    ranks: list[_Rank] = []
    try:
        for seat in seats:
            report, report_in = context.Pipe()
            process = context.Process(
                name=f"equipoise-rank-{seat.rank}",
                target=_run_rank,
                args=(job, seat, store.port, report_in, None if seat.rank else records_in),
                daemon=True,
            )
            process.start()
            report_in.close()
            ranks.append(_Rank(seat, process, report))
            # Not among the arguments: a signal may come while so much is being written, and
            # multiprocessing shows the traceback of a process that gets half of them.
            with contextlib.suppress(BrokenPipeError):  # it has died, which shows below
                report.send(spec)
        records_in.close()
        _supervise(ranks, records, emit, spec.timeout_s, limit_s)
    finally:
        _stop([rank.process for rank in ranks])
        for connection in (records, *(rank.report for rank in ranks)):
            connection.close()


def _run_rank(*arguments: object) -> None:
    # The parent pickles this function, and need not import what a rank imports.
    from equipoise.launch import rank_process

    rank_process.run_rank(*arguments)  # type: ignore[arg-type]


def _supervise(
    ranks: Sequence[_Rank],
    records: Connection,
    emit: Callable[[Any], None],
    timeout_s: float,
    limit_s: float | None,
) -> None:
    """Pass records on until every rank is done, or one has failed."""
    running = {rank.report: rank for rank in ranks}
    sources: set[Connection] = {records, *running}
    failures: list[Failure] = []
    # Without a limit a job takes as long as it takes: ranks have their own deadlines, and an end of
    # one shows.
    limit = float("inf") if limit_s is None else time.monotonic() + limit_s
    deadline: float = limit
    while sources and not any(failure.cause is Cause.DIED for failure in failures):
        left = None if deadline == float("inf") else max(0.0, deadline - time.monotonic())
        ready = wait(sources, left)
        if not ready:
            break
        for source in (connection for connection in sources.copy() if connection in ready):
            try:
                message = source.recv()
            except (EOFError, ConnectionResetError):
                sources.discard(source)
                if source in running:
                    failures.append(_describe_end(running.pop(source)))
                continue
            if source is records:
                emit(message)
                continue
            sources.discard(source)
            rank = running.pop(source)
            if message is not None:
                failures.append(message)
            elif rank.seat.rank == 0:
                deadline = min(limit, time.monotonic() + timeout_s)
        if failures:
            deadline = min(deadline, failures[0].at + GRACE_S)
    if not failures and running and time.monotonic() >= limit:
        raise TimeoutError(f"not done within {limit_s:g} s")
    if not failures and running:
        failures = [_describe_straggler(rank, timeout_s) for rank in running.values()]
    if failures:
        # A death is heard of at once, maybe before what was said ahead of it.
        if records in sources:
            _drain(records, emit)
        raise JobFailed(find_first(failures))


def _drain(records: Connection, emit: Callable[[Any], None]) -> None:
    """Pass on what rank 0 has said already; it may still run, and say more."""
    deadline = time.monotonic() + STOP_S
    with contextlib.suppress(EOFError, ConnectionResetError):
        while time.monotonic() < deadline and records.poll():
            emit(records.recv())


def _describe_end(rank: _Rank) -> Failure:
    rank.process.join(REAP_S)
    return describe_death(rank.seat.rank, rank.process.exitcode)


def _describe_straggler(rank: _Rank, timeout_s: float) -> Failure:
    number = rank.seat.rank
    text = f"rank {number} still runs {timeout_s:.0f} s after rank 0 was done"
    return Failure(number, Cause.RAISED, text, expected=False)


def _stop(processes: Sequence[BaseProcess]) -> None:
    """End what still runs: SIGTERM, and SIGKILL after STOP_S."""
    with _deaf():
        for process in processes:
            process.terminate()
        deadline = time.monotonic() + STOP_S
        for process in processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
        for process in processes:
            process.join(STOP_S)


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Let no second Ctrl-C interrupt the ending of ranks; it takes seconds at most."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in heard:
        signal.signal(number, signal.SIG_IGN)
    try:
        yield
    finally:
        for number, handler in heard.items():
            signal.signal(number, handler)
