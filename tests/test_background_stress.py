"""Rebalances in the background, one behind the other, while threads of all ranks dawdle at random.

As many as two cores do in a minute; `EQUIPOISE_STRESS=10000 scripts/test -s
tests/test_background_stress.py` for more, and for what they cost.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.balancer import EplbState
from equipoise.comm.groups import RankGroup
from equipoise.comm.registry import create_eplb_communicator
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.load.recorder import LoadRecorder
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import IntArray, Topology
from tests.ranks import Rank, processes

NUM_LAYERS, NUM_EXPERTS, SLOTS_PER_RANK = 2, 8, 3
CPU = torch.device("cpu")
NUM_REBALANCES = int(os.environ.get("EQUIPOISE_STRESS", "120"))
# Rebalances after which a process is warm: what it holds from then on may not grow.
WARM = 50
MOST_BYTES_PER_REBALANCE = 2048
"""Growth that is let pass: the words in the store, and what an allocator does not give back."""
# How long a thread dawdles, at random; nothing is waited for by it.
FORWARD_PAUSES_S = (0.0, 0.0, 0.001, 0.004, 0.01)
WORKER_PAUSES_S = (0.0,) * 12 + (0.0005, 0.002)


class Dawdling:
    """One rank whose threads pause where others would not expect it.

    The forward thread before a step and in the midst of a commit; the worker around everything by
    which it meets other ranks or the store.
    """

    def __init__(self, group: RankGroup, wire: str, seed: int) -> None:
        self.group = group
        topology = Topology(group.size, SLOTS_PER_RANK)
        placement = place_in_order(NUM_LAYERS, NUM_EXPERTS, topology)
        self.maps = PlacementMaps(placement, CPU)
        self.recorder = LoadRecorder(NUM_LAYERS, topology.num_slots, CPU)
        self.local = slice(group.rank * SLOTS_PER_RANK, (group.rank + 1) * SLOTS_PER_RANK)
        self.weights = torch.tensor(self._find_wanted()).unbind()
        # A chunk for each layer, or for two where they bring little.
        config = EPLBConfig(window_size=3, step_interval=1, staging_bytes=2 * 8 * SLOTS_PER_RANK)
        self.state = EplbState(config, group, get_policy("deepseek"))
        self.communicator = create_eplb_communicator(
            self.state.transfer_group, wire, [[layer] for layer in self.weights]
        )
        self.forward_pace = random.Random(seed * 100 + group.rank)
        self.worker_pace = random.Random(seed * 100 + 50 + group.rank)
        for owner, names in (
            (self.state.transfer_group, ("all_gather", "decide")),
            (self.communicator, ("start", "finish")),
        ):
            for name in names:
                setattr(owner, name, self._slow_down(getattr(owner, name)))
        self.state.add_model(
            "model",
            [[layer] for layer in self.weights],
            self.maps,
            self.recorder,
            self.communicator,
            on_commit=lambda _layer, _slots: _pause(self.forward_pace, FORWARD_PAUSES_S),
        )

    def step(self) -> int:
        """One step, without waiting for the others.

        Returns:
            how many rebalances ended.
        """
        _pause(self.forward_pace, FORWARD_PAUSES_S)
        hot = self.forward_pace.randrange(NUM_EXPERTS)
        for layer in range(NUM_LAYERS):
            slot = self.maps.placement.expert_to_slots[layer, (hot + layer) % NUM_EXPERTS, 0]
            self.recorder.record(layer, torch.full((8,), int(slot)))
        num_ended = len(self.state.step())
        held = torch.stack(self.weights).numpy()
        assert np.array_equal(held, self._find_wanted()), "a slot is not what its map says"
        assert np.array_equal(self.maps.slot_to_expert, self.maps.placement.slot_to_expert)
        return num_ended

    def close(self) -> None:
        assert self.state.close()
        self.communicator.close()
        self.group.close()

    def _find_wanted(self) -> IntArray:
        """[L, S] int64: the layer and the expert that each slot of this rank shall hold."""
        experts = self.maps.placement.slot_to_expert[:, self.local]
        return np.asarray(experts + 1000 * (1 + np.arange(NUM_LAYERS)[:, None]))

    def _slow_down(self, call: Callable[..., object]) -> Callable[..., object]:
        def slow(*arguments: object, **options: object) -> object:
            _pause(self.worker_pace, WORKER_PAUSES_S)
            answer = call(*arguments, **options)
            _pause(self.worker_pace, WORKER_PAUSES_S)
            return answer

        return slow


def _pause(pace: random.Random, choices_s: Sequence[float]) -> None:
    seconds = pace.choice(choices_s)
    if seconds:
        time.sleep(seconds)


def read_footprint() -> tuple[int, int, int]:
    """Resident bytes, threads and open files of this process."""
    resident = int(Path("/proc/self/statm").read_text().split()[1])
    threads, files = (len(list(Path("/proc/self", what).iterdir())) for what in ("task", "fd"))
    return resident * os.sysconf("SC_PAGE_SIZE"), threads, files


def rebalance_many_times(rank: Rank, wire: str, seed: int, num_rebalances: int) -> None:
    dawdling = Dawdling(rank.make_group(), wire, seed)
    # The same on every rank: how far one may get ahead of another.
    together = random.Random(seed)
    meets = 0.5
    done = 0
    began = time.monotonic()
    history = hashlib.blake2b(digest_size=8)
    warm: tuple[int, int, int] | None = None
    while done < num_rebalances:
        before = dawdling.maps.placement
        done += dawdling.step()
        if dawdling.maps.placement is not before:
            stands = dawdling.maps.placement.fingerprint()
            history.update(f"{dawdling.state.steps} {stands}".encode())
        if dawdling.state.steps % 64 == 0:
            meets = together.choice((0.5, 0.1, 0.02))
        if together.random() < meets:
            word = torch.frombuffer(bytearray(history.digest()), dtype=torch.int64)
            told = dawdling.group.all_gather(word)
            assert len({int(theirs) for theirs in told}) == 1, "placements differ at one count"
        if done >= min(WARM, num_rebalances // 2) and warm is None:
            warm = read_footprint()
    now = read_footprint()
    if rank.rank == 0:
        print(
            f"{wire}: {done} rebalances in {dawdling.state.steps} steps, "
            f"{time.monotonic() - began:.1f} s; bytes, threads, files {warm} -> {now}",
            flush=True,
        )
    assert warm is not None
    # The store's thread may be at work, and has its file open then.
    assert now[1] <= warm[1] + 1
    assert now[2] <= warm[2] + 1
    assert now[0] - warm[0] < (4 << 20) + MOST_BYTES_PER_REBALANCE * num_rebalances
    dawdling.close()


@pytest.mark.slow
@pytest.mark.timeout(240 + NUM_REBALANCES)
@pytest.mark.parametrize("interval_s", [5e-3, 1e-6], ids=["usual switches", "many switches"])
@processes(4, timeout_s=80.0 + NUM_REBALANCES)
def test_every_slot_is_right_after_every_commit(rank: Rank, interval_s: float) -> None:
    sys.setswitchinterval(interval_s)
    rebalance_many_times(rank, "torch_gloo", int(interval_s < 1e-3), NUM_REBALANCES // 2)


@pytest.mark.slow
@pytest.mark.timeout(240 + NUM_REBALANCES)
@processes(4, timeout_s=80.0 + NUM_REBALANCES)
def test_every_slot_is_right_over_nixl(rank: Rank) -> None:
    sys.setswitchinterval(1e-6)
    rebalance_many_times(rank, "nixl", 2, NUM_REBALANCES // 5)
