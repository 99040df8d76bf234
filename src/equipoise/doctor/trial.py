"""What two ranks do to find out whether a wire works: they swap experts over it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.errors import CommunicatorUnavailable, TransferError

_NUM_SLOTS = 16
_SPREAD = 0x9E3779B97F4A7C1
"""Odd, so that multiples of it fill all bytes of a word, and no two words are equal."""


@dataclass(frozen=True)
class TrialSpec:
    """What is tried; the same on both ranks.

    Attributes:
        wire: name of a communicator, or "auto".
        num_bytes: that each rank sends and receives in a round; a multiple of 128.
        num_rounds: that are timed, behind one that is not.
        timeout_s: longest wait for the other rank.
        output: file that gets what the ranks print.
    """

    wire: str
    num_bytes: int
    num_rounds: int
    timeout_s: float
    output: Path


@dataclass(frozen=True)
class Stage:
    """What rank 0 begins with.

    Attributes:
        text: as in "hangs while ...".
    """

    text: str


@dataclass(frozen=True)
class Chosen:
    """The wire that was made.

    Attributes:
        name: of the communicator.
        reason: why it is this one.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Refused:
    """The wire says that it cannot work here.

    Attributes:
        reason: why, and what to do about it.
    """

    reason: str


@dataclass(frozen=True)
class Timed:
    """The wire works.

    Attributes:
        seconds: of each round, of the slower rank.
    """

    seconds: tuple[float, ...]


Said = Stage | Chosen | Refused | Timed


def try_wire(spec: TrialSpec, group: RankGroup, emit: Callable[[Said], None]) -> None:
    """Swap experts with the other rank, some rounds, and compare every byte.

    Args:
        spec: the same on both ranks.
        group: of two ranks.
        emit: called on rank 0 with how far it has come.
    Collective: both ranks of the group.
    Raises: CommunicatorUnavailable if the wire cannot work here, after it was emitted;
        TransferError if a wrong byte arrives; whatever the wire raises.
    """
    keep_output(spec.output)
    emit(Stage("it is made"))
    sent = _fill(spec.num_bytes, group.rank, group.device)
    try:
        communicator = create_eplb_communicator(group, spec.wire, [[sent]])
    except CommunicatorUnavailable as error:
        emit(Refused(str(error)))
        raise
    emit(Chosen(communicator.name, communicator.reason))
    emit(Stage("experts travel"))
    try:
        seconds = _swap(spec, group, communicator)
    finally:
        emit(Stage("it is closed"))
        communicator.close()
    emit(Timed(tuple(seconds)))


def keep_output(path: Path) -> None:
    """Write to a file from now on, whatever this process prints; C libraries of it too.

    Collective: none.
    """
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    for stream in (1, 2):
        os.dup2(handle, stream)
    os.close(handle)


def _swap(spec: TrialSpec, group: RankGroup, communicator: EplbCommunicator) -> list[float]:
    """Seconds of each round but the first, of the slower rank."""
    peer = 1 - group.rank
    expected = _fill(spec.num_bytes, peer, group.device).flatten()
    into = torch.empty_like(expected)
    peers = np.full(_NUM_SLOTS, peer)
    layers = np.zeros(_NUM_SLOTS, dtype=np.int64)
    moves = ExpertMoves(peers, layers, np.arange(_NUM_SLOTS), peers, layers, into)
    seconds = []
    for _ in range(spec.num_rounds + 1):
        into.zero_()
        group.barrier()
        started = time.perf_counter()
        communicator.add_moves(moves)
        communicator.execute()
        if into.is_cuda:
            torch.cuda.current_stream().synchronize()
        taken = torch.tensor(time.perf_counter() - started, dtype=torch.float64)
        group.all_reduce(taken, "max")
        seconds.append(float(taken))
        # As words: eight times as fast as byte by byte.
        if not torch.equal(into.view(torch.int64), expected.view(torch.int64)):
            raise TransferError(
                f"rank {group.rank}, {communicator.name}: experts of rank {peer} arrived with "
                "wrong bytes",
                rank=group.rank,
                peer=peer,
            )
    return seconds[1:]


def _fill(num_bytes: int, rank: int, device: torch.device) -> Tensor:
    """[S, bytes] uint8, weights that no other rank has."""
    words = torch.arange(num_bytes // 8, device=device).mul_(_SPREAD).add_(rank)
    return words.view(torch.uint8).view(_NUM_SLOTS, -1)
