"""Where experts are in the next generation: survivors keep what they hold, as far as it fits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from equipoise.config import EPLBConfig
from equipoise.errors import MembershipError
from equipoise.placement import EMPTY, Placement
from equipoise.topology import IntArray, Topology, choose_num_redundant


@dataclass(frozen=True)
class Redundancy:
    """How many slots a rank has in a generation of some size.

    Attributes:
        slots_per_rank: the same in every generation, so that more ranks mean more replicas; None
            to follow `num_redundant`.
        num_redundant: slots beyond the experts, at least, so that more ranks mean fewer slots each;
            "auto" as in EPLBConfig.
    """

    slots_per_rank: int | None = None
    num_redundant: int | Literal["auto"] = "auto"

    @classmethod
    def of(cls, config: EPLBConfig, slots_per_rank: int | None = None) -> Redundancy:
        """As configured."""
        return cls(slots_per_rank, config.num_redundant_experts)

    def choose_slots(self, num_experts: int, num_ranks: int) -> int:
        """Slots of each rank, in each layer.

        Args:
            num_experts: E.
            num_ranks: R.
        Collective: none.
        Raises: MembershipError, with the least size that can, if they cannot hold all experts.
        """
        if self.slots_per_rank is None:
            if self.num_redundant == "auto":
                redundant = choose_num_redundant(num_experts, num_ranks, None)
            else:
                redundant = self.num_redundant
            return -(-(num_experts + redundant) // num_ranks)
        if num_ranks * self.slots_per_rank < num_experts:
            least = -(-num_experts // self.slots_per_rank)
            raise MembershipError(
                f"{num_ranks} ranks of {self.slots_per_rank} slots cannot hold {num_experts} "
                f"experts: at least {least} ranks can"
            )
        return self.slots_per_rank


def place_members(
    held: Sequence[IntArray], num_experts: int, slots_per_rank: int, num_nodes: int = 1
) -> Placement:
    """Place a set of layers on the members of a generation.

    A slot that fits keeps its expert. Experts that no member holds go where most slots are free,
    and where none is, in place of the expert with most replicas. Newcomers' slots that are left
    then get the experts with fewest replicas; survivors' stay empty for a rebalance to fill.

    Args:
        held: by number, what each member's slots hold, [L, any] int64; [L, 0] of a newcomer.
        num_experts: E.
        slots_per_rank: S; R * S is at least E.
        num_nodes: N, which members are spread over evenly, node by node.
    Returns:
        The placement of R ranks.
    Collective: none; the same everywhere for the same input.
    """
    num_layers = held[0].shape[0]
    table = np.full((num_layers, len(held) * slots_per_rank), EMPTY, dtype=np.int64)
    for row in range(num_layers):
        layer = _Layer([one[row].tolist() for one in held], num_experts, slots_per_rank, turn=row)
        table[row] = np.concatenate(layer.place())
    return Placement(table, num_experts, Topology(len(held), slots_per_rank, num_nodes))


def order_by_node(names: Sequence[str], nodes: Mapping[str, str]) -> tuple[list[str], int]:
    """Number ranks node by node, as a topology has them.

    Args:
        names: of ranks.
        nodes: where they sit, by name; those that are not named share a node.
    Returns:
        The names, those of a node side by side, and N: 1 where some node has more ranks than
        another, which a topology cannot say.
    Collective: none; the same everywhere for the same input.
    """
    by_node: dict[str, list[str]] = {}
    for name in names:
        by_node.setdefault(nodes.get(name, ""), []).append(name)
    is_even = len({len(ranks) for ranks in by_node.values()}) == 1
    return [name for ranks in by_node.values() for name in ranks], len(by_node) if is_even else 1


class _Layer:
    """One layer being placed."""

    def __init__(
        self, held: list[list[int]], num_experts: int, slots_per_rank: int, turn: int
    ) -> None:
        self._num_experts, self._num_slots = num_experts, slots_per_rank
        self._newcomers = [number for number, slots in enumerate(held) if not slots]
        # Layers begin with other newcomers, so that all get as much.
        self._turn = turn
        counts = [0] * num_experts
        for expert in (expert for slots in held for expert in slots if expert >= 0):
            counts[expert] += 1
        self._slots = [self._keep(slots, counts) for slots in held]
        self._counts = [0] * num_experts
        for expert in (expert for slots in self._slots for expert in slots if expert >= 0):
            self._counts[expert] += 1

    def place(self) -> list[list[int]]:
        for expert in range(self._num_experts):
            if not self._counts[expert]:
                self._put(expert)
        going = self._newcomers
        while going:
            going = [number for number in going if self._fill(number)]
        return self._slots

    def _keep(self, slots: list[int], counts: list[int]) -> list[int]:
        """What a member keeps: all that fits in place, else its rarest experts."""
        room = self._num_slots
        if len(slots) <= room:
            return slots + [EMPTY] * (room - len(slots))
        distinct = sorted({expert for expert in slots if expert >= 0})
        kept = set(sorted(distinct, key=lambda expert: (counts[expert], expert))[:room])
        row = [expert if expert in kept else EMPTY for expert in _drop_repeated(slots[:room])]
        left = sorted(kept - set(row))
        for slot in range(room):
            if row[slot] == EMPTY and left:
                row[slot] = left.pop(0)
        return row

    def _put(self, expert: int) -> None:
        """Give an expert that has none a slot."""
        ranks = range(len(self._slots))
        number = max(ranks, key=lambda rank: (self._slots[rank].count(EMPTY), self._order(rank)))
        if EMPTY in self._slots[number]:
            slot = self._slots[number].index(EMPTY)
        else:
            number, slot = max(
                ((rank, slot) for rank in ranks for slot in range(self._num_slots)),
                key=lambda at: (self._weigh(*at), self._order(at[0]), -at[1]),
            )
            self._counts[self._slots[number][slot]] -= 1
        self._slots[number][slot] = expert
        self._counts[expert] += 1

    def _weigh(self, number: int, slot: int) -> tuple[bool, int]:
        """How well a slot can be done without: one that repeats an expert of its rank best."""
        expert = self._slots[number][slot]
        return self._slots[number].count(expert) > 1, self._counts[expert]

    def _fill(self, number: int) -> bool:
        """Give a newcomer's slot the rarest expert that it does not hold; False if it is full."""
        slots = self._slots[number]
        absent = [expert for expert in range(self._num_experts) if expert not in slots]
        if EMPTY not in slots or not absent:
            return False
        expert = min(absent, key=lambda one: (self._counts[one], self._order(one)))
        slots[slots.index(EMPTY)] = expert
        self._counts[expert] += 1
        return True

    def _order(self, number: int) -> int:
        """Breaks ties, for each layer in another way."""
        return (number * 7919 + self._turn * 104729) % 1000003


def _drop_repeated(slots: list[int]) -> list[int]:
    seen: set[int] = set()
    return [EMPTY if slot in seen or seen.add(slot) else slot for slot in slots]  # type: ignore[func-returns-value]
