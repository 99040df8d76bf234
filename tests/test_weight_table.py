"""Rows of experts on the wire: which bytes they are, in as few spans as can be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.comm.byte_views import view_rows
from equipoise.comm.spans import Spans
from equipoise.comm.weight_table import WeightTable, join_touching


def list_ends(spans: Spans) -> list[tuple[int, int]]:
    return list(zip(spans.address.tolist(), spans.num_bytes.tolist(), strict=True))


@pytest.mark.parametrize(
    ("spans", "group", "wanted", "first"),
    [
        ([], [], [], []),
        ([(100, 8), (108, 8), (116, 4)], [0, 0, 0], [(100, 20)], [0]),
        ([(100, 8), (108, 8)], [0, 1], [(100, 8), (108, 8)], [0, 1]),
        ([(108, 8), (100, 8)], [0, 0], [(108, 8), (100, 8)], [0, 1]),
        ([(100, 8), (0, 0), (108, 8), (120, 8)], [0, 0, 0, 0], [(100, 16), (120, 8)], [0, 3]),
        ([(0, 0)], [0], [], []),
    ],
)
def test_spans_that_touch_become_one(
    spans: list[tuple[int, int]],
    group: list[int],
    wanted: list[tuple[int, int]],
    first: list[int],
) -> None:
    columns = np.array(spans, dtype=np.int64).reshape(-1, 2).T
    joined, kept = join_touching(Spans(*columns), np.array(group, dtype=np.int64))
    assert list_ends(joined) == wanted
    assert kept.tolist() == first


def test_neighbours_of_one_tensor_travel_as_one_and_those_of_two_do_not() -> None:
    # Both tensors stand in one block of memory, so that the last row of one touches the other.
    memory = torch.arange(64, dtype=torch.uint8)
    first, second = memory[:32].view(4, 8), memory[32:].view(4, 8)
    table = WeightTable([[first, second]])
    rows = table.list_rows(np.array([1, 1, 1]), np.zeros(3, dtype=np.int64), np.array([2, 3, 0]))
    [(rank, spans, pieces)] = rows.split()
    start = memory.data_ptr()
    assert rank == 1
    assert list_ends(spans) == [(start + at, 8) for at in (16, 24, 0, 48, 56, 32)]
    assert list_ends(pieces) == [(start + 16, 16), (start, 8), (start + 48, 16), (start + 32, 8)]


def test_ranks_get_what_is_theirs() -> None:
    weights = torch.zeros(4, 8, dtype=torch.uint8)
    table = WeightTable([[weights]])
    rows = table.list_rows(np.array([0, 2, 2]), np.zeros(3, dtype=np.int64), np.array([0, 1, 2]))
    start = weights.data_ptr()
    found = [(rank, list_ends(pieces)) for rank, _, pieces in rows.split()]
    assert found == [(0, [(start, 8)]), (2, [(start + 8, 16)])]


def test_rows_land_in_neighbouring_slots_as_one_and_others_in_the_buffer() -> None:
    weights = torch.zeros(4, 8, dtype=torch.uint8)
    table = WeightTable([[weights]])
    slots = np.array([-1, -1, 1, 2])
    rows = table.list_rows(np.zeros(4, dtype=np.int64), np.zeros(4, dtype=np.int64), slots)
    landings = rows.land(slice(None), 1 << 40)
    assert list_ends(landings) == [(1 << 40, 16), (weights.data_ptr() + 8, 16)]


def test_a_table_knows_its_tensors_and_no_others() -> None:
    weights = [[torch.zeros(4, 8), torch.zeros(4, 2)], [torch.zeros(4, 8)]]
    table = WeightTable([[view_rows(tensor) for tensor in layer] for layer in weights])
    # Twice: what was found before is looked at less closely.
    assert table.is_of(weights)
    assert table.is_of(weights)
    assert table.is_of([[tensor.detach() for tensor in layer] for layer in weights])
    first, second = weights[0]
    for others in (
        [[first, second]],
        [[first], [second, *weights[1]]],
        [[first, second], [torch.zeros(4, 8)]],
        [[first.T, second], weights[1]],
        [[first[:2], second], weights[1]],
        [[first.view(8, 4), second], weights[1]],
    ):
        assert not table.is_of(others)
    first.data = torch.zeros(4, 8)
    assert not table.is_of(weights)


def test_an_expert_has_the_bytes_of_all_its_tensors() -> None:
    weights = [[torch.zeros(4, 8), torch.zeros(4, 2)], [torch.zeros(3, 0)]]
    table = WeightTable([[view_rows(tensor) for tensor in layer] for layer in weights])
    assert table.expert_bytes.tolist() == [40, 0]
