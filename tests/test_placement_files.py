from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import Placement
from equipoise.placement_files import PlacementFormat, read_placement, write_placement
from equipoise.topology import Topology
from tests.placements import make_random_placement, topologies

TOPOLOGY = Topology(2, 2)
PLACEMENT = Placement(np.array([[0, 1, 2, 0], [2, 2, 1, 0]]), 3, TOPOLOGY)
ASCEND = {
    "moe_layer_count": 2,
    "layer_list": [
        {
            "layer_id": 0,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [0, 1]},
                {"device_id": 1, "device_expert": [2, 0]},
            ],
        },
        {
            "layer_id": 1,
            "device_count": 2,
            "device_list": [
                {"device_id": 0, "device_expert": [2, 2]},
                {"device_id": 1, "device_expert": [1, 0]},
            ],
        },
    ],
}


@pytest.mark.parametrize("format_", get_args(PlacementFormat))
@given(topology=topologies(), seed=st.integers(0, 2**32 - 1), data=st.data())
@settings(
    max_examples=15,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
def test_what_is_written_is_read_again(
    tmp_path: Path,
    format_: PlacementFormat,
    topology: Topology,
    seed: int,
    data: st.DataObject,
) -> None:
    num_experts = data.draw(st.integers(1, topology.num_slots))
    placement = make_random_placement(np.random.default_rng(seed), 3, num_experts, topology)
    first_layer = data.draw(st.integers(0, 3)) if format_ == "sglang" else 0
    suffix = data.draw(st.sampled_from([".json", ".pt", ".yaml", ""]))
    path = tmp_path / f"placement{suffix}"
    write_placement(placement, path, format_, first_layer=first_layer)
    assert read_placement(path, topology=topology, first_layer=first_layer) == placement
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]
    path.unlink()


def test_ours_says_everything_empty_slots_too(tmp_path: Path) -> None:
    placement = Placement(np.array([[0, -1, 1, 1]]), 2, Topology(2, 2, 2))
    path = tmp_path / "placement.json"
    write_placement(placement, path)
    assert read_placement(path) == placement
    assert json.loads(path.read_text())["format_version"] == 1


def test_sglang_gets_a_row_for_every_layer_of_the_model(tmp_path: Path) -> None:
    expected = [[0, 1, 2, 0], [0, 1, 2, 0], [2, 2, 1, 0]]
    write_placement(PLACEMENT, tmp_path / "p.json", "sglang", first_layer=1)
    record = json.loads((tmp_path / "p.json").read_text())
    assert record == {"physical_to_logical_map": expected}
    write_placement(PLACEMENT, tmp_path / "p.pt", "sglang", first_layer=1)
    record = torch.load(tmp_path / "p.pt", weights_only=True)
    assert list(record) == ["physical_to_logical_map"]
    assert record["physical_to_logical_map"].dtype == torch.int64
    assert record["physical_to_logical_map"].tolist() == expected


def test_tensorrt_llm_gets_layers_by_their_number_in_the_model(tmp_path: Path) -> None:
    path = tmp_path / "moe_load_balancer.yaml"
    write_placement(PLACEMENT, path, "tensorrt-llm", first_layer=9)
    assert yaml.safe_load(path.read_text()) == {
        "num_slots": 4,
        "initial_global_assignments": {9: [0, 1, 2, 0], 10: [2, 2, 1, 0]},
        "layer_updates_per_iter": 0,
    }
    assert read_placement(path, topology=TOPOLOGY) == PLACEMENT


def test_vllm_ascend_gets_experts_by_device(tmp_path: Path) -> None:
    path = tmp_path / "expert_map.json"
    write_placement(PLACEMENT, path, "vllm-ascend")
    assert json.loads(path.read_text()) == ASCEND
    assert read_placement(path) == PLACEMENT


