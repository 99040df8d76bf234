from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError
from equipoise.load.balancedness import weigh_balancedness, weigh_balancedness_per_layer
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.placement import Placement, measure_balancedness, place_in_order, spread_load
from equipoise.topology import Topology
from tests.placements import make_random_placement

CPU = torch.device("cpu")


def fold(slot_counts: np.ndarray, placement: Placement) -> np.ndarray:
    """Tokens per expert, slot by slot."""
    logical = np.zeros((placement.num_layers, placement.num_experts), dtype=np.int64)
    for layer, slot in zip(*np.nonzero(placement.slot_to_expert >= 0), strict=True):
        logical[layer, placement.slot_to_expert[layer, slot]] += slot_counts[layer, slot]
    return logical


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_tokens_are_counted_by_slot_and_padding_is_not(dtype: torch.dtype) -> None:
    recorder = LoadRecorder(2, 4, CPU)
    recorder.record(0, torch.tensor([[0, 3], [3, -1], [-1, -1]], dtype=dtype))
    recorder.record(1, torch.tensor([2, 2], dtype=dtype))
    recorder.record(0, torch.tensor([[1]], dtype=dtype))
    recorder.record(1, torch.empty(0, 2, dtype=dtype))
    assert recorder.counts.tolist() == [[1, 1, 0, 2], [0, 0, 2, 0]]
    recorder.clear()
    assert recorder.counts.tolist() == [[0] * 4] * 2


def test_counts_stay_at_one_address_and_the_switch_lives_on_the_device() -> None:
    # What a captured graph replays: the same kernels on the same addresses.
    recorder = LoadRecorder(1, 3, CPU)
    counts = recorder.counts
    slot_ids = torch.tensor([0, 1, 2, 2])
    recorder.record(0, slot_ids)
    assert recorder.enabled
    recorder.enabled = False
    recorder.record(0, slot_ids)
    assert not recorder.enabled
    assert counts.tolist() == [[1, 1, 2]]
    recorder.enabled = True
    recorder.record(0, slot_ids)
    recorder.clear()
    recorder.record(0, slot_ids)
    assert counts.data_ptr() == recorder.counts.data_ptr()
    assert counts.tolist() == [[1, 1, 2]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_captured_graph_counts_and_can_be_switched_off() -> None:
    device = torch.device("cuda")
    recorder = LoadRecorder(1, 3, device)
    slot_ids = torch.tensor([[0, 2], [2, -1]], device=device)
    recorder.record(0, slot_ids)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorder.record(0, slot_ids)
    recorder.clear()
    graph.replay()
    slot_ids.fill_(1)
    graph.replay()
    recorder.enabled = False
    graph.replay()
    assert recorder.counts.tolist() == [[1, 4, 2]]


@given(
    st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(0, 12), st.sampled_from([0.0, 0.5])
)
@settings(max_examples=60)
def test_the_window_sums_the_last_steps_each_by_its_own_placement(
    seed: int, window_size: int, num_steps: int, empty_share: float
) -> None:
    rng = np.random.default_rng(seed)
    topology = Topology(2, 4)
    window = LoadWindow(3, 5, window_size, CPU)
    steps = [np.zeros((3, 5), dtype=np.int64)]
    for _ in range(num_steps):
        placement = make_random_placement(rng, 3, 5, topology, empty_share=empty_share)
        slot_counts = rng.integers(0, 1000, (3, topology.num_slots))
        window.push(torch.tensor(slot_counts), torch.tensor(placement.slot_to_expert))
        steps.append(fold(slot_counts, placement))
        assert window.newest().tolist() == steps[-1].tolist()
        assert window.sum().tolist() == np.sum(steps[-window_size:], axis=0).tolist()
    window.clear()
    assert window.sum().sum() == window.newest().sum() == 0
    window.push(torch.tensor([[1] * 8] * 3), torch.tensor([[0, 1, 2, 3, 4, -1, -1, 0]] * 3))
    assert window.sum().tolist() == [[2, 1, 1, 1, 1]] * 3


def test_window_sums_are_exact_beyond_32_bits_and_are_copies() -> None:
    window = LoadWindow(1, 1, 4, CPU)
    most = 2**31 - 1
    for _ in range(6):
        window.push(torch.tensor([[most]]), torch.tensor([[0]]))
    before = window.sum()
    assert before.item() == 4 * most
    window.push(torch.tensor([[0]]), torch.tensor([[0]]))
    assert before.item() == 4 * most
    assert window.sum().item() == 3 * most


def test_a_window_of_no_steps_is_refused() -> None:
    with pytest.raises(ConfigError, match="window_size must be at least 1, got 0"):
        LoadWindow(1, 1, 0, CPU)


def test_balancedness_is_weighed_by_tokens_and_steps_do_not_cancel_out() -> None:
    placement = place_in_order(1, 2, Topology(2, 1))
    # Each step is one-sided, their sum is even.
    assert weigh_balancedness([[[10, 0]], [[0, 10]]], placement) == 0.5
    # 100 even tokens and 2 one-sided ones: (50 + 1) / (50 + 2).
    assert weigh_balancedness([[[50, 50]], [[2, 0]]], placement) == pytest.approx(51 / 52)
    assert weigh_balancedness([[[0, 0]]], placement) == 1.0
    assert weigh_balancedness(np.zeros((0, 1, 2)), placement) == 1.0


def test_balancedness_per_layer_leaves_layers_apart() -> None:
    placement = place_in_order(3, 4, Topology(2, 3))
    counts = np.array([[[4, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]])
    per_layer = weigh_balancedness_per_layer(counts, placement)
    assert per_layer.tolist() == measure_balancedness(spread_load(counts[0], placement)).tolist()
    assert per_layer[2] == 1.0
    assert weigh_balancedness(counts[:, :1], place_in_order(1, 4, Topology(2, 3))) == per_layer[0]
