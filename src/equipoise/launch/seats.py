"""Which device each rank of this machine gets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from equipoise.errors import ConfigError


class Spec(Protocol):
    """What a job is asked to do: anything that can be pickled and says how long to wait."""

    @property
    def timeout_s(self) -> float:
        """Longest wait for another rank, in seconds."""


@dataclass(frozen=True)
class Seat:
    """One rank's place.

    Attributes:
        rank: its number, 0..size-1.
        size: R, ranks of the job.
        local_size: ranks on this machine.
        device: as torch names it, like "cpu" or "cuda:1".
        device_group: what carries tokens: NCCL refuses two ranks on one GPU, gloo does not.
    """

    rank: int
    size: int
    local_size: int
    device: str
    device_group: Literal["gloo", "nccl"]


def assign_seat(
    rank: int, size: int, *, local_rank: int, local_size: int, device: Literal["cpu", "cuda"]
) -> Seat:
    """Give a rank its device: GPUs in turn.

    Args:
        rank: its number in the job.
        size: R.
        local_rank: its number on this machine.
        local_size: ranks on this machine; every machine has as many.
        device: kind of device.
    Collective: none.
    Raises: ConfigError if there is no CUDA device.
    """
    if device == "cpu":
        return Seat(rank, size, local_size, "cpu", "gloo")
    import torch  # here, so that a job on the CPU does not wait for it

    num_gpus = torch.cuda.device_count()
    if not num_gpus:
        raise ConfigError("--device cuda: torch sees no CUDA device here; use --device cpu")
    group: Literal["gloo", "nccl"] = "nccl" if local_size <= num_gpus else "gloo"
    return Seat(rank, size, local_size, f"cuda:{local_rank % num_gpus}", group)


def assign_local_seats(num_ranks: int, device: Literal["cpu", "cuda"]) -> tuple[Seat, ...]:
    """Seats of a job that runs on this machine alone, by rank. As `assign_seat`."""
    return tuple(
        assign_seat(rank, num_ranks, local_rank=rank, local_size=num_ranks, device=device)
        for rank in range(num_ranks)
    )


def describe_seats(seats: Sequence[Seat]) -> str:
    """One line for people: how many ranks on what, and what carries tokens. Collective: none."""
    size, group = seats[0].size, seats[0].device_group
    ranks = "1 rank" if size == 1 else f"{size} ranks"
    if seats[0].device == "cpu":
        return f"{ranks} on the CPU; tokens travel by gloo"
    num_gpus = len({seat.device for seat in seats})
    gpus = "1 GPU" if num_gpus == 1 else f"{num_gpus} GPUs"
    why = "" if group == "nccl" else ", as ranks share a GPU"
    return f"{ranks} on {gpus}; tokens travel by {group}{why}"
