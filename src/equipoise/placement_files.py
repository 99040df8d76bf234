"""Placements in files: our own format, and those of the engines around us."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import yaml

from equipoise.errors import ConfigError, PlacementError
from equipoise.placement import EMPTY, Placement
from equipoise.topology import Topology

PlacementFormat = Literal["equipoise", "sglang", "tensorrt-llm", "vllm-ascend"]


def read_placement(
    path: Path,
    *,
    num_experts: int | None = None,
    topology: Topology | None = None,
    first_layer: int = 0,
) -> Placement:
    """Read a placement, of whatever known format the file turns out to be.

    Known are ours (`format_version`), SGLang's and vLLM's `physical_to_logical_map` in JSON or
    torch.save files, TensorRT-LLM's load balancer YAML, and vllm-ascend's expert map.

    Args:
        path: the file; what is in it decides, not its name.
        num_experts: E; None for what the file says, or its highest expert + 1.
        topology: ranks and nodes, where the file does not say them; they must agree where it does.
        first_layer: layer of the model that is its first MoE layer; a `physical_to_logical_map`
            has rows for the dense layers before it too, which are left out.
    Collective: none.
    Raises: PlacementError, naming the file and the field.
    """
    try:
        placement = _read(path.read_bytes(), num_experts, topology, first_layer)
        if num_experts not in (None, placement.num_experts):
            raise PlacementError(f"num_experts is {placement.num_experts}, expected {num_experts}")
        if topology not in (None, placement.topology):
            raise PlacementError(f"it is for {placement.topology}, expected {topology}")
    except OSError as error:
        raise PlacementError(f"{path}: {error.strerror}") from error
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from error
    return placement


def write_placement(
    placement: Placement,
    path: Path,
    format: PlacementFormat = "equipoise",  # noqa: A002 - the word that users type
    *,
    first_layer: int = 0,
) -> None:
    """Write a placement; the file is there whole or not at all.

    Args:
        placement: what to write. Only our own format can say that a slot is empty.
        path: replaced if it exists. For SGLang a name that ends in .pt gives a torch.save file.
        format: who shall read it.
        first_layer: layer of the model that is its first MoE layer. SGLang and TensorRT-LLM count
            all layers; SGLang's dense ones get experts in order.
    Collective: none; one rank writes.
    Raises: ConfigError if the format is unknown or first_layer negative; PlacementError if the
        format cannot say that a slot is empty; OSError if the file cannot be written.
    """
    if format not in get_args(PlacementFormat):
        raise ConfigError(
            f"no placement format {format!r}: there are {', '.join(get_args(PlacementFormat))}"
        )
    if first_layer < 0:
        raise ConfigError(f"first_layer must be 0 or more, got {first_layer}")
    empty = np.argwhere(placement.slot_to_expert == EMPTY)
    if format != "equipoise" and empty.size:
        layer, slot = empty[0]
        raise PlacementError(
            f"layer {layer}, slot {slot} is empty, which a file for {format} cannot say"
        )
    if format == "equipoise":
        data = placement.to_json().encode()
    elif format == "sglang":
        data = _for_sglang(placement, first_layer, as_torch=path.suffix == ".pt")
    elif format == "tensorrt-llm":
        data = _for_tensorrt_llm(placement, first_layer)
    else:
        data = _for_vllm_ascend(placement)
    _replace(path, data)


def _read(
    data: bytes, num_experts: int | None, topology: Topology | None, first_layer: int
) -> Placement:
    record = _parse(data)
    if not isinstance(record, dict):
        raise PlacementError("a placement is an object with named fields")
    if "format_version" in record:
        return Placement.from_json(data.decode())
    if "physical_to_logical_map" in record:
        table = _from_map(record, first_layer)
    elif "layer_list" in record:
        table, said = _from_devices(record)
        if topology and (topology.num_ranks, topology.slots_per_rank) != said:
            raise PlacementError(
                f"layer_list is for {said[0]} ranks of {said[1]} slots, expected "
                f"{topology.num_ranks} of {topology.slots_per_rank}"
            )
        topology = topology or Topology(*said)
    elif "initial_global_assignments" in record:
        table = _from_assignments(record)
    elif "logical_count" in record:
        raise PlacementError("logical_count is a load, not a placement: make a plan from it first")
    else:
        raise PlacementError(
            "no known placement: expected format_version, physical_to_logical_map, layer_list or "
            f"initial_global_assignments, got {', '.join(map(str, record)) or 'nothing'}"
        )
    if topology is None:
        raise PlacementError("the file does not say how many ranks there are: give the topology")
    return Placement(table, int(table.max()) + 1 if num_experts is None else num_experts, topology)


def _parse(data: bytes) -> Any:
    if data.startswith((b"PK\x03\x04", b"\x80")):
        import torch

        try:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            # Whatever a broken or a hostile file makes the reader say.
            reason = str(error).partition("\n")[0]
            raise PlacementError(f"not a torch.save file of plain tensors: {reason}") from error
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise PlacementError("neither JSON, YAML nor a torch.save file") from error
    try:
        return json.loads(text)
    except json.JSONDecodeError as of_json:
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise PlacementError(f"neither JSON ({of_json}) nor YAML") from error


def _from_map(record: dict[Any, Any], first_layer: int) -> Any:
    table = _make_table(record["physical_to_logical_map"], "physical_to_logical_map")
    if not 0 <= first_layer < len(table):
        raise PlacementError(
            f"physical_to_logical_map has {len(table)} layers, so the first MoE layer cannot be "
            f"{first_layer}"
        )
    return table[first_layer:]


def _from_assignments(record: dict[Any, Any]) -> Any:
    key = "initial_global_assignments"
    by_layer = _get(record, key, dict, "")
    table = _make_table([by_layer[layer] for layer in _in_order(by_layer, key)], key)
    if table.shape[1] != record.get("num_slots"):
        raise PlacementError(
            f"{key} has {table.shape[1]} slots per layer, num_slots is {record.get('num_slots')!r}"
        )
    return table


def _from_devices(record: dict[Any, Any]) -> tuple[Any, tuple[int, int]]:
    """The table, and ranks and slots per rank as the file has them."""
    layers = _by_number(record, "layer_list", "layer_id", "")
    if record.get("moe_layer_count") != len(layers):
        raise PlacementError(
            f"moe_layer_count is {record.get('moe_layer_count')!r}, layer_list has {len(layers)}"
        )
    rows = []
    for number, layer in layers.items():
        where = f"layer_id {number}: "
        devices = _by_number(layer, "device_list", "device_id", where)
        if layer.get("device_count") != len(devices):
            raise PlacementError(
                f"{where}device_count is {layer.get('device_count')!r}, "
                f"device_list has {len(devices)}"
            )
        rows.append([_get(device, "device_expert", list, where) for device in devices.values()])
    table = _make_table(rows, "device_expert", "[layers][devices][slots]", 3)
    return table.reshape(len(table), -1), table.shape[1:]


def _by_number(
    record: dict[Any, Any], key: str, number: str, where: str
) -> dict[int, dict[Any, Any]]:
    entries = _get(record, key, list, where)
    if not all(isinstance(entry, dict) for entry in entries):
        raise PlacementError(f"{where}{key} must hold objects with {number}")
    numbered = {_get(entry, number, int, f"{where}{key}: "): entry for entry in entries}
    if len(numbered) != len(entries):
        raise PlacementError(f"{where}{key} has a {number} twice")
    return {at: numbered[at] for at in _in_order(numbered, key)}


def _in_order(numbered: dict[Any, Any], key: str) -> list[Any]:
    if not numbered:
        raise PlacementError(f"{key} is empty")
    try:
        return sorted(numbered, key=int)
    except (TypeError, ValueError) as error:
        raise PlacementError(f"{key} must be numbered by layer") from error


def _get(record: dict[Any, Any], key: str, kind: type, where: str) -> Any:
    if key not in record:
        raise PlacementError(f"{where}{key} is missing")
    value = record[key]
    if not isinstance(value, kind):
        raise PlacementError(f"{where}{key} must be {kind.__name__}, got {type(value).__name__}")
    return value


def _make_table(value: Any, key: str, shape: str = "[layers][slots]", num_axes: int = 2) -> Any:
    try:
        table = np.asarray(value)
    except (TypeError, ValueError) as error:
        raise PlacementError(f"{key} must be {shape}, with rows of one length") from error
    if table.ndim != num_axes or not table.size or table.dtype.kind not in "iu":
        raise PlacementError(f"{key} must be {shape} whole numbers")
    return table


def _for_sglang(placement: Placement, first_layer: int, *, as_torch: bool) -> bytes:
    in_order = np.arange(placement.num_slots) % placement.num_experts
    table = np.concatenate([np.tile(in_order, (first_layer, 1)), placement.slot_to_expert])
    if not as_torch:
        return json.dumps({"physical_to_logical_map": table.tolist()}).encode()
    import torch

    buffer = io.BytesIO()
    torch.save({"physical_to_logical_map": torch.from_numpy(table)}, buffer)
    return buffer.getvalue()


def _for_tensorrt_llm(placement: Placement, first_layer: int) -> bytes:
    rows = (
        f"  {layer}: {row}\n"
        for layer, row in enumerate(placement.slot_to_expert.tolist(), start=first_layer)
    )
    return (
        f"initial_global_assignments:\n{''.join(rows)}"
        f"num_slots: {placement.num_slots}\nlayer_updates_per_iter: 0\n"
    ).encode()


def _for_vllm_ascend(placement: Placement) -> bytes:
    num_ranks = placement.topology.num_ranks
    by_rank = placement.slot_to_expert.reshape(placement.num_layers, num_ranks, -1).tolist()
    layers = [
        {
            "layer_id": layer,
            "device_count": num_ranks,
            "device_list": [
                {"device_id": rank, "device_expert": experts} for rank, experts in enumerate(ranks)
            ],
        }
        for layer, ranks in enumerate(by_rank)
    ]
    return json.dumps({"moe_layer_count": len(layers), "layer_list": layers}).encode()


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with partial.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
