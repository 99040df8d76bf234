"""What a step computes beside rebalances: products on the CPU, the layers of an MoE on GPUs."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from equipoise.bench.stall_case import HIDDEN_SIZE, StallSpec
from equipoise.comm.groups import RankGroup

_MARK_BYTES = 8
_ROWS_PER_SLOT = 8
"""Tokens that each slot gets in a step: as in decoding, weights are what takes time."""
_TOKENS = 256
"""Of the products that stand for attention."""


class StepWork(ABC):
    """One rank's forward pass, and the weights that it reads.

    Attributes:
        weights: per layer the tensors [S, ...] of this rank's slots.
    """

    weights: list[list[Tensor]]

    @abstractmethod
    def launch(self) -> None:
        """Compute a step, or on GPUs enqueue it. Collective: every rank of the group."""

    @abstractmethod
    def finish(self) -> float:
        """Return when the step is over here and on all ranks; seconds on the device.

        Collective: every rank of the group.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of what needs the group. Collective: none."""

    def mark(self, layer: int, slot: int, expert: int) -> None:
        """Write into a slot which expert it holds."""
        self._find_marks(layer)[slot] = expert + 1000 * layer

    def find_marked(self, layer: int) -> list[int]:
        """The experts that the slots of a layer hold. Collective: none; waits for the device."""
        return [int(mark) - 1000 * layer for mark in self._find_marks(layer).tolist()]

    def _find_marks(self, layer: int) -> Tensor:
        rows = self.weights[layer][0]
        flat = rows.view(len(rows), -1).view(torch.uint8)
        return flat[:, :_MARK_BYTES].view(torch.int64)[:, 0]


class CpuWork(StepWork):
    """Products of matrices; experts are bytes that nothing reads."""

    def __init__(self, spec: StallSpec, group: RankGroup) -> None:
        # Room for the mark, however small experts are.
        num_bytes = -(-spec.expert_bytes // _MARK_BYTES) * _MARK_BYTES
        shape = (spec.slots_per_rank, num_bytes)
        self.weights = [[torch.zeros(shape, dtype=torch.uint8)] for _ in range(spec.num_layers)]
        self._group = group
        self._matrix = torch.rand(256, 256)
        self._num_products = _agree_on_most(group, _count_in(0.2, self._multiply, spec.step_ms))

    def launch(self) -> None:  # noqa: D102 - see the base
        for _ in range(self._num_products):
            self._multiply()

    def finish(self) -> float:  # noqa: D102 - see the base
        # In lockstep, as dispatch keeps the ranks.
        self._group.barrier()
        return 0.0

    def close(self) -> None:
        """Nothing is held."""

    def _multiply(self) -> None:
        torch.mm(self._matrix, self._matrix)


class GpuWork(StepWork):
    """The layers of an MoE in bfloat16: products of all tokens, and experts between two exchanges.

    Tokens travel by all_to_all over NCCL. Each step ends with the host waiting for the device, as
    an engine's does that reads the tokens chosen. It is one captured graph, or, where that is asked
    for, launched kernel by kernel.
    """

    def __init__(self, spec: StallSpec, group: RankGroup) -> None:
        self._group, self._num_layers = group, spec.num_layers
        slots, inner = spec.slots_per_rank, spec.expert_bytes // (3 * 2 * HIDDEN_SIZE)
        self.weights = [
            [_fill(group, slots, HIDDEN_SIZE, 2 * inner), _fill(group, slots, inner, HIDDEN_SIZE)]
            for _ in range(spec.num_layers)
        ]
        num_rows = slots * _ROWS_PER_SLOT // group.size * group.size
        self._rows = _fill(group, num_rows, HIDDEN_SIZE)
        self._sent, self._home = torch.empty_like(self._rows), torch.empty_like(self._rows)
        # What stands for a slot's tokens: as many for each, whatever was sent.
        self._hidden = _fill(group, slots, _ROWS_PER_SLOT, HIDDEN_SIZE)
        self._tokens = _fill(group, _TOKENS, HIDDEN_SIZE)
        self._dense = _fill(group, HIDDEN_SIZE, HIDDEN_SIZE)
        self._begun = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self._num_products = 1
        self._graph: torch.cuda.CUDAGraph | None = None
        self._num_products = self._calibrate(spec.step_ms)
        if spec.launch == "graph":
            self._graph = self._capture()

    def launch(self) -> None:  # noqa: D102 - see the base
        self._begun.record()
        if self._graph is None:
            self._compute()
        else:
            self._graph.replay()

    def close(self) -> None:  # noqa: D102 - see the base
        # Before the group that its exchanges go over.
        self._graph = None

    def _capture(self) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        # NCCL's own threads may look at the device meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self._compute()
        return graph

    def _compute(self) -> None:
        for layer in range(self._num_layers):
            for _ in range(self._num_products):
                torch.mm(self._tokens, self._dense)
            self._exchange(self._rows, self._sent)
            into, out = self.weights[layer]
            gate, up = torch.bmm(self._hidden, into).chunk(2, dim=2)
            torch.bmm(torch.nn.functional.silu(gate) * up, out)
            self._exchange(self._sent, self._home)

    def finish(self) -> float:  # noqa: D102 - see the base
        self._ended.record()
        self._ended.synchronize()
        return float(self._begun.elapsed_time(self._ended)) / 1000

    def _exchange(self, rows: Tensor, into: Tensor) -> None:
        self._group.device_group.alltoall_base(into, rows, [], []).wait()

    def _calibrate(self, step_ms: float) -> int:
        """Products of each layer, so that a step takes about as long as asked for, or longer."""
        for _ in range(10):
            self.launch()
            taken_ms = self.finish() * 1000
        begun, ended = self._begun, self._ended
        begun.record()
        for _ in range(1000):
            torch.mm(self._tokens, self._dense)
        ended.record()
        ended.synchronize()
        product_ms = begun.elapsed_time(ended) / 1000
        lacking_ms = max(0.0, step_ms - taken_ms)
        return _agree_on_most(self._group, 1 + round(lacking_ms / product_ms / self._num_layers))


def create_work(spec: StallSpec, group: RankGroup) -> StepWork:
    """What steps compute on the spec's kind of device.

    Collective: every rank of the group.
    """
    return CpuWork(spec, group) if spec.device == "cpu" else GpuWork(spec, group)


def _count_in(seconds: float, call: Callable[[], None], step_ms: float) -> int:
    """How often something can be called in a step."""
    started, count = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        call()
        count += 1
    return max(1, round(count * step_ms / 1000 / seconds))


def _fill(group: RankGroup, *shape: int) -> Tensor:
    empty = torch.empty(shape, dtype=torch.bfloat16, device=group.device)
    return empty.normal_(std=0.02)


def _agree_on_most(group: RankGroup, count: int) -> int:
    most = torch.tensor(count)
    group.all_reduce(most, "max")
    return int(most)
