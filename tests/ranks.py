"""Real ranks for tests: processes of a forkserver that has torch loaded already.

    @processes(4)
    def test_something(rank: Rank, backend: str) -> None: ...

runs the body in four processes. A rank that raises, dies or hangs fails the test by its number.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pytest

if TYPE_CHECKING:
    import torch.distributed as dist

    from equipoise.comm.groups import RankGroup

TIMEOUT_S = 80.0
SHORT_S = 5.0
"""A deadline that shall pass for who stays away: no rank that a busy machine holds up for seconds
misses it."""
# Two seconds for each rank that loads a model, were it not done once before ranks are forked.
_SLOW_IMPORTS = ("transformers.models.qwen3_moe.modeling_qwen3_moe",)


@dataclass(frozen=True)
class Rank:
    """One rank of a test.

    Attributes:
        rank: its number.
        size: ranks of the test.
        store: a FileStore that they share, so no ports are taken.
        path: a folder that they share.
    """

    rank: int
    size: int
    store: dist.Store
    path: Path

    def make_group(
        self,
        *,
        generation: int = 0,
        timeout_s: float = 20.0,
        size: int | None = None,
        device: str = "cpu",
        device_group: Literal["gloo", "nccl"] = "gloo",
    ) -> RankGroup:
        """This rank's groups of a generation; on "cuda", ranks take turns over the GPUs."""
        import torch

        from equipoise.comm.groups import create_rank_group

        where = torch.device(device)
        if device == "cuda":
            where = torch.device("cuda", self.rank % torch.cuda.device_count())
            torch.cuda.set_device(where)
        return create_rank_group(
            self.store,
            self.rank,
            self.size if size is None else size,
            where,
            generation=generation,
            timeout=timedelta(seconds=timeout_s),
            device_group=device_group,
        )


def processes(
    num_ranks: int | None = None, *, dies: Iterable[int] = (), timeout_s: float = TIMEOUT_S
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test function in real processes, one per rank.

    Args:
        num_ranks: how many; None takes the test's parameter `num_ranks`.
        dies: ranks that are expected to end without finishing the body.
        timeout_s: seconds until ranks that still run are killed and named.
    """
    expected_dead = frozenset(dies)

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(body)
        _, *parameters = signature.parameters.values()

        @functools.wraps(body)
        def run(tmp_path: Path, **arguments: Any) -> None:
            size = num_ranks if num_ranks is not None else arguments["num_ranks"]
            run_ranks(body, size, tmp_path, arguments, expected_dead, timeout_s)

        fixture = inspect.Parameter("tmp_path", inspect.Parameter.KEYWORD_ONLY)
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = signature.replace(parameters=[fixture, *keyword])  # type: ignore[attr-defined]
        return run

    return decorate


def start_forkserver() -> None:
    """Start the process that ranks of this worker's tests are forked from; twice is fine."""
    import torch

    from equipoise.launch.processes import WARM_UPS

    modules = ["torch", "torch.distributed", "pytest", "tests.ranks", *_SLOW_IMPORTS]
    # As the ranks of a service, which come from this process too if it is there first.
    modules += WARM_UPS if torch.cuda.device_count() == 0 else ()
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)
    forkserver.ensure_running()


def hide_nixl() -> None:
    """Make this rank one in which NIXL is not installed, also if it was forked with NIXL loaded."""
    names = ["nixl", "nixl_cu13", "nixl_cu12", "rixl"]
    loaded = [name for name in sys.modules if name.partition(".")[0] in names]
    for name in names + loaded:
        sys.modules[name] = None  # type: ignore[assignment]


def run_ranks(
    body: Callable[..., None],
    size: int,
    path: Path,
    arguments: dict[str, Any],
    expected_dead: frozenset[int] = frozenset(),
    timeout_s: float = TIMEOUT_S,
) -> None:
    """Start the ranks, wait for all of them, and fail by number."""
    context = multiprocessing.get_context("forkserver")
    start_forkserver()
    ranks: list[tuple[BaseProcess, Connection]] = []
    for rank in range(size):
        ours, theirs = context.Pipe(duplex=False)
        target = (body.__module__, body.__qualname__)
        process = context.Process(
            target=_run_rank, args=(target, rank, size, path, arguments, theirs), daemon=True
        )
        process.start()
        theirs.close()
        ranks.append((process, ours))
    try:
        failures = _await_ranks(ranks, expected_dead, time.monotonic() + timeout_s)
    finally:
        for process, connection in ranks:
            if process.is_alive():
                process.kill()
            process.join(5)
            connection.close()
    if failures:
        pytest.fail("\n".join(failures), pytrace=False)


def _await_ranks(
    ranks: list[tuple[BaseProcess, Connection]], expected_dead: frozenset[int], deadline: float
) -> list[str]:
    failures = []
    waiting = {connection: rank for rank, (_, connection) in enumerate(ranks)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            hung = ", ".join(str(rank) for rank in sorted(waiting.values()))
            return [*failures, f"rank {hung} still running at the deadline"]
        for connection in ready:
            assert isinstance(connection, Connection)
            rank = waiting.pop(connection)
            try:
                error = connection.recv()
            except EOFError:
                ranks[rank][0].join(5)
                if rank not in expected_dead:
                    failures.append(f"rank {rank} died: exit code {ranks[rank][0].exitcode}")
                continue
            if error is not None:
                failures.append(f"rank {rank} raised:\n{error}")
            elif rank in expected_dead:
                failures.append(f"rank {rank} was expected to die, and finished")
    return failures


def _run_rank(
    target: tuple[str, str],
    rank: int,
    size: int,
    path: Path,
    arguments: dict[str, Any],
    connection: Connection,
) -> None:
    import torch
    import torch.distributed as dist

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    body = importlib.import_module(target[0])
    for name in target[1].split("."):
        body = getattr(body, name)
    outcome: str | None = None
    try:
        store = dist.FileStore(str(path / "store"), size)
        inspect.unwrap(body)(Rank(rank, size, store, path), **arguments)  # type: ignore[arg-type]
    except pytest.skip.Exception as skip:
        outcome = f"skipped inside a rank: {skip}"
    except BaseException:
        outcome = traceback.format_exc()
    with contextlib.suppress(BrokenPipeError):
        connection.send(outcome)
    connection.close()
    # Threads of a group that a test left hanging must not keep the process.
    os._exit(0)
