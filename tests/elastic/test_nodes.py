"""Where ranks sit: how they are numbered, and from whom newcomers get their experts."""

from __future__ import annotations

import socket

import numpy as np
import pytest

from equipoise.elastic.interface import find_address, find_name, list_interfaces
from equipoise.elastic.membership import Holding, MembershipPlan, Serving, SetShape
from equipoise.elastic.placing import Redundancy, order_by_node
from equipoise.elastic.planning import plan_change, plan_recovery
from equipoise.elastic.traffic import list_fetches
from equipoise.errors import ConfigError

NODES = {"rank-0": "a", "rank-1": "b", "rank-2": "a", "rank-3": "b"}


@pytest.mark.parametrize(
    ("names", "ordered", "num_nodes"),
    [
        (["rank-0", "rank-1", "rank-2", "rank-3"], ["rank-0", "rank-2", "rank-1", "rank-3"], 2),
        (["rank-0", "rank-1", "rank-2"], ["rank-0", "rank-2", "rank-1"], 1),
        (["rank-1", "rank-3"], ["rank-1", "rank-3"], 1),
        (["rank-3", "rank-2"], ["rank-3", "rank-2"], 2),
        (["x", "y"], ["x", "y"], 1),
    ],
)
def test_ranks_are_numbered_node_by_node(
    names: list[str], ordered: list[str], num_nodes: int
) -> None:
    assert order_by_node(names, NODES) == (ordered, num_nodes)


def _serve(names: list[str]) -> Serving:
    """Two layers of four experts; each rank holds all of them."""
    held = {name: Holding((np.tile(np.arange(4), (2, 1)),)) for name in names}
    return Serving(0, (SetShape(4, (10, 10)),), 100, held)


def test_newcomers_get_experts_from_their_own_node() -> None:
    serving = _serve(["rank-0", "rank-1"])
    members = ["rank-0", "rank-1", "rank-2", "rank-3"]
    plan = plan_change(serving, members, 1, Redundancy(4), nodes=NODES)
    assert [one.name for one in plan.members] == ["rank-0", "rank-2", "rank-1", "rank-3"]
    assert plan.placements[0].topology.num_nodes == 2
    assert MembershipPlan.from_json(plan.to_json()).nodes == NODES
    given = {
        (plan.participants[fetch.source], plan.participants[fetch.member])
        for fetch in list_fetches(plan)
    }
    assert given == {("rank-0", "rank-2"), ("rank-1", "rank-3")}
    # With nobody's node known both give as much.
    told = list_fetches(plan_change(serving, members, 1, Redundancy(4)))
    givers = [fetch.source for fetch in told if fetch.member == 2]
    assert givers.count(0) == givers.count(1) == 4


def test_a_node_that_was_lost_leaves_the_others_of_one_node() -> None:
    plan = plan_recovery(_serve(["rank-1", "rank-3"]), 5, Redundancy(4), nodes=NODES)
    assert plan.is_recovery
    assert plan.placements[0].topology.num_nodes == 1


def test_interfaces_are_named_or_addressed() -> None:
    assert list_interfaces()["lo"] == "127.0.0.1"
    assert find_address("lo") == find_address("127.0.0.1") == "127.0.0.1"
    assert find_name("127.0.0.1") == "lo"
    assert find_name("203.0.113.1") is None
    for wrong in ("eth99", "203.0.113.1", "0.0.0.0", socket.gethostname() + ".nowhere"):
        with pytest.raises(ConfigError, match=r"is no interface of this host: there are .*lo "):
            find_address(wrong)
