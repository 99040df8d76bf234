"""The one NIXL-EP buffer of a process, and the ranks that it is connected to."""

from __future__ import annotations

import contextlib
import logging
import secrets
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.dispatch.nixl_ep.kernels import (
    HIDDEN_SIZES,
    NODE_RANKS,
    TOKEN_MULTIPLE,
    Buffer,
    Kernels,
    load_nixl_ep,
)
from equipoise.dispatch.nixl_ep.metadata import GenerationMetadata
from equipoise.dispatch.nixl_ep.watchdog import end_process_after
from equipoise.dispatch.rows import maybe_roundup_layer_hidden_size
from equipoise.errors import ConfigError, MembershipError, TransferError

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_NOBODY = -1


@dataclass(frozen=True)
class BufferShape:
    """What one dispatch may hold.

    Attributes:
        max_tokens: most tokens of a rank.
        hidden_size: padded.
        slots_per_rank: S.
    """

    max_tokens: int
    hidden_size: int
    slots_per_rank: int


class NixlEPAll2AllManager:
    """Owns the buffer, which outlives generations: ranks are connected and left out, one by one.

    Every rank has an index in the buffer, its own as long as it lives; a generation is a tuple of
    indices, by rank. A rank is absent, then staged (connected, but masked: nothing is sent to it
    or waited for), then a member (unmasked), then staged again, then absent.

    Owner: any thread; a lock stands before the state and the buffer. But `disconnect`, and `stage`
    with a NIXL-EP that does not allow it beside dispatches, wait for the device and for peers: the
    thread that dispatches calls them, between two steps.

    Args:
        max_ranks: most ranks at a time, leavers that are still connected included.
        device: where tokens are.
        timeout: longest wait for a peer, in a kernel, and for the lock.
        index: this rank's; None to be given one by `join`.
        kernels: what makes the buffer; None for NIXL-EP.
    Raises: CommunicatorUnavailable if NIXL-EP does not work here; ConfigError if max_ranks is
        below 1, or does not hold the index.
    """

    def __init__(
        self,
        max_ranks: int,
        device: torch.device,
        timeout: timedelta,
        *,
        index: int | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        if max_ranks < 1:
            raise ConfigError(f"max_ranks must be at least 1, got {max_ranks}")
        self.max_ranks = max_ranks
        self.device = device
        self.timeout = timeout
        self._kernels = load_nixl_ep() if kernels is None else kernels
        # NIXL-EP's own arithmetic of nodes wants it so.
        self._capacity = max_ranks
        if max_ranks >= NODE_RANKS:
            self._capacity = -(-max_ranks // NODE_RANKS) * NODE_RANKS
        self._lock = threading.RLock()
        self._index: int | None = None
        self._buffer: Buffer | None = None
        self._held: BufferShape | None = None
        self._held_bytes = 0
        self._handles: dict[BufferShape, BufferShape] = {}
        self._connected: set[int] = set()
        self._members: tuple[int, ...] = ()
        self._is_closed = False
        if index is not None:
            self._take_index(index)

    @property
    def index(self) -> int:
        """This rank's. Raises: MembershipError before it has one."""
        if self._index is None:
            raise MembershipError("this rank has no index in the NIXL-EP buffer yet: join first")
        return self._index

    @property
    def index_dtype(self) -> torch.dtype:
        """Of slot ids, as the kernels want them."""
        return self._kernels.index_dtype

    @property
    def connects_beside_dispatch(self) -> bool:
        """Whether `stage` may go on while the generation that serves dispatches."""
        return self._kernels.connects_beside_dispatch

    @property
    def members(self) -> tuple[int, ...]:
        """Indices of the generation that was committed last, by rank."""
        return self._members

    @property
    def connected(self) -> frozenset[int]:
        """Indices of other ranks that are connected, members or not."""
        return frozenset(self._connected)

    def count_bytes(self, shape: BufferShape) -> int:
        """Device memory that a buffer of a shape takes for all ranks that there may be."""
        return self._kernels.count_bytes(
            shape.max_tokens,
            shape.hidden_size,
            self._capacity,
            self._capacity * shape.slots_per_rank,
        )

    def join(self, group: RankGroup) -> tuple[int, ...]:
        """Agree on the indices of a generation; who has none gets the lowest that is free.

        Args:
            group: of the generation.
        Returns:
            By rank.
        Collective: every rank of the group.
        Raises: MembershipError if there are not enough, or a rank does not come in time.
        """
        own = torch.full((1 + self.max_ranks,), 0)
        own[0] = _NOBODY if self._index is None else self._index
        for index in self._connected:
            own[1 + index] = 1
        said = group.all_gather(own)
        indices = [int(each[0]) for each in said]
        in_use = torch.stack(said)[:, 1:].any(0).tolist()
        free = [i for i in range(self.max_ranks) if not in_use[i] and i not in indices]
        num_new = indices.count(_NOBODY)
        if num_new > len(free):
            raise MembershipError(
                f"a NIXL-EP buffer sized for {self.max_ranks} ranks has {len(free)} places for "
                f"{num_new} new ones: start with max_ranks of at least "
                f"{self.max_ranks + num_new - len(free)}",
                rank=group.rank,
            )
        given = iter(free)
        members = tuple(next(given) if index == _NOBODY else index for index in indices)
        if len(set(members)) < len(members):
            raise MembershipError(f"two ranks claim one index of the NIXL-EP buffer: {members}")
        with self._hold():
            if self._index is None:
                self._take_index(members[group.rank])
        return members

    def get_handle(
        self,
        *,
        max_num_tokens_per_dp_rank: int,
        token_hidden_size: int,
        num_experts_per_rank: int,
    ) -> BufferShape:
        """What dispatches of this shape work with; the first call takes the buffer's memory.

        Args:
            max_num_tokens_per_dp_rank: most tokens of a rank.
            token_hidden_size: D; padded where the kernels need it.
            num_experts_per_rank: S, slots of each rank.
        Returns:
            The shape, rounded up; the same object when asked for the same again.
        Collective: none.
        Raises: ConfigError if the kernels do not have it, or the buffer that there is cannot hold
            it; TransferError if the lock is not free in time.
        """
        if max_num_tokens_per_dp_rank < 1 or num_experts_per_rank < 1:
            raise ConfigError(
                "a NIXL-EP buffer holds at least one token and one slot per rank, not "
                f"{max_num_tokens_per_dp_rank} and {num_experts_per_rank}"
            )
        asked = BufferShape(
            -(-max_num_tokens_per_dp_rank // TOKEN_MULTIPLE) * TOKEN_MULTIPLE,
            maybe_roundup_layer_hidden_size(token_hidden_size, HIDDEN_SIZES),
            num_experts_per_rank,
        )
        with self._hold():
            if asked not in self._handles:
                self._make_room(asked)
                self._handles[asked] = asked
            return self._handles[asked]

    def stage(self, group: RankGroup, members: Sequence[int]) -> None:
        """Connect the ranks of a generation that are not connected yet, and leave them masked.

        Args:
            group: of the generation; metadata go through its store.
            members: its indices, by rank.
        Collective: every rank of the generation, one thread of each at a time; between the same two
            steps of those that serve, unless it `connects_beside_dispatch`.
        Raises: MembershipError if an index is not of this buffer, or a rank does not come in time;
            then nothing was connected.
        """
        with self._hold():
            buffer = self._opened()
            self._check_members(members)
        if self.connects_beside_dispatch:
            self._stage(buffer, group, members)
            return
        with self._hold():
            self._synchronize()
            self._stage(buffer, group, members)

    def _stage(self, buffer: Buffer, group: RankGroup, members: Sequence[int]) -> None:
        # Rank 0's word sets this round's keys apart: another buffer may have left its own here.
        said = group.all_gather(torch.tensor([secrets.randbits(62)]))
        fresh = sorted(set(members) - self._connected - {self.index})
        if not fresh:
            return
        metadata = GenerationMetadata(
            group.store, f"nixl_ep/{int(said[0]):x}", self.index, self.timeout
        )
        self._connect(buffer, fresh, metadata)
        with self._hold():
            self._connected.update(fresh)

    def commit(self, members: Sequence[int]) -> None:
        """Unmask the ranks of a generation, and mask all others.

        Args:
            members: its indices, by rank; all are staged.
        Collective: none; every rank of the generation between the same two steps.
        Raises: MembershipError if one is not connected.
        """
        with self._hold():
            buffer = self._opened()
            self._check_members(members)
            missing = sorted(set(members) - self._connected - {self.index})
            if missing:
                raise MembershipError(
                    f"indices {missing} of the NIXL-EP buffer are not connected: stage them first"
                )
            for index in sorted(self._connected):
                buffer.update_mask_buffer(index, index not in members)
            self._members = tuple(members)

    def disconnect(self, indices: Sequence[int]) -> None:
        """Forget ranks that have left; their indices are free then.

        Args:
            indices: no members; those that are not connected are passed over.
        Collective: none; between two steps. Waits for the device.
        Raises: MembershipError if one is a member.
        """
        with self._hold():
            buffer = self._opened()
            serving = sorted(set(indices) & set(self._members))
            if serving:
                raise MembershipError(
                    f"indices {serving} of the NIXL-EP buffer are members of the generation that "
                    "serves: commit one without them first"
                )
            gone = sorted(set(indices) & self._connected)
            if gone:
                self._synchronize()
                buffer.disconnect_ranks(gone)
                self._connected -= set(gone)

    def find_lost(self) -> list[int]:
        """Ranks of the committed generation that the kernels have given up waiting for.

        Collective: none; waits for the device.
        """
        with self._hold():
            buffer = self._opened()
            is_masked = torch.zeros(self._capacity, dtype=torch.int32, device=self.device)
            buffer.query_mask_buffer(is_masked)
            masked = is_masked.tolist()
            return [rank for rank, index in enumerate(self._members) if masked[index]]

    def use(self, members: tuple[int, ...], work: Callable[[Buffer], _T]) -> _T:
        """Let work launch kernels, while nobody changes what they run on.

        Args:
            members: of the generation that it belongs to.
            work: called with the buffer; returns without waiting for the device.
        Collective: as the work.
        Raises: MembershipError if another generation was committed meanwhile.
        """
        # Called twice a layer: no more than it must do.
        if not self._lock.acquire(blocking=False):
            self._wait_for_lock()
        try:
            buffer = self._buffer
            if buffer is None or members != self._members:
                self._opened()
                raise MembershipError(
                    f"the NIXL-EP buffer serves the indices {self._members}, not {members}: "
                    "this generation is over, or was not committed"
                )
            return work(buffer)
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def lend(self) -> Iterator[Buffer]:
        """The buffer itself, to measure what stands around it.

        Collective: none; nobody else has it meanwhile.
        """
        with self._hold():
            yield self._opened()

    def close(self) -> None:
        """Release the buffer; twice is fine. Peers are told nothing.

        Collective: none; waits for the device.
        """
        with self._hold():
            if self._is_closed:
                return
            self._is_closed = True
            buffer, self._buffer = self._buffer, None
            if buffer is not None:
                if self._connected:
                    buffer.disconnect_ranks(sorted(self._connected))
                buffer.destroy()
            self._connected.clear()
            self._members = ()

    def _connect(self, buffer: Buffer, fresh: list[int], metadata: GenerationMetadata) -> None:
        seconds = self.timeout.total_seconds()
        # The metadata's own deadline comes first; what is behind it is a word of each peer's.
        last_words = (
            f"equipoise: index {self.index} of the NIXL-EP buffer was not connected to {fresh} "
            f"within {2 * seconds:.1f} s: one of them died meanwhile; this process ends, as "
            "NIXL-EP would wait for good"
        )
        buffer.set_tcp_store_group(metadata)
        try:
            with end_process_after(2 * seconds, last_words):
                buffer.connect_ranks(fresh, activate=False)
        except RuntimeError as error:
            # It takes those for connected already that it could not reach.
            with self._hold(), contextlib.suppress(RuntimeError):
                buffer.disconnect_ranks(fresh)
            raise MembershipError(
                f"index {self.index} of the NIXL-EP buffer cannot be connected to {fresh}: {error}"
            ) from error
        finally:
            buffer.set_tcp_store_group(None)

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        self._wait_for_lock()
        try:
            yield
        finally:
            self._lock.release()

    def _wait_for_lock(self) -> None:
        seconds = self.timeout.total_seconds()
        if not self._lock.acquire(timeout=seconds):
            raise TransferError(
                f"the NIXL-EP buffer was not free within {seconds:.1f} s: another thread connects "
                "or disconnects ranks"
            )

    def _take_index(self, index: int) -> None:
        if not 0 <= index < self.max_ranks:
            raise ConfigError(
                f"index {index} does not fit a NIXL-EP buffer sized for {self.max_ranks} ranks: "
                f"start with max_ranks of at least {index + 1}"
            )
        self._index = index

    def _opened(self) -> Buffer:
        if self._is_closed:
            raise MembershipError("the NIXL-EP buffer of this process was closed")
        if self._buffer is None:
            raise MembershipError("there is no NIXL-EP buffer yet: get_handle comes first")
        return self._buffer

    def _make_room(self, asked: BufferShape) -> None:
        needed = self.count_bytes(asked)
        if self._is_closed:
            self._opened()
        if self._held is None:
            logger.warning(
                "NIXL-EP takes %.2f GB of device memory: %d tokens x %d of each of %d ranks, "
                "%d slots each",
                needed / 1e9,
                asked.max_tokens,
                asked.hidden_size,
                self._capacity,
                asked.slots_per_rank,
            )
            buffer = self._kernels.open(self.index, self.timeout)
            try:
                buffer.update_memory_buffers(
                    num_ranks=self._capacity,
                    num_experts_per_rank=asked.slots_per_rank,
                    num_rdma_bytes=needed,
                )
            except BaseException:
                buffer.destroy()
                raise
            self._buffer, self._held, self._held_bytes = buffer, asked, needed
            return
        held = self._held
        if asked.slots_per_rank != held.slots_per_rank:
            raise ConfigError(
                f"the NIXL-EP buffer of this process is for {held.slots_per_rank} slots per rank, "
                f"not {asked.slots_per_rank}: it is made once"
            )
        if needed > self._held_bytes:
            raise ConfigError(
                f"{asked.max_tokens} tokens x {asked.hidden_size} need {needed:,} bytes of the "
                f"NIXL-EP buffer, which has {self._held_bytes:,} ({held.max_tokens} tokens x "
                f"{held.hidden_size}): ask for the largest first"
            )

    def _check_members(self, members: Sequence[int]) -> None:
        for index in members:
            if not 0 <= index < self.max_ranks:
                raise MembershipError(
                    f"index {index} does not fit a NIXL-EP buffer sized for {self.max_ranks} "
                    f"ranks: start with max_ranks of at least {index + 1}"
                )
        if self.index not in members or len(set(members)) < len(members):
            raise MembershipError(
                f"members {tuple(members)} of the NIXL-EP buffer must differ, and hold this "
                f"rank's own index {self.index}"
            )

    def _synchronize(self) -> None:
        """Kernels in flight use what connecting and disconnecting takes down."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def wire_slots(
    members: Sequence[int], slots_per_rank: int, device: torch.device, dtype: torch.dtype
) -> Tensor:
    """What slot ids of a generation become in the buffer: [P + 1], the last -1 for -1."""
    index_R = torch.tensor(members, device=device)
    slot_RS = index_R[:, None] * slots_per_rank + torch.arange(slots_per_rank, device=device)
    return torch.cat((slot_RS.flatten(), slot_RS.new_full((1,), -1))).to(dtype)
