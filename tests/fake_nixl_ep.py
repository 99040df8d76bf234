"""What stands for NIXL-EP where there is no GPU: its states, its refusals, and its layout.

Ranks are threads of one process. As in NIXL-EP 1.4.0, a buffer takes its memory once, is connected
by both sides with metadata of both, leaves out ranks that are masked, masks a rank itself that does
not answer in time, and refuses by RuntimeError what the library asserts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor

from equipoise.dispatch.nixl_ep.kernels import HIDDEN_SIZES, MAX_TOP_K

BLOCK = 128
LARGEST_FP8 = 448.0


def expect(condition: bool, what: str) -> None:
    if not condition:
        raise RuntimeError(f"Assertion failed: {what}")


class FakeFabric:
    """Memory that all buffers see. Owner: all ranks' threads; the condition guards it."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.messages: dict[tuple[str, int, int, int], Any] = {}
        self.buffers: list[FakeBuffer] = []

    def put(self, kind: str, source: int, target: int, number: int, message: Any) -> None:
        with self.changed:
            self.messages[kind, source, target, number] = message
            self.changed.notify_all()

    def take(self, kind: str, source: int, target: int, number: int, seconds: float) -> Any:
        """None if it does not come in time."""
        key = (kind, source, target, number)
        with self.changed:
            self.changed.wait_for(lambda: key in self.messages, seconds)
            return self.messages.pop(key, None)


class FakeKernels:
    """Makes fake buffers."""

    index_dtype = torch.int64
    connects_beside_dispatch = True

    def __init__(self, fabric: FakeFabric) -> None:
        self.fabric = fabric

    def count_bytes(self, max_tokens: int, hidden_size: int, num_ranks: int, slots: int) -> int:
        return 4 * slots * max_tokens * hidden_size

    def open(self, rank: int, timeout: timedelta) -> FakeBuffer:
        buffer = FakeBuffer(self.fabric, rank, timeout.total_seconds())
        self.fabric.buffers.append(buffer)
        return buffer


