"""Load files of every known format, and those that are refused, with what is said."""

from __future__ import annotations

import io
import json
import os
import pickle
import zipfile

import numpy as np
import pytest
import torch

from equipoise.errors import TraceError
from equipoise.load.trace_files import read_trace
from equipoise.load.trace_routes import Serving

SUMS = [[3, 1, 2], [1, 4, 1]]
STEPS = [[[3, 1, 2], [1, 4, 1]], [[0, 5, 1], [2, 2, 2]]]


def save_npz(path, **arrays):
    with path.open("wb") as file:
        np.savez(file, **arrays)


def write_npy(path, value):
    np.save(path, np.array(value))


WRITERS = {
    "counts.npy": write_npy,
    "counts.npz": lambda path, value: save_npz(path, counts=np.array(value)),
    "bare.json": lambda path, value: path.write_text(json.dumps(value)),
    "sglang.json": lambda path, value: path.write_text(json.dumps({"logical_count": value})),
    "sglang.pt": lambda path, value: torch.save(
        {
            "rank": 0,
            "logical_count": torch.tensor(value, dtype=torch.int32),
            "average_utilization_rate_over_window": None,
        },
        path,
    ),
    "tensor.pt": lambda path, value: torch.save(torch.tensor(value), path),
    "columns.npy": lambda path, value: np.save(path, np.asfortranarray(value)),
}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("value", [SUMS, STEPS], ids=["sums", "steps"])
def test_counts_are_read_from_every_format(tmp_path, name, value):
    # What is in a file decides, so none of them has a name that helps.
    path = tmp_path / name
    WRITERS[name](path, value)
    path = path.rename(tmp_path / "load")
    trace = read_trace(path)
    assert trace.is_sum == (value is SUMS)
    assert trace.counts.tolist() == ([value] if value is SUMS else value)


def test_a_table_of_layers_and_a_list_of_entries_are_csv(tmp_path):
    path = tmp_path / "load.csv"
    path.write_text("3, 1, 2\n1, 4, 1\n")
    assert read_trace(path).counts.tolist() == [SUMS]
    lines = [
        f"{step},{layer},{expert},{STEPS[step][layer][expert]}"
        for step in (1, 0)
        for layer in (0, 1)
        for expert in (2, 0, 1)
    ]
    path.write_text("\n".join(["step,layer,expert,count", *lines]))
    trace = read_trace(path)
    assert (trace.counts.tolist(), trace.is_sum) == (STEPS, False)
    path.write_text("layer,expert,count\n0,0,3\n0,2,1\n1,1,2\n")
    trace = read_trace(path)
    assert (trace.counts.tolist(), trace.is_sum) == ([[[3, 0, 1], [0, 2, 0]]], True)


def test_the_end_of_a_recorders_buffer_that_was_not_filled_is_no_step(tmp_path):
    path = tmp_path / "dump.pt"
    torch.save({"rank": 0, "logical_count": torch.tensor([*STEPS, [[0] * 3] * 2])}, path)
    assert read_trace(path).counts.tolist() == STEPS


def test_dense_layers_are_left_out(tmp_path):
    path = tmp_path / "dump.json"
    path.write_text(json.dumps({"logical_count": [[0, 0, 0], *SUMS]}))
    assert read_trace(path, first_layer=1).counts.tolist() == [SUMS]
    with pytest.raises(TraceError, match="layers 0 to 0 have no tokens: if they are dense, leave"):
        read_trace(path)
    with pytest.raises(TraceError, match="has 3 layers, so the first MoE layer cannot be 3"):
        read_trace(path, first_layer=3)


def test_records_of_passes_name_slots(tmp_path):
    # Slots 0..3 hold experts 0, 1, 2, 0.
    tokens = [[[3, 1], [0, -1]], [[2, 1], [3, 0]]]
    record = {"rank": 0, "gatherer_key": "primary", "topk_ids_of_layer": torch.tensor(tokens)}
    late = {"forward_pass_id": 9, "global_physical_count": torch.tensor([[1, 0, 0, 5]] * 2)}
    path = tmp_path / "dump.pt"
    torch.save(
        {
            "records": [late, record | {"forward_pass_id": 7}, record | {"forward_pass_id": 7}],
            "last_physical_to_logical_map": torch.tensor([[0, 1, 2, 0]] * 2),
        },
        path,
    )
    assert read_trace(path).counts.tolist() == [
        [[4, 2, 0], [4, 2, 2]],
        [[6, 0, 0], [6, 0, 0]],
    ]