def test_vllm_dumps_are_read_with_their_other_maps(tmp_path: Path) -> None:
    path = tmp_path / "state.pt"
    table = torch.tensor(PLACEMENT.slot_to_expert, dtype=torch.int32)
    counts = torch.tensor(PLACEMENT.replica_counts)
    torch.save({"physical_to_logical_map": table, "logical_replica_count": counts}, path)
    assert read_placement(path, topology=TOPOLOGY) == PLACEMENT


def test_layers_and_devices_are_taken_by_number_not_by_order(tmp_path: Path) -> None:
    path = tmp_path / "placement"
    shuffled = json.loads(json.dumps(ASCEND))
    shuffled["layer_list"].reverse()
    shuffled["layer_list"][0]["device_list"].reverse()
    path.write_text(json.dumps(shuffled))
    assert read_placement(path) == PLACEMENT
    assignments = {"10": [2, 2, 1, 0], "9": [0, 1, 2, 0]}
    path.write_text(json.dumps({"num_slots": 4, "initial_global_assignments": assignments}))
    assert read_placement(path, topology=TOPOLOGY) == PLACEMENT


def test_what_is_known_already_must_agree(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_placement(PLACEMENT, path)
    with pytest.raises(PlacementError, match=r"p\.json: num_experts is 3, expected 4"):
        read_placement(path, num_experts=4)
    with pytest.raises(PlacementError, match=r"p\.json: it is for .*num_ranks=2.* expected .*=4"):
        read_placement(path, topology=Topology(4, 1))
    write_placement(PLACEMENT, path, "vllm-ascend")
    with pytest.raises(PlacementError, match="for 2 ranks of 2 slots, expected 4 of 1"):
        read_placement(path, topology=Topology(4, 1))
    assert read_placement(path, topology=Topology(2, 2, 2)).topology.num_nodes == 2
    write_placement(PLACEMENT, path, "sglang")
    with pytest.raises(PlacementError, match=r"does not say how many ranks .* give the topology"):
        read_placement(path)
    with pytest.raises(PlacementError, match="layer 0: expert 3 has no slot"):
        read_placement(path, topology=TOPOLOGY, num_experts=4)
    with pytest.raises(PlacementError, match="has 2 layers, so the first MoE layer cannot be 2"):
        read_placement(path, topology=TOPOLOGY, first_layer=2)


def change_ascend(*path: str | int, to: object) -> dict[str, object]:
    record = json.loads(json.dumps(ASCEND))
    target = record
    for key in path[:-1]:
        target = target[key]
    if to is ...:
        del target[path[-1]]
    else:
        target[path[-1]] = to
    return record


DEVICE = ("layer_list", 1, "device_list", 0)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "an object with named fields"),
        ({}, "no known placement: expected format_version, .* got nothing"),
        ({"weights": 1, "bias": 2}, "no known placement: .* got weights, bias"),
        ({"logical_count": [[1, 2]]}, "logical_count is a load, not a placement"),
        ({"format_version": 7}, "format_version is 7"),
        ({"physical_to_logical_map": [[0, 1], [0]]}, r"rows of one length|\[layers\]\[slots\]"),
        ({"physical_to_logical_map": [[0, 1.5, 1, 0]]}, "physical_to_logical_map must be"),
        ({"physical_to_logical_map": []}, "physical_to_logical_map must be"),
        ({"physical_to_logical_map": "0101"}, "physical_to_logical_map must be"),
        ({"physical_to_logical_map": [[0, 1, 1, 3]]}, "expert 2 has no slot"),
        ({"physical_to_logical_map": [[0, 1]]}, "2 slots per layer, but 2 ranks of 2"),
        ({"initial_global_assignments": None}, "must be dict, got NoneType"),
        ({"initial_global_assignments": {}}, "initial_global_assignments is empty"),
        ({"initial_global_assignments": {"a": [0, 1, 0, 1]}}, "must be numbered by layer"),
        ({"initial_global_assignments": {"3": [0, 1, 0, 1]}}, "has 4 .* num_slots is None"),
        ({"initial_global_assignments": {"3": [0]}, "num_slots": 4}, "has 1 slots .* is 4"),
        (change_ascend("layer_list", to=3), "layer_list must be list, got int"),
        (change_ascend("layer_list", to=[]), "layer_list is empty"),
        (change_ascend("layer_list", to=[4, 4]), "layer_list must hold objects with layer_id"),
        (change_ascend("moe_layer_count", to=3), "moe_layer_count is 3, layer_list has 2"),
        (change_ascend("layer_list", 1, "layer_id", to=0), "layer_list has a layer_id twice"),
        (change_ascend("layer_list", 1, "layer_id", to=...), "layer_id is missing"),
        (change_ascend("layer_list", 1, "device_count", to=5), "layer_id 1: device_count is 5"),
        (
            change_ascend(*DEVICE, "device_id", to=1),
            "layer_id 1: device_list has a device_id twice",
        ),
        (change_ascend(*DEVICE, "device_expert", to=...), "layer_id 1: device_expert is missing"),
        (change_ascend(*DEVICE, "device_expert", to=[0]), "device_expert must be .* one length"),
    ],
)
def test_files_that_are_no_placement_are_refused_by_field(
    tmp_path: Path, record: object, message: str
) -> None:
    path = tmp_path / "odd.json"
    path.write_text(json.dumps(record))
    with pytest.raises(PlacementError, match=rf"odd\.json: .*({message})"):
        read_placement(path, topology=TOPOLOGY)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"physical_to_logical_map": [[0, 1', "neither JSON .* nor YAML"),
        (b"\xff\xfe\x00", "neither JSON, YAML nor a torch.save file"),
        (b"PK\x03\x04 and then nothing", "not a torch.save file of plain tensors"),
        (b"", "a placement is an object with named fields"),
    ],
)
def test_files_that_are_broken_are_refused(tmp_path: Path, data: bytes, message: str) -> None:
    path = tmp_path / "odd"
    path.write_bytes(data)
    with pytest.raises(PlacementError, match=rf"odd: {message}"):
        read_placement(path, topology=TOPOLOGY)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match=r"absent\.json: No such file"):
        read_placement(tmp_path / "absent.json")


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "save", [torch.save, lambda thing, path: path.write_bytes(pickle.dumps(thing))]
)
def test_nothing_in_a_file_is_executed(tmp_path: Path, save: object) -> None:
    path = tmp_path / "odd.pt"
    save({"physical_to_logical_map": Hostile(tmp_path / "proof")}, path)  # type: ignore[operator]
    with pytest.raises(PlacementError, match=r"odd\.pt: not a torch\.save file of plain tensors"):
        read_placement(path, topology=TOPOLOGY)
    assert not (tmp_path / "proof").exists()


def test_what_a_format_cannot_say_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    holes = Placement(np.array([[0, 1, 1, 0], [0, 1, -1, 1]]), 2, TOPOLOGY)
    for format_ in get_args(PlacementFormat):
        if format_ != "equipoise":
            with pytest.raises(PlacementError, match=f"layer 1, slot 2 is empty, .* {format_}"):
                write_placement(holes, tmp_path / "p", format_)
    with pytest.raises(ConfigError, match="no placement format 'vllm': there are equipoise, sgl"):
        write_placement(PLACEMENT, tmp_path / "p", "vllm")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="first_layer must be 0 or more, got -1"):
        write_placement(PLACEMENT, tmp_path / "p", "sglang", first_layer=-1)
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file_and_no_part_of_the_new(tmp_path: Path) -> None:
    path = tmp_path / "p.json"
    write_placement(PLACEMENT, path)
    other = Placement(PLACEMENT.slot_to_expert[::-1], 3, TOPOLOGY)
    write_placement(other, path)
    assert read_placement(path) == other
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        write_placement(PLACEMENT, tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["folder", "p.json"]
