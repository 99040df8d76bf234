"""How experts get from one placement to the next: who stages which expert, from where."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import Placement
from equipoise.plan.sources import Holders, find_holders, spread_sources
from equipoise.topology import IntArray


@dataclass(frozen=True, eq=False)
class TransferPlan:
    """The difference of two placements, for all layers at once.

    A row is one expert that one rank must stage in one layer: a receive, or a copy from a slot of
    its own. A write is one slot that gets a row's bytes; several writes of a row fan out.

    Attributes:
        old: the placement that stands.
        new: the one that shall stand.
        layer: [M] int64. Rows are sorted by layer, dst_rank, src_slot: what stands side by side is
            read as one.
        dst_rank: [M] int64, rank that stages the row.
        expert: [M] int64.
        src_slot: [M] int64, global slot in `old` that holds the expert.
        write_row: [W] int64, the row whose bytes the slot gets. Writes are sorted by layer, slot.
        write_slot: [W] int64, global slot in `new`.
    """

    old: Placement
    new: Placement
    layer: IntArray
    dst_rank: IntArray
    expert: IntArray
    src_slot: IntArray
    write_row: IntArray
    write_slot: IntArray

    @cached_property
    def src_rank(self) -> IntArray:
        """[M] int64, rank that holds the source slot."""
        return self.old.topology.rank_of_slot(self.src_slot)

    @cached_property
    def is_local(self) -> npt.NDArray[np.bool_]:
        """[M] bool, whether the row comes from a slot of the rank that stages it."""
        return np.equal(self.src_rank, self.dst_rank)

    @property
    def num_moves(self) -> int:
        """Rows that travel between ranks."""
        return int(np.count_nonzero(~self.is_local))

    @property
    def moves_per_layer(self) -> IntArray:
        """[L] int64, rows that travel between ranks, by layer."""
        return np.bincount(self.layer[~self.is_local], minlength=self.old.num_layers)

    @cached_property
    def rows_per_layer(self) -> IntArray:
        """[L] int64, rows of each layer."""
        return np.bincount(self.layer, minlength=self.old.num_layers)

    def staged_bytes(
        self, expert_bytes: IntArray, staged: npt.NDArray[np.bool_] | None = None
    ) -> IntArray:
        """Bytes that each rank stages in each layer, local copies included.

        Args:
            expert_bytes: [L] int64, bytes of one expert of each layer.
            staged: [M] bool, which rows are staged; None for all.
        Returns:
            [L, R] int64.
        Collective: none.
        Raises: PlacementError if expert_bytes is not [L].
        """
        layers, ranks = self.old.num_layers, self.old.topology.num_ranks
        each = np.asarray(expert_bytes, dtype=np.int64)
        if each.shape != (layers,):
            raise PlacementError(f"expert_bytes must be [{layers}], got {list(each.shape)}")
        place = self.layer * ranks + self.dst_rank
        rows = np.bincount(place if staged is None else place[staged], minlength=layers * ranks)
        total: IntArray = rows.reshape(layers, ranks) * each[:, None]
        return total

    def chunks(
        self,
        expert_bytes: IntArray,
        budget_bytes: int | None,
        *,
        staged: npt.NDArray[np.bool_] | None = None,
        most_bytes: int = 0,
    ) -> list[IntArray]:
        """Group the layers that have work so that what a rank stages for a group fits a budget.

        Args:
            expert_bytes: [L] int64, bytes of one expert of each layer.
            budget_bytes: most that any rank may stage at once; None for what the largest layer
                stages on any rank.
            staged: [M] bool, which rows are staged; None for all.
            most_bytes: where some are not, most that any rank gets at once; at least the budget,
                and the budget for the first group, so that bytes travel soon.
        Returns:
            Layers of each chunk, ascending; a layer without work is in none.
        Collective: none; the same on every rank for the same input.
        Raises: ConfigError if a layer alone exceeds the budget, saying the least that works;
            PlacementError if expert_bytes is not [L].
        """
        gotten = self.staged_bytes(expert_bytes)
        kept = gotten if staged is None else self.staged_bytes(expert_bytes, staged)
        largest, least = int(gotten.max()), int(kept.max())
        budget = largest if budget_bytes is None else budget_bytes
        if budget < least:
            worst = int(kept.max(axis=1).argmax())
            raise ConfigError(
                f"staging_bytes is {budget}, but layer {worst} stages {least} bytes on one rank: "
                f"ask for at least {least}"
            )
        first, later = max(budget, largest), max(budget, largest, most_bytes)
        busy = np.flatnonzero(self.rows_per_layer)
        ends = np.cumsum(np.stack((kept[busy], gotten[busy])), axis=1)
        chunks: list[IntArray] = []
        start = 0
        while start < len(busy):
            before = ends[:, start - 1 : start] if start else 0
            now = ends[:, start:] - before
            bounds = np.array([budget, later if start else first])
            fits = (now <= bounds[:, None, None]).all(axis=(0, 2))
            # Sums only grow, so the layers that fit come first.
            stop = start + int(np.count_nonzero(fits))
            chunks.append(busy[start:stop])
            start = stop
        return chunks

    def fingerprint(self) -> str:
        """16 hexadecimal digits, equal exactly for equal plans.

        Collective: none; ranks compare the results to see that they agree.
        """
        digest = hashlib.blake2b(self.old.fingerprint().encode(), digest_size=8)
        digest.update(self.new.fingerprint().encode())
        # Rows and writes follow from the placements; the choice of sources is all that is added.
        digest.update(self.src_slot.astype("<i8").tobytes())
        return digest.hexdigest()


def make_plan(old: Placement, new: Placement) -> TransferPlan:
    """Find what must move so that every slot holds what `new` says.

    A slot whose expert does not change, or that becomes empty, is not written. A rank that holds
    an expert already copies it from itself; otherwise it receives it once, from a holder on its
    own node where there is one, chosen so that no rank sends much more than others.

    Args:
        old: the placement that stands.
        new: the one that shall stand.
    Collective: none; the same on every rank for the same input.
    Raises: PlacementError if they differ in layers, experts or topology.
    """
    _check_alike(old, new)
    num_experts, ranks = new.num_experts, new.topology.num_ranks
    changed = (new.slot_to_expert != old.slot_to_expert) & (new.slot_to_expert >= 0)
    write_layer, write_slot = np.nonzero(changed)
    group = write_layer * ranks + new.topology.rank_of_slot(write_slot)
    rows, write_row = np.unique(
        group * num_experts + new.slot_to_expert[write_layer, write_slot], return_inverse=True
    )
    group, expert = np.divmod(rows, num_experts)
    layer, dst_rank = np.divmod(group, ranks)
    holders = find_holders(old)
    src_slot = holders.slot[_choose_holder(holders, old, layer, dst_rank, expert)]
    order = np.argsort(group * new.topology.num_slots + src_slot)
    place = np.empty_like(order)
    place[order] = np.arange(len(order))
    by_slot = (each[order] for each in (layer, dst_rank, expert, src_slot))
    columns = (*by_slot, place[write_row], write_slot)
    for column in columns:
        column.setflags(write=False)
    return TransferPlan(old, new, *columns)


def _choose_holder(
    holders: Holders, old: Placement, layer: IntArray, dst_rank: IntArray, expert: IntArray
) -> IntArray:
    """[M] int64, index into `holders` that each row comes from."""
    topology = old.topology
    of_expert = layer * old.num_experts + expert
    first, end = holders.edges[of_expert], holders.edges[of_expert + 1]
    source: IntArray = first.copy()
    local = holders.rank[first] == dst_rank
    # Most experts have one holder, and need no search.
    several = np.flatnonzero(end - first > 1)
    base, wanted = of_expert[several] * topology.num_ranks, dst_rank[several]
    own = np.searchsorted(holders.key, base + wanted)
    local[several] = holders.key[np.minimum(own, len(holders.key) - 1)] == base + wanted
    source[several] = own
    home = base + topology.node_of_rank(wanted) * topology.ranks_per_node
    at_home = np.searchsorted(holders.key, home)
    home_end = np.searchsorted(holders.key, home + topology.ranks_per_node)
    near = at_home < home_end
    first[several[near]], end[several[near]] = at_home[near], home_end[near]
    remote = np.flatnonzero(~local)
    first, end = first[remote], end[remote]
    source[remote] = spread_sources(holders.rank, first, end, layer[remote], topology.num_ranks)
    return source


def _check_alike(old: Placement, new: Placement) -> None:
    for what, before, after in (
        ("layers", old.num_layers, new.num_layers),
        ("experts", old.num_experts, new.num_experts),
        ("topology", old.topology, new.topology),
    ):
        if before != after:
            raise PlacementError(
                f"a plan needs placements of the same {what}: old has {before}, new {after}"
            )
