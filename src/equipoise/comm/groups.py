"""The groups of one rank in one generation of the membership."""

from __future__ import annotations

import secrets
import threading
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Literal, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.distributed_c10d import PrefixStore, Store

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import Exchange, deadline_in, explain
from equipoise.comm.process_groups import (
    abort_later,
    check_gloo,
    create_gloo,
    create_nccl,
    drop,
    has_nccl,
    meet,
)
from equipoise.comm.store_client import clone_store
from equipoise.comm.store_thread import StoreThread
from equipoise.errors import ConfigError, MembershipError

ReduceOp = Literal["sum", "max", "min"]

_ANSWERS_KEPT = 256
"""In the store. Ranks settle questions together, so that none is further behind."""

_TAG_MESSAGE = 0
_TAG_CONTROL = 1
_TAG_NEVER = 11


class Expected(NamedTuple):
    """What `RankGroup.expect` has posted.

    Attributes:
        gathered: R tensors, one of each rank, to be filled.
        exchange: that fills them; `abandon` it where no `all_gather` follows.
    """

    gathered: list[Tensor]
    exchange: Exchange


class RankGroup:
    """One generation's groups of one rank.

    Built from a store by `create_rank_group`, beside other generations and without torch's
    default group; or over groups that an engine has already, which it keeps. Control collectives
    are exchanged directly between every two ranks: one hop, the same result bit for bit on every
    rank, and a failure that names the peer. They are meant for small tensors: a rank holds R
    copies.

    Attributes:
        rank: number of this rank in the generation.
        size: R, ranks of the generation.
        generation: its number.
        device: where this rank's weights are.
        timeout: longest wait for another rank.
        store: what the generation agrees through, prefixed `gen{generation}/`.
        is_beside_nccl: whether another thread of this rank uses NCCL at the same time.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        device: torch.device,
        generation: int,
        timeout: timedelta,
        cpu_group: dist.ProcessGroup,
        device_group: dist.ProcessGroup,
        *,
        owns_device_group: bool = True,
        is_beside_nccl: bool = False,
    ) -> None:
        self.rank = rank
        self.size = size
        self.generation = generation
        self.device = device
        self.timeout = timeout
        self.store = store
        self.is_beside_nccl = is_beside_nccl
        self._cpu_group: dist.ProcessGroup | None = cpu_group
        self._device_group: dist.ProcessGroup | None = device_group
        self._owns_device_group = owns_device_group
        self._is_over, self._is_closed = threading.Event(), threading.Event()
        self._num_decisions = 0
        self._store_thread = StoreThread()
        # Asked by this rank, the oldest first; one thread at a time asks.
        self._asked: deque[str] = deque()

    @classmethod
    def from_process_groups(
        cls,
        cpu_group: dist.ProcessGroup,
        device_group: dist.ProcessGroup | None = None,
        *,
        device: torch.device,
        timeout: timedelta,
        store: Store | None = None,
    ) -> Self:
        """Take groups that an engine has already; it keeps them, also when this one is closed.

        A deadline that passes closes the connections of `cpu_group`, and messages travel over it
        by tag: an engine that sends on it too, or goes on after a failure, gives one of its own,
        like `torch.distributed.new_group(ranks, backend="gloo")`.

        Args:
            cpu_group: with a gloo backend; the default group, a subgroup, or one that torch's
                registry does not know.
            device_group: of the same ranks in the same order, for tokens; None for `cpu_group`.
            device: where this rank's weights are.
            timeout: longest wait for another rank.
            store: that all of these ranks reach; None for the one `cpu_group` was made from.
                Other groups may use it too.
        Collective: every rank of the group.
        Raises: ConfigError if this process is not in a group, a group has no gloo backend, or
            both differ; MembershipError if a rank does not come in time.
        """
        for name, given in (("cpu_group", cpu_group), ("device_group", device_group or cpu_group)):
            if not isinstance(given, dist.ProcessGroup):
                raise ConfigError(f"{name} is no group that this process is a member of")
            seat, expected = (given.rank(), given.size()), (cpu_group.rank(), cpu_group.size())
            if seat != expected:
                raise ConfigError(
                    f"this process is rank {expected[0]} of {expected[1]} in cpu_group, but "
                    f"{seat[0]} of {seat[1]} in {name}: both must have the same ranks"
                )
        check_gloo(cpu_group)
        store = store or cpu_group.get_group_store()
        group = cls(
            store,
            cpu_group.rank(),
            cpu_group.size(),
            device,
            0,
            timeout,
            cpu_group,
            device_group or cpu_group,
            owns_device_group=False,
        )
        # Rank 0's word sets this group's keys apart from all others in the store.
        word = torch.tensor([secrets.randbits(62)])
        group.store = PrefixStore(f"equipoise/{int(group.all_gather(word)[0]):x}/", store)
        return group

    @classmethod
    def from_device_mesh(
        cls, mesh: DeviceMesh, dim: str | int | None = None, *, timeout: timedelta
    ) -> Self:
        """Take the ranks of a mesh dimension; tokens travel over the mesh's own group.

        Control collectives get a gloo group of their own, made from the store of the mesh's group:
        a deadline that passes leaves the mesh as it is.

        Args:
            mesh: of CPU or CUDA devices; on CUDA, this rank's current device.
            dim: name or number of the dimension; None where there is but one.
            timeout: longest wait for another rank.
        Collective: every rank of the dimension.
        Raises: ConfigError if there is no such dimension; MembershipError if a rank does not come
            in time.
        """
        try:
            mesh_group = mesh.get_group(dim)
        except (RuntimeError, KeyError, IndexError) as error:
            names = ", ".join(mesh.mesh_dim_names or map(str, range(mesh.ndim)))
            raise ConfigError(
                f"dim {dim!r} is none of the mesh's dimensions: ask for one of {names}"
            ) from error
        rank, size, store = mesh_group.rank(), mesh_group.size(), mesh_group.get_group_store()
        device = torch.device(mesh.device_type)
        if device.type == "cuda":
            device = torch.device("cuda", torch.cuda.current_device())
        # All ranks count their calls alike, so a mesh may be taken more than once.
        number = store.add(f"equipoise/mesh/{rank}", 1)
        prefixed = PrefixStore(f"equipoise/mesh{number}/", store)
        meet(prefixed, rank, size, timeout)
        cpu_group = create_gloo(prefixed, rank, size, device, timeout)
        return cls(
            prefixed,
            rank,
            size,
            device,
            0,
            timeout,
            cpu_group,
            mesh_group,
            owns_device_group=False,
        )

    @property
    def cpu_group(self) -> dist.ProcessGroup:
        """Gloo. Raises: MembershipError after `close`."""
        return self._unless_closed(self._cpu_group)

    @property
    def device_group(self) -> dist.ProcessGroup:
        """NCCL, the gloo group itself, or the engine's. Raises: MembershipError after `close`."""
        return self._unless_closed(self._device_group)

    def expect(self, like: Tensor) -> Expected:
        """Make ready to hear what an `all_gather` will bring, before this rank has its own tensor.

        Peers that are ready first then need not wait for this rank to say that it is.

        Args:
            like: of the shape and dtype that every rank will give.
        Returns:
            For `all_gather`, the next of the group's collectives; or to be abandoned.
        Collective: none.
        Raises: MembershipError after `close`.
        """
        gathered = [torch.empty_like(like, device="cpu") for _ in range(self.size)]
        exchange = Exchange(self.cpu_group, _TAG_CONTROL)
        for peer in self._peers():
            exchange.recv(view_bytes(gathered[peer]), peer)
        return Expected(gathered, exchange)

    def all_gather(
        self,
        tensor: Tensor,
        *,
        busy_s: float = 0.0,
        meanwhile: Callable[[], None] | None = None,
        expected: Expected | None = None,
    ) -> list[Tensor]:
        """Everybody's tensor, by rank.

        Args:
            tensor: the same shape and dtype on every rank; any device.
            busy_s: seconds that a rank may have good reason to come later than this one; the
                timeout begins behind them.
            meanwhile: what this rank does between telling the others and hearing them; it does
                not raise.
            expected: from `expect`, if this rank called it.
        Returns:
            R tensors of that shape and dtype on the CPU, own one included.
        Collective: every rank of the group, in the same order among the group's collectives.
        Raises: MembershipError that names the peer, within `busy_s` and the timeout.
        """
        mine = tensor.detach().to("cpu").contiguous()
        gathered, exchange = expected or self.expect(mine)
        gathered[self.rank].copy_(mine)
        for peer in self._peers():
            exchange.send(view_bytes(mine), peer)
        if meanwhile is not None:
            meanwhile()
        self._finish(exchange, busy_s)
        return gathered

    def all_reduce(self, tensor: Tensor, op: ReduceOp = "sum") -> None:
        """Replace a tensor, in place, by its elementwise reduction over all ranks.

        Args:
            tensor: the same shape and dtype on every rank; any device.
            op: what to reduce by.
        Collective: as `all_gather`.
        Raises: as `all_gather`.
        """
        stacked = torch.stack(self.all_gather(tensor))
        match op:
            case "sum":
                reduced = stacked.sum(0, dtype=tensor.dtype)
            case "max":
                reduced = stacked.amax(0)
            case "min":
                reduced = stacked.amin(0)
        tensor.copy_(reduced)

    def barrier(self) -> None:
        """Return when every rank has come here.

        Collective: as `all_gather`.
        Raises: as `all_gather`.
        """
        self.all_gather(torch.zeros(1, dtype=torch.uint8))

    def send(self, tensor: Tensor, peer: int) -> None:
        """Send a contiguous CPU tensor to another rank; return when it is taken.

        Collective: the peer calls `recv` with a tensor of the same bytes.
        Raises: as `all_gather`.
        """
        exchange = Exchange(self.cpu_group, _TAG_MESSAGE)
        exchange.send(view_bytes(tensor), peer)
        self._finish(exchange)

    def recv(self, tensor: Tensor, peer: int) -> None:
        """Fill a contiguous CPU tensor with what another rank sends.

        Collective: the peer calls `send` with a tensor of the same bytes.
        Raises: as `all_gather`.
        """
        exchange = Exchange(self.cpu_group, _TAG_MESSAGE)
        exchange.recv(view_bytes(tensor), peer)
        self._finish(exchange)

    def fork(self, name: str) -> RankGroup:
        """A group of the same ranks with connections and a store's client of its own.

        For another thread: what fails in one group leaves the other as it is.

        Args:
            name: not used before with this group.
        Returns:
            a group over gloo, whose `device_group` is its `cpu_group`; the caller closes it.
        Collective: every rank of the group.
        Raises: MembershipError if a rank does not come in time.
        """
        store = PrefixStore(f"{name}/", clone_store(self.store))
        meet(store, self.rank, self.size, self.timeout)
        cpu_group = create_gloo(store, self.rank, self.size, self.device, self.timeout)
        return RankGroup(
            store,
            self.rank,
            self.size,
            self.device,
            self.generation,
            self.timeout,
            cpu_group,
            cpu_group,
            is_beside_nccl=self.device.type == "cuda" and has_nccl(self.device_group),
        )

    def decide(self, proposal: str, question: str | None = None) -> str:
        """Settle one question for the whole generation: the first proposal to arrive stands.

        Also ranks that have lost sight of each other get the same answer, as the store gives it.

        Args:
            proposal: this rank's answer; not empty.
            question: its name, not used before in this group; None for the next in a row. A named
                one may be asked by any thread, any number of times.
        Returns:
            the proposal that stands.
        Collective: every rank that lives, unnamed questions in the same order; waits for none.
        Raises: MembershipError if the store does not answer within the timeout.
        """
        key = f"question/{question}"
        if question is None:
            key = f"decision/{self._num_decisions}"
            self._num_decisions += 1
        if self.size == 1 and question is None:
            return proposal

        def settle() -> str:
            stands: bytes = self.store.compare_set(key, "", proposal)
            return stands.decode()

        answer = self._store_thread.ask(
            settle, self.timeout.total_seconds(), lambda: self._forget_old(key)
        )
        if answer is None:
            raise MembershipError(
                f"rank {self.rank}: the store of generation {self.generation} did not answer "
                f"within {self.timeout.total_seconds():.1f} s",
                rank=self.rank,
            )
        return answer

    def _forget_old(self, key: str) -> None:
        """Have the store keep so many answers and no more: nobody asks as late as that."""
        self._asked.append(key)
        if len(self._asked) > _ANSWERS_KEPT:
            oldest = self._asked.popleft()
            if self.rank == 0 and oldest not in self._asked:
                self.store.delete_key(oldest)

    @property
    def is_over(self) -> bool:
        """Whether a rank is known to be dead; whoever waits for a device looks. Any thread."""
        return self._is_over.is_set()

    def end(self) -> None:
        """A rank is known to be dead: what waits for it over NCCL would only by the deadline know.

        Who waits for the device without a look is freed soon: the generation's NCCL group gives up.

        Collective: none; any thread.
        """
        self._is_over.set()
        group = self._device_group
        if group is not None and group is not self._cpu_group and self._owns_device_group:
            abort_later(group, self._is_closed)

    def close(self) -> None:
        """Let the groups go, those of the engine unharmed; twice is fine.

        Collective: none; never waits for a peer.
        """
        held = [group for group in (self._cpu_group, self._device_group) if group is not None]
        owns_nccl = self._owns_device_group and self._device_group is not self._cpu_group
        self._cpu_group = self._device_group = None
        self._is_closed.set()
        # A group with operations that never ended blocks in its destructor.
        thread = threading.Thread(
            target=drop, args=(held, owns_nccl), name="equipoise-drop-group", daemon=True
        )
        thread.start()
        del held
        thread.join(1.0)

    def cut_off(self) -> None:
        """Close the connections, so that other threads' waits on them fail. Collective: none."""
        if self._cpu_group is not None and self.size > 1:
            never = Exchange(self._cpu_group, _TAG_NEVER)
            never.recv(torch.zeros(1, dtype=torch.uint8), self._peers()[0])
            never.wait(deadline_in(0.0))

    def _peers(self) -> list[int]:
        return [peer for peer in range(self.size) if peer != self.rank]

    def _finish(self, exchange: Exchange, busy_s: float = 0.0) -> None:
        seconds = busy_s + self.timeout.total_seconds()
        failures = exchange.wait(deadline_in(seconds))
        if failures:
            what, peer, error = explain(failures, seconds)
            raise MembershipError(
                f"rank {self.rank} of generation {self.generation}: {what}",
                rank=self.rank,
                peer=peer,
            ) from error

    def _unless_closed(self, group: dist.ProcessGroup | None) -> dist.ProcessGroup:
        if group is None:
            raise MembershipError(
                f"rank {self.rank}: the group of generation {self.generation} was closed",
                rank=self.rank,
            )
        return group


