"""Weights on their way to the next generation, while the serving one serves from them."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch
from torch import Tensor

from equipoise.comm import create_eplb_communicator
from equipoise.comm.base import EplbCommunicator
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.elastic.shared_weights import SharedTensor
from equipoise.elastic.traffic import IN_HOST, RESTORE, Fetch, split_batches, split_runs
from equipoise.errors import TransferError
from equipoise.models.host_copies import CopyKey, HostCopies
from equipoise.transfer.checksum import sum_experts
from equipoise.transfer.mover import SAMPLE_EVERY, Verify

logger = logging.getLogger(__name__)

_BATCH_BYTES = {"cpu": 32 << 20, "cuda": 4 << 30}
_WORTH_A_WIRE = 64 << 20
"""Bytes of what all ranks have, from which on a wire of its own saves more than it takes."""
_LARGE, _TOUCHED = 1 << 20, 1 << 16
"""Bytes of a tensor that is worth touching, and those of it that are read then: where it was 32,
the process that gave them ended by a fault (nixl-cu13 1.4.0)."""
_ALIGNMENT = 256
"""Bytes; of tensors in memory for several of them, as torch's own allocator aligns."""
OVER_NCCL = ("pynccl", "torch_nccl")
"""Communicators."""

Weights = Sequence[Sequence[Sequence[Tensor]]]
"""Per set of layers, per layer, the tensors [S, ...] of a rank's slots."""

Restore = Callable[[int, int, int], Sequence[Tensor]]
"""Gives the tensors of an expert that no slot holds, by set, layer and expert."""


@dataclass
class Staged:
    """An expert that waits for the switch.

    Attributes:
        fetch: what it is.
        tensors: its, each without the first dimension.
    """

    fetch: Fetch
    tensors: list[Tensor]


@dataclass
class Haul:
    """What a rank has brought.

    Attributes:
        staged: experts for slots that are in use until the switch.
        received_bytes: from other ranks.
        restored: experts that were held nowhere.
        seconds: that it took, newcomers' shared weights included.
    """

    staged: list[Staged] = field(default_factory=list)
    received_bytes: int = 0
    restored: int = 0
    seconds: float = 0.0


class _Block:
    """Memory that experts land in, one behind the other; a wire gets to know it once.

    Args:
        fetches: that will land in it.
        like: per layer, the tensors [S, ...] of a rank's slots.
        device: where.
    """

    def __init__(
        self, fetches: Sequence[Fetch], like: Sequence[Sequence[Tensor]], device: torch.device
    ) -> None:
        most = sum(one.num_bytes + _ALIGNMENT * len(like[one.layer]) for one in fetches)
        self.memory = torch.empty(most, dtype=torch.uint8, device=device)
        self._used = 0

    def take(self, like: Tensor, count: int) -> Tensor:
        """[count, ...], as rows of `like` [S, ...] are."""
        num_bytes = count * like[0].numel() * like.element_size()
        first, self._used = self._used, self._used + -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
        return self.memory[first : first + num_bytes].view(like.dtype).view(count, *like.shape[1:])


