"""What a rebalance may take of the link and of a step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch

from equipoise.balancer.protocol import read_commit
from equipoise.config import EPLBConfig
from equipoise.plan.transfer_plan import TransferPlan
from equipoise.topology import IntArray
from equipoise.transfer.staging import PlanShares, share_chunks, share_plan

NUM_HALVES = 2
LEAST_HALF_BYTES = MappingProxyType({"cpu": 16 << 20, "cuda": 256 << 20})
"""What half the staging has where nothing bounds it, however small the layers are: so that many
small ones travel, and are committed, together. A GPU copies as much in a seventh of a thousandth of
a second."""
BURST_S = 0.1
"""Seconds of the allowed rate that travel at a stretch, where more than one layer would."""


class ChunkSize(NamedTuple):
    """What a step has to do for a chunk; the same on every rank.

    Attributes:
        num_bytes: that the busiest rank has staged.
        num_layers: that switch.
    """

    num_bytes: int
    num_layers: int


@dataclass(frozen=True)
class StepTally:
    """What is committed at the last step that anything was bound to.

    Attributes:
        at: its count.
        num_bytes: as in `ChunkSize`, of all its chunks.
        num_layers: of all its chunks.
    """

    at: int = 0
    num_bytes: int = 0
    num_layers: int = 0

    def add(self, size: ChunkSize, word: str) -> StepTally:
        """With a chunk that this word commits, or aborts."""
        at = read_commit(word)
        if at is None:
            return self
        if at != self.at:
            return StepTally(at, *size)
        return StepTally(at, self.num_bytes + size.num_bytes, self.num_layers + size.num_layers)

    def find_earliest(self, size: ChunkSize, config: EPLBConfig) -> int:
        """The least count at which there is room for a chunk; a step without any has it."""
        would_be = (self.num_bytes + size.num_bytes, self.num_layers + size.num_layers)
        most = (config.max_bytes_per_step, config.max_layers_per_step)
        fits = all(bound is None or n <= bound for n, bound in zip(would_be, most, strict=True))
        return self.at if fits or not self.num_layers else self.at + 1


def cut_plan(
    plan: TransferPlan,
    rank: int,
    expert_bytes: IntArray,
    config: EPLBConfig,
    device: torch.device,
) -> tuple[PlanShares, list[ChunkSize]]:
    """Cut a plan into chunks that keep to the limits, or are single layers.

    Args:
        plan: what moves.
        rank: whose shares.
        expert_bytes: [L] int64, bytes of one expert of each layer.
        config: has the limits.
        device: of the weights.
    Returns:
        the rank's share of each chunk, and its size.
    Collective: none; the same chunks on every rank.
    Raises: ConfigError if a layer does not fit half of `staging_bytes`.
    """
    staged = plan.staged_bytes(expert_bytes)
    budget = _find_budget(int(staged.max(initial=0)), config, device)
    shares = share_plan(plan, rank, expert_bytes, budget)
    parts = [part for layers in shares.chunks for part in _split(layers, config)]
    if len(parts) > len(shares):
        shares = share_chunks(plan, rank, parts, expert_bytes)
    return shares, [ChunkSize(int(staged[part].sum(axis=0).max()), len(part)) for part in parts]


class Pace:
    """Spaces exchanges so that they take no more of a link than they may.

    Owner: the worker thread. The ranks' paces run alike, as all note the same bytes.

    Args:
        bytes_per_s: the most; None for no bound.
    """

    def __init__(self, bytes_per_s: int | None) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_at = 0.0
        self.span_s = 0.0
        """Seconds that the last exchange makes the next one wait at most."""

    @property
    def wait_s(self) -> float:
        """Seconds until the next exchange may begin."""
        return max(0.0, self._free_at - time.monotonic())

    def note(self, num_bytes: int) -> None:
        """An exchange begins.

        Args:
            num_bytes: that its busiest rank sends and receives.
        """
        if self._bytes_per_s is not None:
            self.span_s = num_bytes / self._bytes_per_s
            self._free_at = time.monotonic() + self.span_s


def find_half_bytes(
    expert_bytes: IntArray, num_slots: int, config: EPLBConfig, device: torch.device
) -> int:
    """Bytes of half the staging, if a plan fills every slot of this rank.

    Args:
        expert_bytes: [L] int64, bytes of one expert of each layer.
        num_slots: S.
        config: has the limits.
        device: of the weights.
    Collective: none.
    """
    layer_bytes = num_slots * expert_bytes
    return min(int(layer_bytes.sum()), _find_budget(int(layer_bytes.max()), config, device))


def _find_budget(largest: int, config: EPLBConfig, device: torch.device) -> int:
    """Most bytes that a chunk brings to any rank, if the largest layer brings so many."""
    budget = max(largest, LEAST_HALF_BYTES[device.type])
    if config.staging_bytes is not None:
        budget = config.staging_bytes // NUM_HALVES
    for bound in (config.max_bytes_per_step, _find_burst(config)):
        if bound is not None:
            budget = min(budget, max(largest, bound))
    return budget


def _find_burst(config: EPLBConfig) -> int | None:
    rate = config.max_bytes_per_s
    return None if rate is None else int(rate * BURST_S)


def _split(layers: IntArray, config: EPLBConfig) -> list[IntArray]:
    most = config.max_layers_per_step
    if most is None:
        return [layers]
    return np.split(layers, range(most, len(layers), most))
