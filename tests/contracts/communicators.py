"""Ranks for the communicators' contract: one list of backends, each with its own kind of rank."""

from __future__ import annotations

import functools
import inspect
import os
import signal
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.memory import MemoryEplbCommunicator, MemoryFabric
from equipoise.comm.registry import create_eplb_communicator
from tests.ranks import Rank, run_ranks

BACKENDS = (
    "memory",
    "torch_gloo",
    "nixl",
    pytest.param("torch_gloo on cuda", marks=pytest.mark.gpu),
    pytest.param("nixl on cuda", marks=pytest.mark.gpu),
    pytest.param("torch_nccl on cuda", marks=pytest.mark.multi_gpu),
    pytest.param("pynccl on cuda", marks=pytest.mark.multi_gpu),
)
"""Every backend that has to pass; all but "memory" by its name in the registry."""

PATIENCE_S = 20.0
"""Longest wait for another rank in tests in which none is missing."""


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """Random bytes as a tensor; for bool, random truth."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    width = torch.empty(0, dtype=dtype).element_size()
    count = int(np.prod(shape)) * width
    data = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)
    return data.view(dtype).view(shape)


class World(ABC):
    """One rank of a contract test, whatever kind of rank it is."""

    rank: int
    size: int
    device = torch.device("cpu")

    def zeros(self, *shape: Any, **options: Any) -> torch.Tensor:
        """A tensor where the weights are."""
        return torch.zeros(*shape, **{"device": self.device, **options})

    def noise(self, *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
        """Random bytes where the weights are; for bool, random truth."""
        return noise(*shape, dtype=dtype, seed=seed).to(self.device)

    @abstractmethod
    def make(
        self,
        expert_weights: ExpertWeights = (),
        *,
        timeout_s: float = PATIENCE_S,
        generation: int = 0,
    ) -> EplbCommunicator:
        """A communicator of a generation of its own; collective."""

    @abstractmethod
    def die(self) -> None:
        """End this rank here and now, as a crash would."""

    @abstractmethod
    def say(self, word: str) -> None:
        """Tell the other ranks something, beside the communicator."""

    @abstractmethod
    def hear(self, word: str, among: Sequence[int] | None = None) -> None:
        """Return when these ranks, or all, have said it."""


class ProcessWorld(World):
    def __init__(self, rank: Rank, backend: str) -> None:
        self._backend, _, on_cuda = backend.partition(" on ")
        self.rank, self.size, self._rank = rank.rank, rank.size, rank
        # A wire that is let go takes along what it has told peers and they have not heard.
        self._made: list[EplbCommunicator] = []
        if on_cuda:
            self.device = torch.device("cuda", rank.rank % torch.cuda.device_count())
            torch.cuda.set_device(self.device)

    def make(
        self,
        expert_weights: ExpertWeights = (),
        *,
        timeout_s: float = PATIENCE_S,
        generation: int = 0,
    ) -> EplbCommunicator:
        group = self._rank.make_group(
            generation=generation,
            timeout_s=timeout_s,
            device=self.device.type,
            device_group="nccl" if self._backend == "torch_nccl" else "gloo",
        )
        self._made.append(create_eplb_communicator(group, self._backend, expert_weights))
        return self._made[-1]

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def say(self, word: str) -> None:
        self._rank.store.set(f"{word}/{self.rank}", "said")

    def hear(self, word: str, among: Sequence[int] | None = None) -> None:
        ranks = range(self.size) if among is None else among
        self._rank.store.wait([f"{word}/{r}" for r in ranks], timedelta(seconds=PATIENCE_S))


class _Died(BaseException):
    pass


class Shared:
    """What the threads of one test share."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.lock = threading.Condition()
        self.fabrics: dict[int, MemoryFabric] = {}
        self.said: set[tuple[str, int]] = set()

    def fabric(self, generation: int) -> MemoryFabric:
        with self.lock:
            return self.fabrics.setdefault(generation, MemoryFabric(self.size))


class ThreadWorld(World):
    def __init__(self, rank: int, shared: Shared) -> None:
        self.rank, self.size, self._shared = rank, shared.size, shared

    def make(
        self,
        expert_weights: ExpertWeights = (),
        *,
        timeout_s: float = PATIENCE_S,
        generation: int = 0,
    ) -> EplbCommunicator:
        fabric = self._shared.fabric(generation)
        return MemoryEplbCommunicator(fabric, self.rank, expert_weights, timeout_s)

    def die(self) -> None:
        raise _Died

    def say(self, word: str) -> None:
        with self._shared.lock:
            self._shared.said.add((word, self.rank))
            self._shared.lock.notify_all()

    def hear(self, word: str, among: Sequence[int] | None = None) -> None:
        wanted = {(word, r) for r in (range(self.size) if among is None else among)}
        with self._shared.lock:
            assert self._shared.lock.wait_for(lambda: wanted <= self._shared.said, PATIENCE_S)


def on_ranks(
    num_ranks: int, *, dies: Sequence[int] = ()
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run `body(world, ...)` on this many ranks, once for each backend."""

    def decorate(body: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(body)
        _, *parameters = signature.parameters.values()

        @functools.wraps(body)
        def run(tmp_path: Path, backend: str, **arguments: Any) -> None:
            if backend == "memory":
                _run_threads(body, num_ranks, arguments, dies)
            else:
                if "nccl" in backend and torch.cuda.device_count() < num_ranks:
                    pytest.skip(f"needs {num_ranks} CUDA devices")
                target = (body.__module__, body.__qualname__)
                packed = {
                    "target": target,
                    "backend": backend,
                    "arguments": arguments,
                    "stay": [rank for rank in range(num_ranks) if rank not in dies],
                }
                run_ranks(_enter_process, num_ranks, tmp_path, packed, frozenset(dies))

        names = ("tmp_path", "backend")
        fixtures = [inspect.Parameter(n, inspect.Parameter.KEYWORD_ONLY) for n in names]
        keyword = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters]
        run.__signature__ = signature.replace(parameters=[*fixtures, *keyword])  # type: ignore[attr-defined]
        return pytest.mark.parametrize("backend", BACKENDS)(run)

    return decorate


def _enter_process(
    rank: Rank,
    target: tuple[str, str],
    backend: str,
    arguments: dict[str, Any],
    stay: Sequence[int],
) -> None:
    module, name = target
    body = inspect.unwrap(getattr(__import__(module, fromlist=[name]), name))
    world = ProcessWorld(rank, backend)
    body(world, **arguments)
    world.say("done")
    world.hear("done", among=stay)


def _run_threads(
    body: Callable[..., None], size: int, arguments: dict[str, Any], dies: Sequence[int]
) -> None:
    shared = Shared(size)
    errors: dict[int, BaseException] = {}

    def enter(rank: int) -> None:
        try:
            body(ThreadWorld(rank, shared), **arguments)
        except BaseException as error:
            errors[rank] = error
        finally:
            for fabric in list(shared.fabrics.values()):
                fabric.leave(rank)

    threads = [threading.Thread(target=enter, args=(rank,), daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for rank, thread in enumerate(threads):
        thread.join(2 * PATIENCE_S)
        assert not thread.is_alive(), f"rank {rank} still running"
    dead = {rank for rank, error in errors.items() if isinstance(error, _Died)}
    for rank, error in errors.items():
        if rank not in dead:
            raise AssertionError(f"rank {rank} raised") from error
    assert dead == set(dies)