class Bridge:
    """Wires between all participants of a change. Owner: the thread that builds.

    Args:
        group: of the participants.
        config: says the wire. One over NCCL is not taken beside a forward pass that uses NCCL
            too; nixl is then, where every rank has it, else torch_gloo.
        given: what this rank's slots hold, or will where they hold nothing yet.
        copies: what this rank keeps in host memory.
        shared: what newcomers get beside experts, as for `share`; none where none come.
    Collective: every participant.
    Raises: as `create_eplb_communicator`.
    """

    def __init__(
        self,
        group: RankGroup,
        config: EPLBConfig,
        given: Weights,
        copies: HostCopies,
        shared: Sequence[SharedTensor] = (),
    ) -> None:
        self._group = group
        name = config.communicator
        if name in OVER_NCCL:
            logger.info("a change of the membership moves weights beside NCCL: not by %s", name)
            name = "auto"
        self._given = given
        self._copies = copies
        self._shared = shared
        self._batch_bytes = _BATCH_BYTES.get(group.device.type, _BATCH_BYTES["cpu"])
        self._wires: list[EplbCommunicator] = []
        try:
            self._wires.extend(create_eplb_communicator(group, name, one) for one in given)
            if sum(one.num_bytes for one in shared) >= _WORTH_A_WIRE:
                known = [[row] for row in _list_rows(shared, group.device)]
                self._wires.append(create_eplb_communicator(group, name, known))
        except BaseException:
            self.close()
            raise

    def touch(self, fetches: Sequence[Fetch], givers: Sequence[int], takers: Sequence[int]) -> None:
        """Have wires reach all large memory that will be read: its first bytes take a while.

        Args:
            fetches: of all participants.
            givers: as for `share`.
            takers: as for `share`.
        Collective: every participant.
        Raises: TransferError if a peer fails.
        """
        landings: list[Tensor] = []
        for index, wire in enumerate(self._wires[: len(self._given)]):
            ways = {(f.layer, f.source, f.member) for f in fetches if f.set == index and f.travels}
            for layer, source, member in sorted(ways):
                for tensor in self._given[index][layer]:
                    # By what is the same on all ranks, which have different numbers of slots.
                    if tensor[0].nbytes >= _TOUCHED:
                        landings += self._touch(wire, tensor, source, member)
            wire.execute()
        if len(self._wires) > len(self._given):
            for taker, place, giver in _share_out(self._shared, givers, takers):
                one = self._shared[place]
                if one.tensor is not None and one.num_bytes >= _LARGE:
                    landings += self._touch(self._wires[-1], one.tensor, giver, taker)
            self._wires[-1].execute()

    def _touch(
        self, wire: EplbCommunicator, tensor: Tensor, source: int, member: int
    ) -> list[Tensor]:
        """Queue some bytes of a tensor that the source has; where they land."""
        count = _TOUCHED // tensor.element_size()
        if self._group.rank == source:
            wire.add_send(tensor.detach().reshape(-1)[:count], member)
        if self._group.rank != member:
            return []
        landing = tensor.new_empty(count)
        wire.add_recv(landing, source)
        return [landing]

    def haul(
        self,
        fetches: Sequence[Fetch],
        target: Weights,
        keeps: Sequence[bool],
        restore: Restore,
        check: Callable[[], None],
    ) -> Haul:
        """Bring every expert that this rank gets, and give what others get.

        Args:
            fetches: of all participants.
            target: this rank's tensors in the next generation; empty of a leaver.
            keeps: per set, whether those are in use already, so that experts are staged.
            restore: gives what nobody holds.
            check: called between exchanges; what it raises ends them.
        Collective: every participant.
        Raises: TransferError if a peer fails; whatever `restore` or `check` raise.
        """
        haul, rank = Haul(), self._group.rank
        for index, wire in enumerate(self._wires[: len(self._given)]):
            of_set = [fetch for fetch in fetches if fetch.set == index]
            travelling = [fetch for fetch in of_set if fetch.travels]
            mine = [fetch for fetch in travelling if fetch.member == rank]
            with ExitStack() as known:
                block = None
                if mine and keeps[index]:
                    block = _Block(mine, target[index], self._group.device)
                    known.enter_context(wire.register(block.memory))
                elif mine and target is not self._given:
                    for tensor in (tensor for layer in target[index] for tensor in layer):
                        known.enter_context(wire.register(tensor))
                for fetch, tensors in self._exchange(wire, travelling, target, keeps, check, block):
                    haul.received_bytes += fetch.num_bytes
                    _settle(fetch, tensors, target, keeps, haul)
            for fetch in of_set:
                if fetch.member == rank and not fetch.travels:
                    check()
                    self._bring_own(fetch, target, keeps, restore, haul)
        return haul

    def verify(self, fetches: Sequence[Fetch], target: Weights, haul: Haul, how: Verify) -> None:
        """Compare checksums of experts that have come with those of their sources.

        Args:
            fetches: as for `haul`, which has returned on every participant.
            target: as for `haul`.
            haul: what it returned.
            how: which of them.
        Collective: every participant.
        Raises: TransferError that names the expert which arrived damaged; MembershipError if a
            participant does not come.
        """
        every = {"off": 0, "sample": SAMPLE_EVERY, "all": 1}[how]
        chosen = [fetch for fetch in fetches if fetch.travels][::every] if every else []
        staged = {one.fetch: one.tensors for one in haul.staged}
        rank = self._group.rank
        sums = torch.zeros(len(chosen), dtype=torch.int64)
        for place, fetch in enumerate(chosen):
            if fetch.source == rank:
                sums[place] = _sum([tensor[0] for tensor in self._find_source([fetch])])
        self._group.all_reduce(sums)
        for place, fetch in enumerate(chosen):
            if fetch.member == rank:
                slots = target[fetch.set][fetch.layer]
                landed = staged.get(fetch) or [tensor[fetch.slots[0]] for tensor in slots]
                if _sum(landed) != int(sums[place]):
                    raise TransferError(
                        f"layer {fetch.layer}, expert {fetch.expert} arrived damaged",
                        rank=rank,
                        peer=fetch.source,
                        layer=fetch.layer,
                    )

    def back_up(
        self,
        fetches: Sequence[Fetch],
        target: Weights,
        restore: Restore,
        check: Callable[[], None],
    ) -> dict[CopyKey, list[Tensor]]:
        """Bring every expert that this rank keeps in host memory from now on; as `haul`.

        Args:
            fetches: of all participants, without slots.
            target: this rank's tensors in the next generation, which say what an expert is like.
            restore: as for `haul`.
            check: as for `haul`.
        Returns:
            Per expert its tensors on the CPU.
        Collective: every participant.
        Raises: as `haul`.
        """
        keeps = [True] * len(self._given)
        kept: dict[CopyKey, list[Tensor]] = {}
        haul = Haul()
        for index, wire in enumerate(self._wires[: len(keeps)]):
            of_set = [fetch for fetch in fetches if fetch.set == index]
            travelling = [fetch for fetch in of_set if fetch.travels]
            for fetch, tensors in self._exchange(wire, travelling, target, keeps, check):
                _keep(kept, fetch, tensors)
            for fetch in of_set:
                if fetch.member == self._group.rank and not fetch.travels:
                    self._bring_own(fetch, target, keeps, restore, haul)
        for one in haul.staged:
            _keep(kept, one.fetch, one.tensors)
        return kept

    def share(self, givers: Sequence[int], takers: Sequence[int], check: Callable[[], None]) -> int:
        """Bring newcomers what every rank has; those that serve share the giving.

        Args:
            givers: places of participants that have it.
            takers: places of those that do not.
            check: as for `haul`.
        Returns:
            Bytes that this rank has received.
        Collective: every participant.
        Raises: TransferError if a peer fails; what `check` raises.
        """
        # A wire of its own, if there is one: it knows these tensors.
        rank, wire, shared = self._group.rank, self._wires[-1], self._shared
        received = batched = 0
        jobs = list(_share_out(shared, givers, takers))
        for turn, (taker, place, giver) in enumerate(jobs):
            one = shared[place]
            # No element, nothing to send: its shape was told.
            if one.num_bytes:
                assert rank not in (giver, taker) or one.tensor is not None
                if rank == giver and one.tensor is not None:
                    wire.add_send(one.tensor, taker)
                if rank == taker and one.tensor is not None:
                    wire.add_recv(one.tensor, giver)
                    received += one.num_bytes
                batched += one.num_bytes
            if batched >= self._batch_bytes or turn == len(jobs) - 1:
                check()
                wire.execute()
                batched = 0
        return received

    def meet(self, busy_s: float) -> None:
        """Return when every participant has all that it gets, so that wires may be closed.

        Args:
            busy_s: seconds that others may still need.
        Collective: every participant.
        Raises: MembershipError that names who did not come.
        """
        self._group.all_gather(torch.zeros(1, dtype=torch.uint8), busy_s=busy_s)

    def interrupt(self) -> None:
        """Any thread: have exchanges fail soon."""
        for wire in self._wires:
            wire.interrupt()

    def close(self) -> None:
        """Let go of the wires and the group; twice is fine. Collective: none."""
        for wire in self._wires:
            wire.close()
        self._group.close()

    def _exchange(
        self,
        wire: EplbCommunicator,
        fetches: Sequence[Fetch],
        target: Weights,
        keeps: Sequence[bool],
        check: Callable[[], None],
        block: _Block | None = None,
    ) -> Iterator[tuple[Fetch, list[Tensor]]]:
        """Carry experts, batch by batch, some while others settle; gives those that have come."""
        under_way: deque[list[tuple[Fetch, list[Tensor]]]] = deque()
        for batch in split_batches(fetches, self._batch_bytes):
            check()
            under_way.append(self._queue(wire, batch, target, keeps, block))
            wire.start()
            if len(under_way) > wire.num_ahead:
                wire.finish()
                yield from under_way.popleft()
        for landed in under_way:
            wire.finish()
            yield from landed

    def _queue(
        self,
        wire: EplbCommunicator,
        batch: Sequence[Fetch],
        target: Weights,
        keeps: Sequence[bool],
        block: _Block | None,
    ) -> list[tuple[Fetch, list[Tensor]]]:
        rank = self._group.rank
        landing = []
        for run in split_runs(batch):
            if run[0].source == rank:
                for tensor in self._find_source(run):
                    wire.add_send(tensor, run[0].member)
            if run[0].member == rank:
                tensors = _find_landing(run, target, keeps, block)
                for tensor in tensors:
                    wire.add_recv(tensor, run[0].source)
                for place, fetch in enumerate(run):
                    landing.append((fetch, [tensor[place] for tensor in tensors]))
        return landing

    def _find_source(self, run: Sequence[Fetch]) -> list[Tensor]:
        """The tensors [n, ...] of experts that this rank gives, on its device."""
        first = run[0]
        if first.held_in == IN_HOST:
            kept = self._copies[CopyKey(first.set, first.layer, first.expert)]
            return [tensor[None].to(self._group.device) for tensor in kept]
        slots = slice(first.held_in, first.held_in + len(run))
        return [tensor[slots] for tensor in self._given[first.set][first.layer]]

    def _bring_own(
        self, fetch: Fetch, target: Weights, keeps: Sequence[bool], restore: Restore, haul: Haul
    ) -> None:
        if fetch.source == RESTORE:
            source = restore(fetch.set, fetch.layer, fetch.expert)
            haul.restored += 1
        else:
            source = [tensor[0] for tensor in self._find_source([fetch])]
        tensors = [tensor[0] for tensor in _find_landing([fetch], target, keeps)]
        for into, tensor in zip(tensors, source, strict=True):
            into.copy_(tensor)
        _settle(fetch, tensors, target, keeps, haul)