def test_records_without_a_map_name_experts(tmp_path):
    path = tmp_path / "dump.json"
    record = {"forward_pass_id": 1, "topk_ids_of_layer": [[[0, 2]], [[1, 2]]]}
    path.write_text(json.dumps({"records": [record]}))
    assert read_trace(path, num_experts=4).counts.tolist() == [[[1, 0, 1, 0], [0, 1, 1, 0]]]


def test_routes_become_steps_and_keep_their_domains(tmp_path):
    path = tmp_path / "routes.npz"
    experts = np.array([[[0]], [[1]], [[2]]], dtype=np.uint8)
    save_npz(path, experts=experts, seq_offsets=np.array([0, 1, 3]))
    serving = Serving(num_in_flight=1)
    trace = read_trace(path, serving=serving)
    assert (trace.counts[:, 0].argmax(axis=1).tolist(), trace.phases) == ([0, 1, 2], ())
    (tmp_path / "meta.json").write_text(json.dumps([{"dataset": "z"}, {"domain": "a"}]))
    trace = read_trace(path, serving=serving)
    assert trace.counts[:, 0].argmax(axis=1).tolist() == [1, 2, 0]
    assert trace.phases == ("a", "a", "z")
    assert not trace.is_sum


class Hostile:
    """Makes a file when it is unpickled."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


def _npy_bytes(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _claim(*shape):
    """The beginning of an array that would fill any memory."""
    buffer = io.BytesIO()
    header = {"descr": "<i8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(buffer, header)
    return buffer.getvalue() + bytes(8)


def _pt_bytes(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _npz_bytes(**arrays):
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


ROUTE = np.zeros((2, 1, 1), dtype=np.uint8)
NOT_TORCH = "no whole torch.save file of plain tensors and numbers: it is broken, truncated, or"
BAD = {
    "empty": (b"", "is empty"),
    "noise": (b"\xff\xfe\xfa\xfb\xfc", "neither npz, npy, torch.save, JSON nor CSV"),
    "npy cut in the data": (
        _npy_bytes(np.ones((2, 3), dtype=np.int64))[:-8],
        "the array is truncated: int64[2, 3] takes 48 bytes, fewer are there",
    ),
    "npy cut in the header": (_npy_bytes(np.ones((2, 3)))[:30], "the array: broken or truncated"),
    "npy of a size that is not there": (
        _claim(999_999_999, 9_999_999),
        "the array is truncated: int64[999999999, 9999999] takes 79999991920000008 bytes, fewer",
    ),
    "npy of objects": (
        _npy_bytes(np.array([[1, None]], dtype=object)),
        "the array holds Python objects, which are never unpickled: save plain numbers",
    ),
    "npz of objects": (
        _npz_bytes(counts=np.array([[1, None]], dtype=object)),
        "counts holds Python objects, which are never unpickled",
    ),
    "npz cut": (_npz_bytes(counts=np.ones((9, 9)))[:300], "broken or truncated npz"),
    "npz with other arrays": (
        _npz_bytes(weights=np.ones(3)),
        "no known load: expected logical_count, counts or records, got weights",
    ),
    "npz of a later version": (
        _npz_bytes(format_version=np.int64(9), counts=np.ones((1, 1, 2))),
        "format_version is 9, this version reads 1",
    ),
    "ours without counts": (_npz_bytes(format_version=np.int64(1)), "counts is missing"),
    "routes without offsets": (
        _npz_bytes(experts=ROUTE),
        "seq_offsets is missing: routes need experts and seq_offsets",
    ),
    "routes cut": (
        _npz_bytes(experts=ROUTE, seq_offsets=np.array([0, 5])),
        "seq_offsets must rise from 0 to the 2 tokens of experts, got 0 to 5",
    ),
    "routes beyond E": (
        _npz_bytes(experts=ROUTE + np.uint8(9), seq_offsets=np.array([0, 2])),
        "experts: token 0, layer 0 went to expert 9: experts are 0 to 2, and -1 is none",
    ),
    "torch.save cut": (_pt_bytes(torch.ones(99))[:200], "broken or truncated npz or torch.save"),
    "pickle": (pickle.dumps([1, 2]), NOT_TORCH),
    "JSON cut": (b'{"logical_count": [[1, 2', "broken or truncated JSON"),
    "JSON that is deep": (b"[" * 100_000, "broken or truncated JSON"),
    "JSON with uneven rows": (b"[[1, 2], [3]]", "with rows of one length"),
    "JSON of words": (b'{"logical_count": [["a", "b", "c"]]}', "must be whole numbers of tokens"),
    "JSON with another load's key": (b'{"load": [[1]]}', "no known load: expected logical_count"),
    "a placement": (b'{"slot_to_expert": [[0]]}', "it is a placement, not a load"),
    "negative": (
        b'{"logical_count": [[1, 2, -3]]}',
        "logical_count: layer 0, expert 2 has -3: it must be a whole number of tokens, 0 or more",
    ),
    "NaN": (b"[[1, NaN, 2]]", "the array: layer 0, expert 1 has nan: it must be a whole number"),
    "fractions": (b"[[1, 2.5, 2]]", "the array: layer 0, expert 1 has 2.5"),
    "one axis": (
        b"[1, 2, 3]",
        "the array must be [layers, experts] or [steps, layers, experts], got [3]",
    ),
    "more experts": (b"[[1, 2, 3, 4]]", "it counts 4 experts in each layer, expected 3"),
    "no records": (b'{"records": []}', "records must be a list of at least one record"),
    "a record that is none": (b'{"records": [3]}', "records: record 0 is no object"),
    "a record without counts": (
        b'{"records": [{"rank": 0}]}',
        "records: record 0 has neither topk_ids_of_layer nor global_physical_count",
    ),
    "a record beyond E": (
        b'{"records": [{"topk_ids_of_layer": [[[5]]]}]}',
        "records: expert 5 occurs: experts are 0 to 2",
    ),
    "a record beyond the map": (
        b'{"records": [{"topk_ids_of_layer": [[[5]]]}], "last_physical_to_logical_map": [[0, 1]]}',
        "topk_ids_of_layer of record 0 has 5: slots are 0 to 1 by last_physical_to_logical_map",
    ),
    "CSV with uneven rows": (b"1,2,3\n4,5\n", "row 2 has 2 columns, row 1 has 3"),
    "CSV of words": (b"1,2,3\n4,x,6\n", "row 2: could not convert string to float: 'x'"),
    "CSV without a layer": (
        b"layer,expert,count\n0,0,1\n2,0,1\n",
        "layer 1 is missing: they must run from 0 on",
    ),
    "CSV with an entry twice": (
        b"layer,expert,count\n0,0,1\n0,0,2\n",
        "an entry of layer, expert is there twice",
    ),
    "CSV without rows": (b"layer,expert,count\n", "the columns layer, expert, count have no rows"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, case):
    data, message = BAD[case]
    path = tmp_path / "load"
    path.write_bytes(data)
    with pytest.raises(TraceError) as caught:
        read_trace(path, num_experts=3)
    assert str(caught.value).startswith(f"{path}: ")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["torch.save", "legacy", "pickle", "npy", "npz"])
def test_a_file_that_wants_to_run_code_is_refused_and_does_not(tmp_path, kind):
    path, target = tmp_path / "load", tmp_path / "was-here"
    hostile = {"logical_count": Hostile(target)}
    objects = np.array([[hostile]], dtype=object)
    if kind == "torch.save":
        torch.save(hostile, path)
    elif kind == "legacy":
        torch.save(hostile, path, _use_new_zipfile_serialization=False)
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(hostile))
    elif kind == "npy":
        path.write_bytes(_npy_bytes(objects))
    else:
        save_npz(path, counts=objects)
    with pytest.raises(TraceError, match=r"which is never run|never unpickled"):
        read_trace(path)
    assert not target.exists()


def test_an_archive_that_says_more_than_it_holds_asks_for_no_memory(tmp_path):
    path = tmp_path / "load"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("counts.npy", _claim(999_999_999, 9_999_999))
    with pytest.raises(TraceError, match="counts is truncated"):
        read_trace(path)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ("[{", "meta.json beside it is no JSON"),
        ("{}", "meta.json beside it must be a list with an object per sequence"),
        ('[{"dataset": "a"}]', "meta.json beside it has 1 entries for 2 sequences"),
        ('[{"dataset": "a"}, 3]', "meta.json beside it: entry 1 must have a domain or a dataset"),
    ],
)
def test_domains_that_do_not_fit_are_named(tmp_path, meta, message):
    path = tmp_path / "routes.npz"
    save_npz(path, experts=ROUTE, seq_offsets=np.array([0, 1, 2]))
    (tmp_path / "meta.json").write_text(meta)
    with pytest.raises(TraceError) as caught:
        read_trace(path)
    assert message in str(caught.value)


def test_a_file_that_is_not_there_is_named(tmp_path):
    with pytest.raises(TraceError) as caught:
        read_trace(tmp_path / "nowhere.npz")
    assert str(caught.value) == f"{tmp_path / 'nowhere.npz'}: No such file or directory"
