"""The placement on the device, and the choice of replicas by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import PlacementError
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology

CPU = torch.device("cpu")
TOPOLOGY = Topology(2, 3)
FIRST = Placement(np.array([[0, 1, 2, 3, 0, 0], [3, 2, 1, 0, -1, 3]]), 4, TOPOLOGY)
SECOND = Placement(np.array([[3, 2, 1, 0, 1, -1], [0, 1, 2, 3, 1, 2]]), 4, TOPOLOGY)


def test_commit_changes_the_same_tensors_in_place() -> None:
    maps = PlacementMaps(FIRST, CPU)
    tensors = (maps.slot_to_expert, maps.expert_to_slots, maps.replica_counts)
    maps.commit(SECOND)
    assert maps.placement == SECOND
    assert (maps.slot_to_expert, maps.expert_to_slots, maps.replica_counts) == tensors
    np.testing.assert_array_equal(tensors[0], SECOND.slot_to_expert)
    np.testing.assert_array_equal(tensors[1], SECOND.expert_to_slots)
    np.testing.assert_array_equal(tensors[2], SECOND.replica_counts)


def test_commit_of_one_layer_leaves_the_other() -> None:
    maps = PlacementMaps(FIRST, CPU)
    maps.commit(SECOND, [1])
    np.testing.assert_array_equal(maps.slot_to_expert[0], FIRST.slot_to_expert[0])
    np.testing.assert_array_equal(maps.slot_to_expert[1], SECOND.slot_to_expert[1])
    np.testing.assert_array_equal(maps.placement.slot_to_expert, maps.slot_to_expert)


def test_a_placement_of_another_shape_is_refused() -> None:
    maps = PlacementMaps(FIRST, CPU)
    with pytest.raises(PlacementError, match="another shape"):
        maps.commit(place_in_order(2, 4, Topology(3, 2)))


def test_replicas_take_turns_by_position() -> None:
    maps = PlacementMaps(FIRST, CPU)
    experts = torch.tensor([[0, 1]] * 4)
    assert choose_slots(maps, 0, experts).tolist() == [[0, 1], [4, 1], [5, 1], [0, 1]]
    assert choose_slots(maps, 0, experts, 2).tolist() == [[5, 1], [0, 1], [4, 1], [5, 1]]


def test_position_may_be_a_tensor() -> None:
    maps = PlacementMaps(FIRST, CPU)
    experts = torch.tensor([[0, 3], [0, 3]])
    by_number = choose_slots(maps, 1, experts, 7)
    assert torch.equal(by_number, choose_slots(maps, 1, experts, torch.tensor(7)))


def test_padding_goes_nowhere() -> None:
    maps = PlacementMaps(FIRST, CPU)
    slots = choose_slots(
        maps, 0, torch.tensor([[0], [0], [2]]), 1, torch.tensor([True, False, True])
    )
    assert slots.tolist() == [[4], [-1], [2]]


@pytest.mark.parametrize("layer", [0, 1])
def test_every_slot_chosen_holds_the_expert_and_replicas_share_evenly(layer: int) -> None:
    maps = PlacementMaps(FIRST, CPU)
    experts = torch.randint(4, (600, 2), generator=torch.Generator().manual_seed(0))
    slots = choose_slots(maps, layer, experts, 11)
    assert torch.equal(maps.slot_to_expert[layer][slots], experts)
    per_slot = torch.bincount(slots.flatten(), minlength=6)
    for expert in range(4):
        shares = per_slot[maps.slot_to_expert[layer] == expert].double()
        assert shares.max() - shares.min() < 0.25 * shares.mean()
