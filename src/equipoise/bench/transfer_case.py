"""The case that wires are compared on: which experts move between which ranks, and their bytes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from equipoise.bench.option_checks import check_least, check_positive
from equipoise.comm.base import ExpertMoves
from equipoise.comm.registry import check_name
from equipoise.errors import ConfigError, TransferError
from equipoise.placement import Placement, place_in_order
from equipoise.plan.transfer_plan import TransferPlan, make_plan
from equipoise.topology import Topology
from equipoise.transfer.staging import ChunkShare, share_chunks

QWEN3_30B_EXPERT_BYTES = 4_718_592
"""One expert of Qwen3-30B-A3B in FP8: three matrices of 2048 x 768."""

_STRIDE = 64
"""Every expert is a window of the same random bytes, so much behind the one before it."""


@dataclass(frozen=True)
class TransferSpec:
    """What is measured; the same on every rank.

    Attributes:
        num_ranks: R, processes.
        num_layers: L.
        slots_per_rank: S; every slot holds another expert.
        expert_bytes: of one expert of one layer: two tensors, of two thirds and one third.
        backends: names of communicators; empty for all that work here.
        num_rounds: how often each is measured.
        seed: of the placement that is moved to, and of the experts' bytes.
        timeout_s: longest wait for another rank.
    Raises: ConfigError.
    """

    num_ranks: int = 4
    num_layers: int = 10
    slots_per_rank: int = 8
    expert_bytes: int = QWEN3_30B_EXPERT_BYTES
    backends: tuple[str, ...] = ()
    num_rounds: int = 25
    seed: int = 0
    timeout_s: float = 60.0

    def __post_init__(self) -> None:
        check_least(
            ("--ranks", self.num_ranks, 2),
            ("--layers", self.num_layers, 1),
            ("--slots", self.slots_per_rank, 1),
            ("--expert-bytes", self.expert_bytes, 1),
            ("--rounds", self.num_rounds, 1),
            ("--seed", self.seed, 0),
        )
        check_positive(("--timeout", self.timeout_s))
        for backend in self.backends:
            if backend == "auto":
                raise ConfigError("--backend auto is no wire of its own: name one, or leave it out")
            check_name(backend)


@dataclass(frozen=True, eq=False)
class TransferCase:
    """What moves, as every rank knows it.

    Attributes:
        spec: what it was made from.
        plan: from experts in order to all of them dealt anew in every layer.
    """

    spec: TransferSpec
    plan: TransferPlan

    @property
    def received_bytes(self) -> list[int]:
        """What each rank receives from others."""
        received = self.plan.dst_rank[~self.plan.is_local]
        experts = np.bincount(received, minlength=self.spec.num_ranks)
        return [int(count) * self.spec.expert_bytes for count in experts]

    @property
    def row_bytes(self) -> list[int]:
        """Of one slot of each tensor of a layer."""
        first = -(-2 * self.spec.expert_bytes // 3)
        return [size for size in (first, self.spec.expert_bytes - first) if size]


def make_case(spec: TransferSpec) -> TransferCase:
    """Deal the experts of every layer to the slots anew, and plan how they get there.

    Collective: none; the same on every rank.
    Raises: ConfigError if no expert changes its rank.
    """
    topology = Topology(spec.num_ranks, spec.slots_per_rank)
    old = place_in_order(spec.num_layers, topology.num_slots, topology)
    table = np.random.default_rng(spec.seed).permuted(old.slot_to_expert, axis=1)
    plan = make_plan(old, Placement(table, topology.num_slots, topology))
    if not plan.num_moves:
        raise ConfigError(
            f"with --seed {spec.seed} no expert changes its rank: take another, or more --layers"
        )
    return TransferCase(spec, plan)


class RankShare:
    """One rank's part of a case: its weights, what it sends, and where what it receives lands.

    Attributes:
        memory: [bytes] uint8, all of this rank's weights.
        weights: per layer the tensors [S, row bytes] uint8 in it, filled as the old placement says.
        into: [received bytes] uint8.
        sent_to: bytes for each peer that gets some.
        received_from: bytes from each peer that sends some.

    Args:
        case: the same on every rank.
        rank: whose part.
    """

    def __init__(self, case: TransferCase, rank: int) -> None:
        self._case = case
        self._rank = rank
        spec, plan = case.spec, case.plan
        expert_bytes = np.full(spec.num_layers, spec.expert_bytes)
        (self._share,) = share_chunks(plan, rank, [np.arange(spec.num_layers)], expert_bytes)
        self.into = torch.zeros(self._share.remote_bytes, dtype=torch.uint8)
        self.sent_to = self._count_bytes(plan.dst_rank[self._share.sent])
        self.received_from = self._count_bytes(plan.src_rank[self._share.received])
        num_experts = spec.num_layers * case.plan.old.num_experts
        generator = torch.Generator().manual_seed(spec.seed)
        num_bytes = spec.expert_bytes + num_experts * _STRIDE
        self._noise = torch.randint(256, (num_bytes,), dtype=torch.uint8, generator=generator)
        tensor_bytes = [spec.slots_per_rank * size for size in case.row_bytes] * spec.num_layers
        self.memory = torch.empty(sum(tensor_bytes), dtype=torch.uint8)
        tensors = [
            part.view(spec.slots_per_rank, -1)
            for part in self.memory.split_with_sizes(tensor_bytes)
        ]
        each = len(case.row_bytes)
        self.weights = [tensors[k * each : (k + 1) * each] for k in range(spec.num_layers)]
        first_slot = rank * spec.slots_per_rank
        for layer, of_layer in enumerate(self.weights):
            for slot in range(spec.slots_per_rank):
                expert = int(plan.old.slot_to_expert[layer, first_slot + slot])
                for tensor, row in zip(of_layer, self._find_expert(layer, expert), strict=True):
                    tensor[slot].copy_(row)

    def make_moves(self) -> ExpertMoves:
        """What a communicator is given."""
        plan, share = self._case.plan, self._share
        return ExpertMoves(
            send_rank=plan.dst_rank[share.sent],
            send_layer=plan.layer[share.sent],
            send_slot=plan.src_slot[share.sent] % self._case.spec.slots_per_rank,
            recv_rank=plan.src_rank[share.received],
            recv_layer=plan.layer[share.received],
            into=self.into,
        )

    def check(self, backend: str) -> None:
        """Compare what has landed, byte by byte, with what the plan says.

        Args:
            backend: whom to blame.
        Collective: none.
        Raises: TransferError that names the first expert that is not what it should be.
        """
        for layer, expert, source, views in self._list_landings():
            expected = self._find_expert(layer, expert)
            pairs = zip(views, expected, strict=True)
            # Four times as fast as torch.equal.
            if not all(np.array_equal(got.numpy(), sent.numpy()) for got, sent in pairs):
                raise TransferError(
                    f"rank {self._rank}, {backend}: layer {layer}, expert {expert} from rank "
                    f"{source} arrived with wrong bytes",
                    rank=self._rank,
                    peer=source,
                    layer=layer,
                )

    def _list_landings(self) -> Iterator[tuple[int, int, int, list[Tensor]]]:
        """Layer, expert, source and tensors of each expert that has come."""
        share: ChunkShare = self._share
        for block in share.staged.list_blocks():
            if block.source == self._rank:
                continue
            views = block.find_views(self.into, self._case.row_bytes)
            for index, row in enumerate(block.rows):
                expert = int(self._case.plan.expert[row])
                yield block.layer, expert, block.source, [view[index] for view in views]

    def _find_expert(self, layer: int, expert: int) -> list[Tensor]:
        """The bytes that this expert has, wherever it is; no two experts have the same."""
        start = (layer * self._case.plan.old.num_experts + expert) * _STRIDE
        whole = self._noise[start : start + self._case.spec.expert_bytes]
        return list(whole.split_with_sizes(self._case.row_bytes))

    def _count_bytes(self, peers: np.ndarray[tuple[int], np.dtype[np.int64]]) -> dict[int, int]:
        numbers, counts = np.unique(peers, return_counts=True)
        each = self._case.spec.expert_bytes
        return {int(n): int(c) * each for n, c in zip(numbers, counts, strict=True)}