def _share_out(
    shared: Sequence[SharedTensor], givers: Sequence[int], takers: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """Who takes which of what all ranks have, and who gives it."""
    for taker in takers:
        for place in range(len(shared)):
            yield taker, place, givers[(place + taker) % len(givers)]


def _list_rows(shared: Sequence[SharedTensor], device: torch.device) -> list[Tensor]:
    """Tensors that a wire may read from and write to as they are, each as one row."""
    rows = []
    ends = 0
    large = [one.tensor for one in shared if one.num_bytes >= _LARGE]
    held = [tensor.detach() for tensor in large if tensor is not None]
    for tensor in sorted(held, key=Tensor.data_ptr):
        if tensor.is_contiguous() and tensor.device == device and tensor.data_ptr() >= ends:
            rows.append(tensor.view(1, -1))
            ends = tensor.data_ptr() + tensor.nbytes
    return rows


def _sum(tensors: Sequence[Tensor]) -> int:
    return int(sum_experts(view_bytes(tensor.contiguous())[None] for tensor in tensors))


def _keep(kept: dict[CopyKey, list[Tensor]], fetch: Fetch, tensors: list[Tensor]) -> None:
    key = CopyKey(fetch.set, fetch.layer, fetch.expert)
    kept[key] = [tensor.to("cpu") for tensor in tensors]


def _find_landing(
    run: Sequence[Fetch], target: Weights, keeps: Sequence[bool], block: _Block | None = None
) -> list[Tensor]:
    """Memory [n, ...] for experts: their first slots where nobody uses them yet, else other."""
    first, count = run[0], len(run)
    slots = target[first.set][first.layer]
    if block is not None:
        return [block.take(tensor, count) for tensor in slots]
    if keeps[first.set] or not first.slots:
        return [tensor.new_empty(count, *tensor.shape[1:]) for tensor in slots]
    return [tensor[first.slots[0] : first.slots[0] + count] for tensor in slots]


def _settle(
    fetch: Fetch, tensors: list[Tensor], target: Weights, keeps: Sequence[bool], haul: Haul
) -> None:
    """An expert has come: keep it for the switch, or fill its other slots."""
    if keeps[fetch.set]:
        haul.staged.append(Staged(fetch, tensors))
        return
    for slots, tensor in zip(target[fetch.set][fetch.layer], tensors, strict=True):
        for slot in fetch.slots[1:]:
            slots[slot].copy_(tensor)