class FakeBuffer:
    """One rank's."""

    def __init__(self, fabric: FakeFabric, rank: int, seconds: float) -> None:
        self.fabric = fabric
        self.rank = rank
        self.seconds = seconds
        self.num_ranks = self.num_slots = self.num_bytes = 0
        self.connected: set[int] = set()
        self.active: set[int] = set()
        self.masked: set[int] = set()
        self.store: Any = None
        self.prefix = ""
        self.is_destroyed = False
        self.refuses = ""
        self.calls: list[str] = []
        # Kernels that send clear the other half of the buffer: what was not received is lost.
        self.on_its_way: list[int] = []
        self.num_sends = 0
        self.sent: dict[tuple[str, int], int] = {}
        self.received: dict[tuple[str, int], int] = {}

    def update_memory_buffers(
        self, num_ranks: int, num_experts_per_rank: int, num_rdma_bytes: int
    ) -> None:
        if self.num_ranks:
            raise RuntimeError("Multiple calls to update_memory_buffers are not supported")
        expect(num_ranks < 8 or num_ranks % 8 == 0, "num_ranks < NUM_MAX_NVL_PEERS or ...")
        expect(0 <= self.rank < num_ranks, "0 <= rank and rank < num_ranks")
        self.num_ranks, self.num_slots = num_ranks, num_experts_per_rank
        self.num_bytes = num_rdma_bytes
        self.active = {self.rank}
        self.masked = set(range(num_ranks)) - {self.rank}

    def set_tcp_store_group(self, tcp_store_group: Any) -> None:
        self.store = tcp_store_group
        self.prefix = getattr(tcp_store_group, "_prefix", self.prefix)

    def connect_ranks(self, remote_ranks: list[int], activate: bool = True) -> None:
        self.calls.append(f"connect {remote_ranks} {'active' if activate else 'masked'}")
        assert self.store is not None, "TCPStore group is not set"
        expect(bool(remote_ranks), "!remote_ranks_list.empty()")
        own = f"NIXL_EP/{self.rank}"
        self.store.set(own, f"metadata of {self.rank}".encode())
        keys = [f"NIXL_EP/{rank}" for rank in remote_ranks]
        self.store.wait(keys, timedelta(seconds=300))
        found = self.store.multi_get(keys)
        assert found == [f"metadata of {rank}".encode() for rank in remote_ranks]
        if self.refuses:
            # It has put them among the connected by then.
            self.connected.update(remote_ranks)
            message, self.refuses = self.refuses, ""
            raise RuntimeError(message)
        for rank in remote_ranks:
            expect(0 <= rank < self.num_ranks, "remote_rank >= 0 and remote_rank < max_num_ranks")
            self.connected.add(rank)
            for counts in (self.sent, self.received):
                counts.pop(("dispatch", rank), None)
                counts.pop(("combine", rank), None)
            if activate:
                self.update_mask_buffer(rank, False)
        self.store.delete_key(own)

    def disconnect_ranks(self, remote_ranks: list[int]) -> None:
        self.calls.append(f"disconnect {remote_ranks}")
        for rank in remote_ranks:
            expect(rank != self.rank, "removed_rank != rank")
            expect(rank in self.connected, "_is_rank_connected(removed_rank)")
            self.update_mask_buffer(rank, True)
            self.connected.discard(rank)

    def update_mask_buffer(self, rank_to_mask: int, mask: bool = False) -> None:
        expect(not self.is_destroyed, "available")
        expect(0 <= rank_to_mask < self.num_ranks, "rank_to_mask < max_num_ranks")
        expect(rank_to_mask != self.rank or not mask, "cannot mask the local rank")
        expect(
            mask or rank_to_mask in self.connected | {self.rank},
            "cannot unmask an unconnected rank",
        )
        (self.masked.add if mask else self.masked.discard)(rank_to_mask)
        (self.active.discard if mask else self.active.add)(rank_to_mask)

    def query_mask_buffer(self, mask_status: Tensor) -> None:
        expect(mask_status.shape == (self.num_ranks,), "mask_status.numel() == max_num_ranks")
        expect(mask_status.dtype == torch.int32, "mask_status.scalar_type() == torch::kInt32")
        mask_status.copy_(torch.tensor([int(r in self.masked) for r in range(self.num_ranks)]))

    def destroy(self) -> None:
        expect(not self.is_destroyed, "destroyed once")
        self.is_destroyed = True

    def low_latency_dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor,
        num_max_dispatch_tokens_per_rank: int,
        *,
        use_fp8: bool = True,
        round_scale: bool = False,
        use_ue8m0: bool = False,
        return_recv_hook: bool = False,
    ) -> tuple[Any, Tensor, Any, None, Callable[[], None] | None]:
        most, hidden_size = num_max_dispatch_tokens_per_rank, x.shape[1]
        bound = max(self.active) + 1
        expect(x.dtype == torch.bfloat16 and x.is_contiguous(), "x is contiguous bfloat16")
        expect(topk_idx.dtype == torch.int64 and topk_idx.is_contiguous(), "topk_idx_t")
        expect(x.shape[0] == topk_idx.shape[0] and x.shape[0] <= most, "x.size(0) <= num_max")
        expect(hidden_size in HIDDEN_SIZES, "Unsupported hidden")
        expect(topk_idx.shape[1] <= MAX_TOP_K, "num_topk <= kNumMaxTopK")
        expect(bound * most % 4 == 0, "TMA requires the number of tokens to be multiple of 4")
        expect(bool((topk_idx < bound * self.num_slots).all()), "topk_idx < active_expert_bound")
        is_same = (topk_idx[:, :, None] == topk_idx[:, None, :]) & (topk_idx >= 0)[:, None]
        expect(not bool(is_same.tril(-1).any()), "a token's slots differ")
        for target in sorted(set(range(self.num_ranks)) - self.masked):
            chosen = (topk_idx // self.num_slots == target) & (topk_idx >= 0)
            pairs = chosen.nonzero()
            slots = topk_idx[chosen] % self.num_slots
            self._put("dispatch", target, (x[pairs[:, 0]].clone(), slots, pairs))
        number = self._begin()
        values = torch.full((self.num_slots, bound * most, hidden_size), float("nan"))
        values = values.bfloat16()
        counts = torch.zeros(self.num_slots, dtype=torch.int32)
        where: dict[int, tuple[Tensor, Tensor, Tensor]] = {}
        received: Any = values
        if use_fp8:
            shape = (self.num_slots, bound * most, hidden_size // BLOCK)
            scales = torch.zeros(shape)
            quantized = torch.zeros(values.shape, dtype=torch.float8_e4m3fn)
            packed = torch.zeros((*shape[:2], hidden_size // (4 * BLOCK)), dtype=torch.int32)
            received = (quantized, packed if use_ue8m0 else scales)

        def receive() -> None:
            self._end(number)
            for source in sorted(set(range(self.num_ranks)) - self.masked):
                message = self._take("dispatch", source)
                if message is None:
                    continue
                rows, slots, pairs = message
                is_slot = slots[:, None] == torch.arange(self.num_slots)
                place = counts[slots] + (is_slot.cumsum(0) * is_slot).sum(1) - 1
                counts.add_(is_slot.sum(0))
                values[slots, place] = rows
                where[source] = (slots, place, pairs)
                if use_fp8:
                    quantized[slots, place], scale = quantize(rows, round_scale)
                    scales[slots, place] = scale
                    exponents = (scale.view(torch.int32) >> 23).to(torch.uint8)
                    packed[slots, place] = exponents.view(torch.int32)

        handle = (where, bound, most, hidden_size)
        if return_recv_hook:
            return received, counts, handle, None, receive
        receive()
        return received, counts, handle, None, None

    def low_latency_combine(
        self,
        x: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
        handle: Any,
        *,
        return_recv_hook: bool = False,
    ) -> tuple[Tensor, None, Callable[[], None] | None]:
        where, bound, most, hidden_size = handle
        expect(x.shape == (self.num_slots, bound * most, hidden_size), "x.size(1) == ...")
        expect(x.dtype == torch.bfloat16 and x.is_contiguous(), "x is contiguous bfloat16")
        expect(topk_weights.dtype == torch.float32, "topk_weights.scalar_type() == kFloat32")
        expect(topk_weights.shape == topk_idx.shape, "topk_idx.size(1) == topk_weights.size(1)")
        for source in sorted(set(range(self.num_ranks)) - self.masked):
            slots, place, pairs = where[source]
            self._put("combine", source, (pairs, x[slots, place].clone()))
        number = self._begin()
        combined = torch.full((topk_idx.shape[0], hidden_size), float("nan")).bfloat16()

        def receive() -> None:
            self._end(number)
            total = torch.zeros(*topk_idx.shape, hidden_size)
            for source in sorted(set(range(self.num_ranks)) - self.masked):
                message = self._take("combine", source)
                if message is not None:
                    (token, choice), rows = message[0].T, message[1]
                    total[token, choice] = rows.float() * topk_weights[token, choice][:, None]
            combined.copy_(total.sum(1))

        if return_recv_hook:
            return combined, None, receive
        receive()
        return combined, None, None

    def _begin(self) -> int:
        self.num_sends += 1
        self.on_its_way = [self.num_sends]
        return self.num_sends

    def _end(self, number: int) -> None:
        if number not in self.on_its_way:
            self.masked = set(range(self.num_ranks))
        self.on_its_way = []

    def _put(self, kind: str, target: int, message: Any) -> None:
        number = self.sent.get((kind, target), 0)
        self.sent[kind, target] = number + 1
        self.fabric.put(kind, self.rank, target, number, message)

    def _take(self, kind: str, source: int) -> Any:
        number = self.received.get((kind, source), 0)
        self.received[kind, source] = number + 1
        message = self.fabric.take(kind, source, self.rank, number, self.seconds)
        if message is None:
            self.masked.add(source)
        return message


def quantize(rows: Tensor, round_scale: bool) -> tuple[Tensor, Tensor]:
    """[..., D] bfloat16 -> float8_e4m3fn, and a scale for each block."""
    blocks = rows.float().unflatten(-1, (-1, BLOCK))
    scale = blocks.abs().amax(-1).clamp(min=1e-4) / LARGEST_FP8
    if round_scale:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    return (blocks / scale[..., None]).to(torch.float8_e4m3fn).flatten(-2), scale
