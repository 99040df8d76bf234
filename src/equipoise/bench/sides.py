"""Several ways to do the same, timed in turns by the ranks of a group; one is transformers' own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist  # noqa: TID251 - transformers takes torch's default group
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh  # noqa: TID251
from torch.distributed.distributed_c10d import PrefixStore  # noqa: TID251

from equipoise.comm.groups import RankGroup
from equipoise.errors import DependencyError

NUM_WARM_UPS = 3

Side = Callable[[], Tensor]
"""One call -> [T, D]."""
Exchange = Callable[[Tensor, Tensor, Tensor], Tensor]
"""hidden_TD, expert_TK, weight_TK -> [T, D]."""

_Name = TypeVar("_Name", bound=str)


def time_in_turns(
    sides: Mapping[_Name, Side], num_repeats: int, num_rounds: int, group: RankGroup
) -> dict[_Name, tuple[float, ...]]:
    """Time each side in each round, after some calls that are not timed.

    Args:
        sides: by name; they take turns in who goes first.
        num_repeats: calls in a row that are timed together.
        num_rounds: how often.
        group: whose ranks call them together.
    Returns:
        By name, per round the seconds of one call on the slowest rank.
    Collective: every rank of the group.
    """
    names = tuple(sides)
    for name in names * NUM_WARM_UPS:
        sides[name]()
    seconds: dict[_Name, list[float]] = {name: [] for name in names}
    for number in range(num_rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            seconds[name].append(_time(sides[name], num_repeats, group))
    return {name: tuple(several) for name, several in seconds.items()}


@contextmanager
def open_transformers(group: RankGroup, name: str) -> Iterator[Callable[[nn.Module], Exchange]]:
    """The all_to_all expert parallelism of transformers, over torch's default group.

    Within, gradients are off. Not by inference mode: in it the exchange has no kernel on a GPU.

    Args:
        group: its ranks; tokens go over NCCL where it is on GPUs, else over gloo.
        name: of this use, as no other of the group's store.
    Returns:
        A context that gives what makes it of experts: those of this rank, in order of ranks.
    Collective: every rank of the group; so is each call of what is made.
    Raises: DependencyError if the installed transformers has none.
    """
    try:
        from transformers.distributed.expert_parallel import AllToAllEP
    except ImportError as error:
        raise DependencyError(
            "the installed transformers has no all_to_all expert parallelism to compare with: "
            "pip install 'transformers>=5.24'"
        ) from error
    dist.init_process_group(
        choose_wire(group),
        store=PrefixStore(f"{name}/", group.store),
        rank=group.rank,
        world_size=group.size,
        timeout=group.timeout,
    )

    def make(experts: nn.Module) -> Exchange:
        mesh = init_device_mesh(group.device.type, (group.size, 1), mesh_dim_names=("ep", "tp"))
        made: Any = AllToAllEP(experts, mesh["ep"], mesh["tp"])
        exchange: Exchange = made
        return exchange

    try:
        with torch.no_grad():
            yield make
    finally:
        dist.destroy_process_group()


def choose_wire(group: RankGroup) -> str:
    """What tokens go over on both sides. Collective: none."""
    return "nccl" if group.device.type == "cuda" else "gloo"


def _time(side: Side, num_repeats: int, group: RankGroup) -> float:
    """Seconds of one call, of the slowest rank."""
    _finish(group)
    group.barrier()
    started_s = time.perf_counter()
    for _ in range(num_repeats):
        side()
    _finish(group)
    taken = torch.tensor(time.perf_counter() - started_s, dtype=torch.float64) / num_repeats
    group.all_reduce(taken, "max")
    return float(taken)


def _finish(group: RankGroup) -> None:
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
