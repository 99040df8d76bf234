"""What a change of the membership will be, and what it will take: pure, and without any rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from equipoise.elastic.membership import (
    Deadlines,
    Holding,
    Member,
    MembershipPlan,
    Serving,
    SetShape,
)
from equipoise.elastic.placing import Redundancy, order_by_node, place_members
from equipoise.elastic.shared_weights import list_shared
from equipoise.elastic.traffic import RESTORE, keeps_tensors, list_fetches
from equipoise.errors import MembershipError
from equipoise.models.host_copies import HostBackup
from equipoise.models.parallel import ParallelModel

_SWITCH_S = 2e-3
"""What a switch takes beside copies, as seen: binding the layers, and the first meeting."""
_COPY_BYTES_PER_S = {"cpu": 3e9, "cuda": 1e12}


@dataclass(frozen=True)
class Rehearsal:
    """What a change will take.

    Attributes:
        bytes: weights that travel between ranks.
        restored_bytes: of experts that no rank holds.
        peak_bytes_per_rank: by name, weights held at once during the change.
        pause_s: expected of a serving rank at the switch, beside the first step behind it.
        notes: what else is worth knowing, one line each.
    """

    bytes: int
    restored_bytes: int
    peak_bytes_per_rank: Mapping[str, int]
    pause_s: float
    notes: tuple[str, ...]


def describe(parallel: ParallelModel, names: Sequence[str], only: str | None = None) -> Serving:
    """Say what ranks serve, as one of them knows it.

    Args:
        parallel: what this rank serves; no rebalance is under way.
        names: of all ranks of its generation, by number.
        only: of a rank that shall be told of alone: of this one, where ranks may no longer agree.
    Collective: none; forward thread.
    """
    sets = parallel.spread.sets
    held = {}
    for number, name in enumerate(names):
        if only is None or name == only:
            slots = []
            for one in sets:
                placement = one.maps.placement
                num_slots = placement.topology.slots_per_rank
                first = number * num_slots
                slots.append(placement.slot_to_expert[:, first : first + num_slots])
            held[name] = Holding(tuple(slots))
    return Serving(
        parallel.state.group.generation,
        tuple(
            SetShape(
                one.maps.placement.num_experts,
                tuple(
                    sum(tensor[0].numel() * tensor.element_size() for tensor in layer)
                    for layer in one.weights
                ),
            )
            for one in sets
        ),
        sum(shared.num_bytes for shared in list_shared(parallel.spread)),
        held,
        {names[parallel.state.group.rank]: tuple(sorted(parallel.copies))},
    )


def plan_change(
    serving: Serving,
    members: Sequence[str],
    generation: int,
    redundancy: Redundancy,
    deadlines: Deadlines | None = None,
    backup: HostBackup = "none",
    nodes: Mapping[str, str] | None = None,
) -> MembershipPlan:
    """Plan a change of the ranks that serve.

    Args:
        serving: all of the generation that serves, which commits nothing until the change ends.
        members: names of the next generation's ranks, by number; names that do not serve are
            newcomers', and who serves and is not among them leaves.
        generation: the next one's number, never used before in its store, also not by a change
            that was called off.
        redundancy: slots per rank.
        deadlines: None for the defaults.
        backup: which experts members keep in host memory for each other.
        nodes: where ranks sit, by name; members are numbered node by node.
    Collective: none.
    Raises: MembershipError, with the least size that can, if it cannot hold all experts; or if
        names repeat, there are none, or nobody stays who could give newcomers anything.
    """
    if not members:
        raise MembershipError("a generation needs at least one rank")
    repeated = sorted({name for name in members if list(members).count(name) > 1})
    if repeated:
        raise MembershipError(f"a rank has one seat in a generation: {', '.join(repeated)} repeats")
    if generation <= serving.generation:
        raise MembershipError(
            f"generation {generation} cannot follow generation {serving.generation}"
        )
    return _plan(serving, members, generation, redundancy, deadlines, backup, nodes or {})


def plan_recovery(
    serving: Serving,
    generation: int,
    redundancy: Redundancy,
    deadlines: Deadlines | None = None,
    members: Sequence[str] | None = None,
    backup: HostBackup = "none",
    nodes: Mapping[str, str] | None = None,
) -> MembershipPlan:
    """Plan how survivors go on: each keeps its slots, and what nobody holds is restored.

    Args:
        serving: what the survivors say of themselves, joined.
        generation: as for `plan_change`.
        redundancy: slots per rank.
        deadlines: None for the defaults.
        members: None for the survivors; names beyond them are newcomers'.
        backup: as for `plan_change`.
        nodes: as for `plan_change`.
    Collective: none.
    Raises: as `plan_change`.
    """
    names = tuple(serving.held) if members is None else members
    plan = _plan(serving, names, generation, redundancy, deadlines, backup, nodes or {})
    return replace(plan, is_recovery=True)


def rehearse(plan: MembershipPlan, device: str = "cpu") -> Rehearsal:
    """Say what a change will take.

    Args:
        plan: of the change.
        device: kind of device that weights are on.
    Collective: none.
    """
    fetches = list_fetches(plan)
    travelling = sum(fetch.num_bytes for fetch in fetches if fetch.travels)
    restored = sum(fetch.num_bytes for fetch in fetches if fetch.source == RESTORE)
    shared = plan.serving.shared_bytes * len(plan.newcomers)
    staged = _count_staged(plan)
    pause_s = _SWITCH_S + max(staged.values(), default=0) / _COPY_BYTES_PER_S.get(device, 3e9)
    notes = [
        f"{name} leaves: what only it holds is with the others before the switch"
        for name in plan.leavers
    ]
    for index, shape in enumerate(plan.serving.shapes):
        slots = plan.placements[index].topology.slots_per_rank
        of = "" if len(plan.placements) == 1 else f" of {shape.num_experts} experts"
        notes.append(
            f"{slots} slots per rank in each layer{of}, "
            f"{slots * len(plan.members) - shape.num_experts} redundant"
        )
    if restored:
        notes.append(f"{restored} bytes of experts that no rank holds are restored")
    return Rehearsal(
        travelling + shared,
        restored,
        {name: _find_peak(plan, name, staged.get(name, 0)) for name in plan.participants},
        pause_s,
        tuple(notes),
    )


def _plan(
    serving: Serving,
    names: Sequence[str],
    generation: int,
    redundancy: Redundancy,
    deadlines: Deadlines | None,
    backup: HostBackup,
    nodes: Mapping[str, str],
) -> MembershipPlan:
    names, num_nodes = order_by_node(names, nodes)
    placements = []
    for index, shape in enumerate(serving.shapes):
        num_slots = redundancy.choose_slots(shape.num_experts, len(names))
        nothing = Holding.nothing(serving.shapes)
        held = [serving.held.get(name, nothing).slots[index] for name in names]
        placements.append(place_members(held, shape.num_experts, num_slots, num_nodes))
    return MembershipPlan(
        generation,
        serving,
        tuple(Member(name, number, name not in serving.held) for number, name in enumerate(names)),
        tuple(name for name in serving.held if name not in names),
        tuple(placements),
        deadlines or Deadlines(),
        backup=backup,
        nodes={name: nodes[name] for name in (*names, *serving.held) if name in nodes},
    )


def find_room(plan: MembershipPlan, name: str) -> int:
    """Bytes that a participant needs beside what it holds.

    Args:
        plan: of the change.
        name: of the participant.
    Collective: none.
    """
    held = sum(
        plan.find_holding(name).slots[index].shape[1] * sum(shape.expert_bytes)
        for index, shape in enumerate(plan.serving.shapes)
    )
    if name not in plan.newcomers:
        held += plan.serving.shared_bytes
    return int(_find_peak(plan, name, _count_staged(plan).get(name, 0)) - held)


def _count_staged(plan: MembershipPlan) -> dict[str, int]:
    """Bytes that each member's switch copies into slots that are in use until then."""
    staged: dict[str, int] = {}
    for fetch in list_fetches(plan):
        name = plan.members[fetch.member].name
        if keeps_tensors(plan, name, fetch.set):
            staged[name] = staged.get(name, 0) + fetch.num_bytes
    return staged


def _find_peak(plan: MembershipPlan, name: str, staged: int) -> int:
    total = plan.serving.shared_bytes + staged
    for index, shape in enumerate(plan.serving.shapes):
        per_slot = sum(shape.expert_bytes)
        total += plan.find_holding(name).slots[index].shape[1] * per_slot
        if name not in plan.leavers and not keeps_tensors(plan, name, index):
            total += plan.placements[index].topology.slots_per_rank * per_slot
    return total