def create_rank_group(
    store: Store,
    rank: int,
    size: int,
    device: torch.device,
    *,
    generation: int = 0,
    timeout: timedelta,
    device_group: Literal["gloo", "nccl"],
) -> RankGroup:
    """Join one generation's groups.

    Args:
        store: shared by all ranks; the generation takes the prefix `gen{generation}/`.
        rank: number of this rank.
        size: R.
        device: where this rank's weights are.
        generation: its number; never used before in this store.
        timeout: longest wait for another rank, here and in every control collective.
        device_group: "nccl" for an NCCL group beside the gloo one, on a CUDA device.
    Collective: every rank of the generation.
    Raises: MembershipError if a rank does not come within the timeout, naming it; ValueError if
        the rank is outside the size, or NCCL is asked for without a CUDA device.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} is not one of {size}: ranks are 0 to {size - 1}")
    if device_group == "nccl" and device.type != "cuda":
        raise ValueError(f"an NCCL group needs a CUDA device, not {device}: ask for gloo")
    prefixed = PrefixStore(f"gen{generation}/", store)
    meet(prefixed, rank, size, timeout)
    try:
        cpu_group = create_gloo(prefixed, rank, size, device, timeout)
        device_side = (
            create_nccl(prefixed, rank, size, device, timeout)
            if device_group == "nccl"
            else cpu_group
        )
    except RuntimeError as error:
        raise MembershipError(
            f"rank {rank}: the groups of generation {generation} could not be made: {error}",
            rank=rank,
        ) from error
    return RankGroup(prefixed, rank, size, device, generation, timeout, cpu_group, device_side)


def find_device(coordinator: GroupCoordinator, expert_weights: ExpertWeights) -> torch.device:
    """Where weights are; where there are none, the group's device. Collective: none."""
    for layer in expert_weights:
        for tensor in layer:
            return tensor.device
    return coordinator.device if isinstance(coordinator, RankGroup) else torch.device("cpu")
