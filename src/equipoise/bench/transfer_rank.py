"""What each rank does when wires are compared: it measures them beside what limits them."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from equipoise.bench.transfer_case import RankShare, TransferSpec, make_case
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.exchange import Exchange, deadline_in, explain
from equipoise.comm.groups import RankGroup
from equipoise.comm.queued import SLOWEST_BYTES_PER_S
from equipoise.comm.registry import create_eplb_communicator, list_communicators
from equipoise.errors import CommunicatorUnavailable, TransferError

Limit = Literal["memcpy", "raw gloo message"]

_TAG_RAW = 7
_FILL_BYTES_PER_S = 50e6
"""What a rank is trusted to fill, or to check, at least."""


def find_limit(backend: str) -> Limit:
    """What a backend is measured against: a wire over gloo cannot be faster than gloo."""
    return "raw gloo message" if backend == "torch_gloo" else "memcpy"


@dataclass(frozen=True)
class Measured:
    """One backend's figures, of all ranks.

    Attributes:
        backend: its name.
        seconds: of each round, of the slowest rank.
        limit_seconds: the same for its limit, measured right before or behind.
        peak_extra_bytes: most by which any rank's resident memory exceeded what it was before the
            communicator was made; None where the system does not tell.
    """

    backend: str
    seconds: tuple[float, ...]
    limit_seconds: tuple[float, ...]
    peak_extra_bytes: int | None


@dataclass(frozen=True)
class LeftOut:
    """A backend that does not work here.

    Attributes:
        backend: its name.
        reason: why, and what to install.
    """

    backend: str
    reason: str


Said = Measured | LeftOut


def measure_transfers(spec: TransferSpec, group: RankGroup, emit: Callable[[Said], None]) -> None:
    """Measure one backend after the other.

    Args:
        spec: the same on every rank.
        group: its ranks, on the CPU.
        emit: called on rank 0 with each backend's figures.
    Collective: every rank of the group.
    Raises: TransferError if a byte is wrong or a rank does not come in time;
        CommunicatorUnavailable if a backend that was asked for does not work here.
    """
    # Ranks share the cores; threads of theirs would only wait for each other.
    torch.set_num_threads(1)
    course = _Course(spec, group)
    for backend in spec.backends or list_communicators():
        try:
            said: Said = course.measure(backend)
        except CommunicatorUnavailable as error:
            if spec.backends:
                raise
            said = LeftOut(backend, str(error))
        if group.rank == 0:
            emit(said)


class _Course:
    """Runs of one rank, each started and ended together with all others."""

    def __init__(self, spec: TransferSpec, group: RankGroup) -> None:
        case = make_case(spec)
        self._spec = spec
        self._group = group
        self._share = RankShare(case, group.rank)
        total = spec.num_layers * spec.slots_per_rank * spec.expert_bytes
        self._busy_s = spec.num_ranks * total / _FILL_BYTES_PER_S

    def measure(self, backend: str) -> Measured:
        limit = {"memcpy": self._copy, "raw gloo message": self._message}[find_limit(backend)]
        memory = _PeakMemory()
        self._start_together()
        communicator = create_eplb_communicator(self._group, backend, self._share.weights)
        memory.look()
        seconds, limit_seconds = [], []
        try:
            # One round more, first: to warm up. They take turns in who goes first.
            for number in range(self._spec.num_rounds + 1):
                if number % 2:
                    limit_seconds.append(self._time(limit))
                memory.forget()
                seconds.append(self._time(lambda: self._move(communicator)))
                memory.look()
                self._share.check(backend)
                if not number % 2:
                    limit_seconds.append(self._time(limit))
        finally:
            communicator.close()
        peak = torch.tensor(-1 if memory.most is None else memory.most)
        peaks = [int(each) for each in self._group.all_gather(peak)]
        return Measured(
            backend,
            tuple(seconds[1:]),
            tuple(limit_seconds[1:]),
            None if min(peaks) < 0 else max(peaks),
        )

    def _time(self, run: Callable[[], None]) -> float:
        """Seconds of the slowest rank."""
        self._start_together()
        started = time.perf_counter()
        run()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        self._group.all_reduce(taken, "max")
        return float(taken)

    def _start_together(self) -> None:
        self._group.all_gather(torch.zeros(1, dtype=torch.uint8), busy_s=self._busy_s)

    def _move(self, communicator: EplbCommunicator) -> None:
        communicator.add_moves(self._share.make_moves())
        communicator.execute()

    def _copy(self) -> None:
        # These are other experts than the ones that belong there: what a backend leaves out shows.
        self._share.into.copy_(self._share.memory[: self._share.into.numel()])

    def _message(self) -> None:
        exchange = Exchange(self._group.cpu_group, _TAG_RAW)
        received, sent = self._share.received_from, self._share.sent_to
        landings = self._share.into.split_with_sizes(list(received.values()))
        for peer, landing in zip(received, landings, strict=True):
            exchange.recv(landing, peer)
        parcels = self._share.memory[: sum(sent.values())].split_with_sizes(list(sent.values()))
        for peer, parcel in zip(sent, parcels, strict=True):
            exchange.send(parcel, peer)
        seconds = self._spec.timeout_s + self._share.memory.numel() / SLOWEST_BYTES_PER_S
        failures = exchange.wait(deadline_in(seconds))
        if failures:
            what, peer, cause = explain(failures, seconds)
            rank = self._group.rank
            raise TransferError(f"rank {rank}: {what}", rank=rank, peer=peer) from cause


class _PeakMemory:
    """How far this process's resident memory rises above what it is now; Linux tells.

    Attributes:
        most: bytes, None where the system does not tell.
    """

    def __init__(self) -> None:
        self.most: int | None = 0
        self.forget()
        self._before = self._read("VmRSS")

    def forget(self) -> None:
        """Begin to look for the peak from now on."""
        try:
            Path("/proc/self/clear_refs").write_text("5")
        except OSError:
            self.most = None

    def look(self) -> None:
        """Take the peak since `forget`."""
        if self.most is not None:
            self.most = max(self.most, self._read("VmHWM") - self._before)

    def _read(self, name: str) -> int:
        try:
            lines = Path("/proc/self/status").read_text().splitlines()
        except OSError:
            return 0
        found = [line.split() for line in lines if line.startswith(f"{name}:")]
        return int(found[0][1]) * 1024 if found else 0
