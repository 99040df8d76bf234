"""What the controller makes of a change: the plan that ranks get, and what its users are told."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Literal

from equipoise.elastic.channel import Message
from equipoise.elastic.membership import Deadlines, MembershipPlan, Serving
from equipoise.elastic.orders import Change
from equipoise.elastic.placing import Redundancy, order_by_node
from equipoise.elastic.planning import plan_change, plan_recovery, rehearse
from equipoise.elastic.roster import Roster, sort_names
from equipoise.elastic.service import ScaleReport
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import MembershipError


def make_plan(change: Change, roster: Roster, spec: ServiceSpec, generation: int) -> MembershipPlan:
    """Plan a change from what the ranks that serve have told of themselves.

    Raises: MembershipError if it cannot be.
    """
    serving = roster.serving()
    parts = [Serving.from_json(one.told["holding"]["serving"]) for one in serving]
    deadlines = Deadlines(spec.change_s, spec.timeout_s, spec.timeout_s)
    redundancy = Redundancy.of(spec.config, spec.slots_per_rank)
    nodes = roster.find_nodes()
    if change.kind == "recover":
        return plan_recovery(
            Serving.join(parts),
            generation,
            redundancy,
            deadlines,
            backup=spec.host_backup,
            nodes=nodes,
        )
    for one in serving[1:]:
        if one.told["holding"]["fingerprints"] != serving[0].told["holding"]["fingerprints"]:
            raise MembershipError(
                f"{one.name} and {serving[0].name} do not agree on where experts are"
            )
    names = {record.name for record in serving} - set(change.leaving) | set(change.joining)
    members = sort_names(names)
    return plan_change(
        Serving.join(parts), members, generation, redundancy, deadlines, spec.host_backup, nodes
    )


def order_begin(roster: Roster, joining: Sequence[str], generation: int) -> dict[str, Message]:
    """What each rank of the first generation is told, by name."""
    names, num_nodes = order_by_node(joining, roster.find_nodes())
    return {
        name: {
            "do": "begin",
            "generation": generation,
            "number": number,
            "names": names,
            "num_nodes": num_nodes,
            "device_group": choose_device_group(roster, names),
        }
        for number, name in enumerate(names)
    }


def order_prepare(roster: Roster, plan: MembershipPlan) -> Message:
    """What all participants of a change are told."""
    members = [member.name for member in plan.members]
    group = choose_device_group(roster, members)
    return {"do": "prepare", "plan": plan.to_json(), "device_group": group}


def foretell(
    change: Change, plan: MembershipPlan, roster: Roster, serving: int, device: str
) -> ScaleReport:
    """What a change will take, of which nothing is done.

    Args:
        change: that was asked for.
        plan: of it.
        roster: whose steps say how long the first one behind the switch will take.
        serving: the generation that serves.
        device: kind of device that weights are on.
    """
    expected = rehearse(plan, device)
    step_s = max((one.step_s for one in roster.serving()), default=0.0)
    return ScaleReport(
        dry_run=True,
        done=False,
        generation=serving,
        joining=tuple(change.joining),
        leaving=tuple(change.leaving),
        staying=tuple(one.name for one in plan.members if not one.is_newcomer),
        bytes=expected.bytes,
        peak_bytes_per_rank=dict(expected.peak_bytes_per_rank),
        pause_s=expected.pause_s + step_s,
        notes=expected.notes,
    )


def describe_change(change: Change, roster: Roster, generation: int, *, done: bool) -> ScaleReport:
    """What a change did, or what is known of it so far.

    Args:
        change: that was asked for.
        roster: as it is now.
        generation: that serves.
        done: whether it is done.
    """
    serving = roster.serving()
    now = time.monotonic()
    return ScaleReport(
        dry_run=False,
        done=done,
        generation=generation,
        joining=tuple(change.joining),
        leaving=tuple(change.leaving),
        staying=tuple(r.name for r in serving if r.name not in change.joining),
        bytes=0 if change.plan is None else rehearse(change.plan).bytes,
        pause_s=max((r.pause_s for r in serving if r.name not in change.joining), default=0.0),
        prepare_s=(change.decided_at or now) - change.warm_at,
        total_s=(change.full_at or now) - change.warm_at,
        newcomer_bytes_per_s=min(
            (r.pull_bytes_per_s for r in serving if r.name in change.joining and done),
            default=None,
        ),
    )


def choose_device_group(roster: Roster, names: Sequence[str]) -> Literal["gloo", "nccl"]:
    """What carries tokens: NCCL refuses two ranks on one GPU, gloo does not."""
    records = [roster.find(name) for name in names]
    devices = [(one.node, one.seat.device) for one in records if one is not None]
    alone = len(set(devices)) == len(devices)
    return "nccl" if devices[0][1].startswith("cuda") and alone else "gloo"
