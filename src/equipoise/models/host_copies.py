"""Experts that a rank keeps in host memory for others, for when those die."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Literal, NamedTuple

from torch import Tensor

from equipoise.placement import Placement

logger = logging.getLogger(__name__)

HostBackup = Literal["none", "unreplicated", "all"]
"""Which experts some rank that has no slot of them keeps in host memory: none, those that one rank
alone has slots of, or all that not every rank holds."""


class CopyKey(NamedTuple):
    """An expert of a model.

    Attributes:
        set: of layers.
        layer: of the set.
        expert: which.
    """

    set: int
    layer: int
    expert: int


ReadCopy = Callable[[CopyKey], Sequence[Tensor]]
"""Reads an expert of the checkpoint: its tensors on the CPU, each without the first dimension."""


@dataclass(frozen=True)
class CopyRule:
    """How a generation's ranks share out what they keep.

    Attributes:
        backup: which experts.
        rank: whose copies these are.
        kept_by: by rank, what each keeps; the same on every rank.
        read: gives what this rank is to keep and does not.
    """

    backup: HostBackup
    rank: int
    kept_by: Sequence[Set[CopyKey]]
    read: ReadCopy


class HostCopies:
    """What one rank keeps. Experts never change, so a copy stays true wherever its expert goes.

    Owner: the forward thread, which alone calls `follow`; others may read what is kept. Nothing
    that is kept goes but by `follow`.

    Args:
        tensors: per expert its tensors on the CPU, each without the first dimension.
        rule: by which it follows the placement; None where it never changes.
    """

    def __init__(
        self,
        tensors: Mapping[CopyKey, Sequence[Tensor]] = MappingProxyType({}),
        rule: CopyRule | None = None,
    ) -> None:
        self._tensors = {key: tuple(some) for key, some in tensors.items()}
        self._rule = rule
        self._lock = threading.Lock()
        self._reader: threading.Thread | None = None

    def __contains__(self, key: CopyKey) -> bool:
        with self._lock:
            return key in self._tensors

    def __iter__(self) -> Iterator[CopyKey]:
        with self._lock:
            return iter(list(self._tensors))

    def __len__(self) -> int:
        with self._lock:
            return len(self._tensors)

    def __getitem__(self, key: CopyKey) -> tuple[Tensor, ...]:
        with self._lock:
            return self._tensors[key]

    @property
    def num_bytes(self) -> int:
        """Of host memory."""
        with self._lock:
            return sum(tensor.nbytes for some in self._tensors.values() for tensor in some)

    def follow(self, placements: Sequence[Placement]) -> None:
        """Keep what the backup asks for now that experts have moved; returns at once.

        What is kept no more goes now; what is new is read from the checkpoint by a thread.

        Args:
            placements: per set of layers, as committed.
        Collective: none; every rank at the same step, so that they share out alike.
        """
        rule = self._rule
        if rule is None or rule.backup == "none":
            return
        given = assign_copies(placements, rule.backup, rule.kept_by)
        self._rule = replace(rule, kept_by=given)
        wanted = given[rule.rank]
        with self._lock:
            for key in [key for key in self._tensors if key not in wanted]:
                del self._tensors[key]
            missing = sorted(wanted - set(self._tensors))
        if missing:
            before = self._reader
            self._reader = threading.Thread(
                target=self._read,
                args=(rule.read, missing, wanted, before),
                name="equipoise-copies",
                daemon=True,
            )
            self._reader.start()

    def wait(self, timeout_s: float) -> bool:
        """Wait until all that `follow` asked for has been read; whether that came in time.

        Collective: none.
        """
        reader = self._reader
        if reader is not None:
            reader.join(timeout_s)
        return reader is None or not reader.is_alive()

    def _read(
        self,
        read: ReadCopy,
        missing: Sequence[CopyKey],
        wanted: Set[CopyKey],
        before: threading.Thread | None,
    ) -> None:
        if before is not None:
            # One at a time: they read from the same files.
            before.join()
        for key in missing:
            rule = self._rule
            if rule is None or rule.kept_by[rule.rank] is not wanted:
                return  # another placement has been committed
            try:
                tensors = tuple(read(key))
            except Exception:
                # A death finds it missing, and reads it then.
                logger.exception("the copy of %s could not be read", key)
                return
            with self._lock:
                self._tensors[key] = tensors


def assign_copies(
    placements: Sequence[Placement], backup: HostBackup, had: Sequence[Iterable[CopyKey]]
) -> list[set[CopyKey]]:
    """Who keeps which experts: each that is kept, one rank that has no slot of it.

    Args:
        placements: per set of layers, of the same ranks.
        backup: which experts.
        had: by rank, what it keeps already, which stays there if it may.
    Returns:
        By rank.
    Collective: none; the same everywhere for the same input.
    """
    kept_by: dict[CopyKey, list[int]] = {}
    for rank, keys in enumerate(had):
        for key in keys:
            kept_by.setdefault(key, []).append(rank)
    given: list[set[CopyKey]] = [set() for _ in had]
    if backup == "none":
        return given
    for index, placement in enumerate(placements):
        ranks = range(placement.topology.num_ranks)
        slots_per_rank = placement.topology.slots_per_rank
        for layer, row in enumerate(placement.slot_to_expert.tolist()):
            holders: list[set[int]] = [set() for _ in range(placement.num_experts)]
            for slot, expert in enumerate(row):
                if expert >= 0:
                    holders[expert].add(slot // slots_per_rank)
            for expert, holding in enumerate(holders):
                others = [rank for rank in ranks if rank not in holding]
                if not others or (backup == "unreplicated" and len(holding) > 1):
                    continue
                key = CopyKey(index, layer, expert)
                before = [rank for rank in kept_by.get(key, ()) if rank not in holding]
                given[before[0] if before else others[(layer + expert) % len(others)]].add(key)
    return given
