"""What each rank does when loading is measured: it loads, and it plainly reads, in turns."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import Tensor

from equipoise.bench.load_case import Cache, FilesMade, LoadMeasured, LoadSaid, LoadSpec
from equipoise.bench.load_files import drop_from_cache, measure_cached, write_checkpoint
from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ModelError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import ExpertParallelModel, SetPlan
from equipoise.models.loading import load_spread
from equipoise.models.read_ahead import CHUNK_BYTES, NUM_THREADS, FileReader, Span
from equipoise.models.skeleton import build_skeleton
from equipoise.placement import place_in_order
from equipoise.topology import Topology


def measure_load(spec: LoadSpec, group: RankGroup, emit: Callable[[LoadSaid], None]) -> None:
    """Make the files, then load and read them, cold and warm.

    Args:
        spec: the same on every rank.
        group: its ranks.
        emit: called on rank 0 with figures as they are found.
    Collective: every rank of the group.
    Raises: ModelError if a weight is not what is stored.
    """
    directory = Path(spec.directory)
    group.barrier()
    started_s = time.perf_counter()
    write_checkpoint(directory, spec.size, group.rank, group.size)
    group.barrier()
    files = sorted(directory.glob("*.safetensors"))
    num_bytes = sum(file.stat().st_size for file in files)
    if group.rank == 0:
        emit(FilesMade(num_bytes, time.perf_counter() - started_s))
    # Imports, and what the device does once, are not what is measured.
    build_skeleton(directory)
    torch.zeros(1, device=group.device)
    caches: tuple[Cache, ...] = ("cold", "warm")
    for cache in caches:
        for number in range(spec.num_rounds):
            measured = _measure(cache, number, spec, group, files)
            if group.rank == 0:
                emit(measured)


def _measure(
    cache: Cache, number: int, spec: LoadSpec, group: RankGroup, files: list[Path]
) -> LoadMeasured:
    """Both, in another order each round."""
    plain = None if number % 2 else _read_plainly(cache, group, files)
    loaded = _load(cache, spec, group, files)
    plain = plain or _read_plainly(cache, group, files)
    return LoadMeasured(
        cache,
        (loaded.cached, plain.cached),
        loaded.seconds,
        plain.seconds,
        loaded.bytes_read,
        loaded.first_byte_s,
        loaded.last_byte_s,
    )


@dataclass(frozen=True)
class _Plain:
    """A plain read."""

    cached: float | None
    seconds: float


@dataclass(frozen=True)
class _Loaded(_Plain):
    """A load; fields as `LoadMeasured` has them."""

    bytes_read: int
    first_byte_s: float
    last_byte_s: float


def _prepare(cache: Cache, group: RankGroup, files: list[Path]) -> float | None:
    """Have the files in the page cache or not; the share that is."""
    group.barrier()
    mine = files[group.rank :: group.size]
    if cache == "cold":
        drop_from_cache(mine)
        group.barrier()
    cached = measure_cached(files)
    group.barrier()
    return cached


def _read_plainly(cache: Cache, group: RankGroup, files: list[Path]) -> _Plain:
    """Read all files once, each rank its share, with the threads that loading has."""
    reader = FileReader()
    buffers: SimpleQueue[Tensor] = SimpleQueue()
    for _ in range(NUM_THREADS):
        buffers.put(torch.zeros(CHUNK_BYTES, dtype=torch.uint8))

    def read(span: Span) -> None:
        buffer = buffers.get()
        reader.fill(span, buffer[: span.num_bytes])
        buffers.put(buffer)

    spans = [
        Span(file, begin, min(CHUNK_BYTES, size - begin))
        for file in files
        for size in (file.stat().st_size,)
        for begin in range(0, size, CHUNK_BYTES)
    ]
    share = -(-len(spans) // group.size)
    with ThreadPoolExecutor(NUM_THREADS) as threads:
        cached = _prepare(cache, group, files)
        started_s = time.perf_counter()
        for _ in threads.map(read, spans[group.rank * share : (group.rank + 1) * share]):
            pass
        seconds = _of_slowest(time.perf_counter() - started_s, group)
    reader.close()
    return _Plain(cached, seconds)


def _load(cache: Cache, spec: LoadSpec, group: RankGroup, files: list[Path]) -> _Loaded:
    """Load the checkpoint as `parallelize` does, up to the weights."""
    told: list[float] = []
    cached = _prepare(cache, group, files)
    started_s = time.perf_counter()
    checkpoint = Checkpoint(Path(spec.directory), device=group.device)
    topology = Topology(group.size, spec.size.num_experts // group.size)
    placement = place_in_order(spec.size.num_layers, spec.size.num_experts, topology)
    plan = SetPlan(
        checkpoint.layers,
        PlacementMaps(placement, group.device),
        create_dispatcher("torch", group, topology),
        LoadRecorder(placement.num_layers, placement.num_slots, group.device),
    )
    spread = load_spread(checkpoint, [plan], group, lambda *_: told.append(time.perf_counter()))
    if group.device.type == "cuda":
        torch.cuda.synchronize(group.device)
    ended_s = time.perf_counter()
    seconds = _of_slowest(ended_s - started_s, group)
    _check(spread, checkpoint, group)
    bytes_read = torch.tensor(checkpoint.bytes_read)
    group.all_reduce(bytes_read, "sum")
    plan.dispatcher.close()
    del spread, plan, checkpoint
    gc.collect()
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
    return _Loaded(cached, seconds, int(bytes_read), told[0] - started_s, ended_s - told[-1])


def _check(spread: ExpertParallelModel, checkpoint: Checkpoint, group: RankGroup) -> None:
    """Compare some of the weights with what is stored, read by safetensors itself."""
    (one,) = spread.sets
    num_slots = one.maps.placement.topology.slots_per_rank
    for row in {0, len(one.layers) - 1}:
        gate_up, down = one.weights[row]
        prefix = f"model.layers.{row}.mlp.experts"
        for slot in {0, num_slots // 2, num_slots - 1}:
            expert = f"{prefix}.{group.rank * num_slots + slot}"
            gate, up, lower = (
                _read_stored(checkpoint, f"{expert}.{name}_proj.weight")
                for name in ("gate", "up", "down")
            )
            for name, got, wanted in (
                ("gate_up", gate_up[slot], torch.cat((gate, up))),
                ("down", down[slot], lower),
            ):
                if not torch.equal(got.cpu(), wanted):
                    raise ModelError(f"{expert}: {name} is not what is stored")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        if not torch.equal(spread.model.get_parameter(name).cpu(), _read_stored(checkpoint, name)):
            raise ModelError(f"{name} is not what is stored")


def _read_stored(checkpoint: Checkpoint, name: str) -> Tensor:
    safetensors: Any = import_module("safetensors")
    with safetensors.safe_open(checkpoint.stored[name].file, framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
        return tensor


def _of_slowest(seconds: float, group: RankGroup) -> float:
    slowest = torch.tensor(seconds, dtype=torch.float64)
    group.all_reduce(slowest, "max")
    return float(slowest)
