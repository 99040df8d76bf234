"""Which experts and shared weights each member of the next generation gets, and from whom."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from equipoise.elastic.membership import MembershipPlan
from equipoise.models.host_copies import CopyKey, assign_copies

RESTORE = -1
"""Source of an expert that no participant holds."""

IN_HOST = -2


class Fetch(NamedTuple):
    """One expert that one member brings into slots of its own.

    Attributes:
        set: of layers.
        layer: of the set.
        expert: which.
        member: number of the member, which is its place among the participants too.
        slots: local slots that get it, ascending.
        source: place among the participants of who gives it: the member itself where its slots hold
            it already, or RESTORE.
        held_in: local slot of the source that holds it; IN_HOST where it is a copy in the source's
            host memory; -1 for RESTORE.
        num_bytes: of the expert.
    """

    set: int
    layer: int
    expert: int
    member: int
    slots: tuple[int, ...]
    source: int
    held_in: int
    num_bytes: int

    @property
    def travels(self) -> bool:
        """Whether it goes from one participant to another."""
        return self.source not in (RESTORE, self.member)


def list_fetches(plan: MembershipPlan) -> list[Fetch]:
    """All that members bring into their slots, in an order that all participants share.

    A member that keeps its number of slots keeps its tensors, and brings what changes; others fill
    new ones, from their own too. Of several holders one of the same node gives, of those the one
    that gives least so far.

    Collective: none; the same on every participant.
    """
    names = plan.participants
    given = _Given(plan)
    fetches: list[Fetch] = []
    copies: dict[CopyKey, list[int]] = {}
    for name, keys in plan.serving.copies.items():
        for key in keys if name in names else ():
            copies.setdefault(key, []).append(names.index(name))
    for index, shape in enumerate(plan.serving.shapes):
        held = [plan.find_holding(name).slots[index] for name in names]
        num_slots = plan.placements[index].topology.slots_per_rank
        table = plan.placements[index].slot_to_expert
        for layer, num_bytes in enumerate(shape.expert_bytes):
            before = [one[layer].tolist() for one in held]
            holders = _find_holders(before)
            for member in range(len(plan.members)):
                wanted = table[layer, member * num_slots : (member + 1) * num_slots].tolist()
                for expert, slots in _find_changes(before[member], wanted):
                    source = given.choose(holders.get(expert, []), member)
                    held_in = before[source].index(expert) if source != RESTORE else -1
                    if source == RESTORE:
                        kept = copies.get(CopyKey(index, layer, expert), [])
                        source = given.choose(kept, member)
                        held_in = IN_HOST if source != RESTORE else -1
                    fetch = Fetch(index, layer, expert, member, slots, source, held_in, num_bytes)
                    if fetch.travels:
                        given.add(source, num_bytes)
                    fetches.append(fetch)
    return fetches


def list_copy_fetches(plan: MembershipPlan) -> list[Fetch]:
    """Experts that members bring into host memory, as `list_fetches`; they have no slots.

    Collective: none; the same on every participant.
    """
    names = plan.participants
    had = [plan.serving.copies.get(member.name, ()) for member in plan.members]
    kept = assign_copies(plan.placements, plan.backup, had)
    given = _Given(plan)
    fetches = []
    for index, shape in enumerate(plan.serving.shapes):
        held = [plan.find_holding(name).slots[index] for name in names]
        for layer, num_bytes in enumerate(shape.expert_bytes):
            before = [one[layer].tolist() for one in held]
            holders = _find_holders(before)
            for member, keys in enumerate(kept):
                new = {key for key in keys if (key.set, key.layer) == (index, layer)}
                for key in sorted(new - set(had[member])):
                    source = given.choose(holders.get(key.expert, []), member)
                    held_in = before[source].index(key.expert) if source != RESTORE else -1
                    fetch = Fetch(index, layer, key.expert, member, (), source, held_in, num_bytes)
                    if fetch.travels:
                        given.add(source, num_bytes)
                    fetches.append(fetch)
    return fetches


def find_kept(plan: MembershipPlan) -> list[set[CopyKey]]:
    """By number, what members keep in host memory in the next generation."""
    had = [plan.serving.copies.get(member.name, ()) for member in plan.members]
    return assign_copies(plan.placements, plan.backup, had)


def keeps_tensors(plan: MembershipPlan, name: str, index: int) -> bool:
    """Whether a member's tensors of a set of layers stay: it has as many slots as before."""
    num_slots = plan.placements[index].topology.slots_per_rank
    return bool(plan.find_holding(name).slots[index].shape[1] == num_slots)


def split_batches(fetches: Sequence[Fetch], most_bytes: int) -> Iterator[list[Fetch]]:
    """Cut fetches that travel into batches of at most so many bytes, or of one fetch."""
    batch: list[Fetch] = []
    total = 0
    for fetch in fetches:
        if batch and total + fetch.num_bytes > most_bytes:
            yield batch
            batch, total = [], 0
        batch.append(fetch)
        total += fetch.num_bytes
    if batch:
        yield batch


def split_runs(fetches: Sequence[Fetch]) -> Iterator[list[Fetch]]:
    """Fetches that lie behind each other where they come from and where they go, together.

    Collective: none; the same on every participant.
    """
    run: list[Fetch] = []
    for fetch in fetches:
        if run and not _follows(run[-1], fetch):
            yield run
            run = []
        run.append(fetch)
    if run:
        yield run


def _follows(before: Fetch, after: Fetch) -> bool:
    is_between_the_same = (before.set, before.layer, before.member, before.source) == (
        after.set,
        after.layer,
        after.member,
        after.source,
    )
    follows_there = before.held_in >= 0 and after.held_in == before.held_in + 1
    follows_here = not (before.slots or after.slots) or (
        bool(before.slots and after.slots) and after.slots[0] == before.slots[0] + 1
    )
    return is_between_the_same and follows_there and follows_here


def _find_holders(before: Sequence[Sequence[int]]) -> dict[int, list[int]]:
    holders: dict[int, list[int]] = {}
    for place, slots in enumerate(before):
        for expert in set(slots):
            holders.setdefault(expert, []).append(place)
    return holders


def _find_changes(before: list[int], wanted: list[int]) -> Iterator[tuple[int, tuple[int, ...]]]:
    stays = len(before) == len(wanted)
    changed: dict[int, list[int]] = {}
    for slot, expert in enumerate(wanted):
        if expert >= 0 and not (stays and before[slot] == expert):
            changed.setdefault(expert, []).append(slot)
    for expert in sorted(changed):
        yield expert, tuple(changed[expert])


class _Given:
    """What participants give so far, and who gives next; places are those among participants."""

    def __init__(self, plan: MembershipPlan) -> None:
        self._nodes = [plan.nodes.get(name, "") for name in plan.participants]
        self._bytes = [0] * len(self._nodes)

    def add(self, place: int, num_bytes: int) -> None:
        self._bytes[place] += num_bytes

    def choose(self, holders: Sequence[int], member: int) -> int:
        if member in holders:
            return member
        node = self._nodes[member]
        return min(
            holders,
            key=lambda place: (self._nodes[place] != node, self._bytes[place], place),
            default=RESTORE,
        )
