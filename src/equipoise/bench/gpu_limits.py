"""What a wire between GPUs cannot be faster than: bare messages and bare READs."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.comm.nixl.agent import Agent, Read
from equipoise.comm.parcels import ExpertRows
from equipoise.comm.spans import Spans, align, span_of
from equipoise.comm.weight_table import WeightTable
from equipoise.errors import TransferError
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.transfer.staging import ChunkShare

_DEADLINE_S = 60.0


def send_one_message(
    group: RankGroup, source: Tensor, into: Tensor, plan: TransferPlan, expert_bytes: int
) -> None:
    """One NCCL message per pair of ranks, of all the bytes that it exchanges.

    Args:
        group: whose device group has NCCL.
        source: [bytes] uint8, at least what this rank sends.
        into: [bytes] uint8, at least what it receives.
        plan: whose bytes.
        expert_bytes: of each row of the plan.
    Collective: every rank of the group.
    """
    nccl = group.device_group
    size = group.size
    pairs = np.bincount(plan.src_rank * size + plan.dst_rank, minlength=size * size)
    sent, received = (
        pairs.reshape(size, size)[group.rank],
        pairs.reshape(size, size)[:, group.rank],
    )
    nccl._start_coalescing(group.device)
    for post, memory, counts in ((nccl.recv, into, received), (nccl.send, source, sent)):
        taken = 0
        for peer in range(size):
            num_bytes = int(counts[peer]) * expert_bytes
            if peer != group.rank and num_bytes:
                post([memory[taken : taken + num_bytes]], peer, 0)
                taken += num_bytes
    nccl._end_coalescing(group.device).wait()
    torch.cuda.current_stream(group.device).synchronize()


@dataclass(frozen=True)
class _Peer:
    name: str
    device_id: int
    memory: int


class BareReads:
    """READs with nothing around them: no announcement, no confirmation, no copy.

    Args:
        group: of the ranks.
        memory: [bytes] uint8, this rank's weights, laid out alike on every rank.
        rows: per layer [S, row bytes] uint8, in `memory`.
        landing: [bytes] uint8, what READs fill.
    Collective: every rank of the group.
    """

    def __init__(
        self,
        group: RankGroup,
        memory: Tensor,
        rows: list[list[Tensor]],
        landing: Tensor,
    ) -> None:
        self._group = group
        self._table = WeightTable(rows)
        self._base = memory.data_ptr()
        self._landing = landing
        self._agent = Agent(group.device)
        self._agent.register(Spans.of([span_of(memory), span_of(landing)]))
        self._peers = self._meet()

    def read_all(self, plan: TransferPlan) -> None:
        """Everything at once, one READ for each peer, to where it stays."""
        mine = np.flatnonzero((plan.dst_rank == self._group.rank) & ~plan.is_local)
        self._finish(list(self._post(plan, mine, 0)))

    def read_chunks(self, plan: TransferPlan, shares: Sequence[ChunkShare]) -> None:
        """Chunk after chunk into two halves of the landing in turns, two chunks under way."""
        half = max((share.remote_bytes for share in shares), default=0)
        pending: list[list[Read]] = []
        for number, share in enumerate(shares):
            if len(pending) == 2:
                self._finish(pending.pop(0))
            pending.append(list(self._post(plan, share.received, number % 2 * half)))
        for reads in pending:
            self._finish(reads)

    def close(self) -> None:
        """Let NIXL go. Collective: none."""
        self._agent.close()

    def _post(
        self, plan: TransferPlan, rows: np.ndarray[tuple[int], np.dtype[np.int64]], offset: int
    ) -> Iterator[Read]:
        slots_per_rank = plan.old.topology.slots_per_rank
        sources = plan.src_rank[rows]
        for source in np.unique(sources):
            ours = rows[sources == source]
            slots = plan.src_slot[ours] % slots_per_rank
            spans = ExpertRows.of(self._table, plan.layer[ours], slots).pieces
            peer = self._peers[int(source)]
            remote = Spans(spans.address - self._base + peer.memory, spans.num_bytes)
            total = spans.total_bytes
            here = Spans.of([(self._landing.data_ptr() + offset, total)])
            offset += total
            local, there = align(here, remote)
            read = self._agent.prepare_read(peer.name, local, there, peer.device_id, b"", ())
            self._agent.post(read)
            yield read

    def _finish(self, reads: Sequence[Read]) -> None:
        deadline = time.monotonic() + _DEADLINE_S
        for read in reads:
            while not self._agent.is_complete(read):
                if time.monotonic() > deadline:
                    raise TransferError("a bare READ did not end", rank=self._group.rank)
            self._agent.release(read)

    def _meet(self) -> dict[int, _Peer]:
        word = {
            "agent": base64.b64encode(self._agent.describe()).decode(),
            "device": self._agent.device_id,
            "memory": self._base,
        }
        data = json.dumps(word).encode()
        size = torch.tensor([len(data)])
        self._group.all_reduce(size, "max")
        padded = torch.frombuffer(bytearray(data.ljust(int(size))), dtype=torch.uint8)
        peers = {}
        for rank, told in enumerate(self._group.all_gather(padded)):
            if rank != self._group.rank:
                theirs = json.loads(told.numpy().tobytes())
                name = self._agent.connect(base64.b64decode(theirs["agent"]))
                peers[rank] = _Peer(name, theirs["device"], theirs["memory"])
        return peers
