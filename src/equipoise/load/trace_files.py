"""Reading load files, of whatever known format a file turns out to be.

| what                    | how it is told                                                   |
| ----------------------- | ---------------------------------------------------------------- |
| our own traces          | npz with `format_version`                                        |
| per-token routes        | npz with `experts` and `seq_offsets`; domains from its `domains`, |
|                         | or from a list of objects in meta.json beside it                 |
| counts                  | npy, npz with `counts` or `logical_count`, JSON, CSV             |
| SGLang recorder dumps   | torch.save files and JSON with `logical_count` or `records`      |
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from equipoise.errors import TraceError
from equipoise.load.trace import TRACE_VERSION, LoadTrace, check_counts
from equipoise.load.trace_records import count_records
from equipoise.load.trace_routes import Routes, Serving, steps_from_routes

COUNT_FIELDS = ("counts", "logical_count")


def read_trace(
    path: Path,
    *,
    num_experts: int | None = None,
    first_layer: int = 0,
    serving: Serving | None = None,
) -> LoadTrace:
    """Read a load file; what is in it decides, not its name.

    Nothing in a file is ever run: pickles are read for plain tensors alone, object arrays refused.

    Args:
        path: the file.
        num_experts: E; None for what the file says, or the highest expert of routes + 1.
        first_layer: layers to leave out at the front: dense ones, where a file counts them.
        serving: how steps are made of per-token routes.
    Collective: none.
    Raises: TraceError, naming the file and the field.
    """
    try:
        trace = _read(path, num_experts, first_layer, serving or Serving())
        if num_experts not in (None, trace.num_experts):
            raise TraceError(
                f"it counts {trace.num_experts} experts in each layer, expected {num_experts}"
            )
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}") from error
    except TraceError as error:
        raise TraceError(f"{path}: {error}") from error
    return trace


def _read(path: Path, num_experts: int | None, first_layer: int, serving: Serving) -> LoadTrace:
    with path.open("rb") as file:
        head = file.read(8)
        file.seek(0)
        if not head:
            raise TraceError("is empty")
        if head.startswith(b"\x93NUMPY"):
            size = path.stat().st_size
            return _from_counts(_read_npy(file, size, "the array"), "the array", first_layer)
        if head.startswith(b"PK"):
            if _is_npz(file):
                return _read_npz(path, file, num_experts, first_layer, serving)
            return _from_record(_read_torch(file), num_experts, first_layer)
        if head.startswith(b"\x80"):
            return _from_record(_read_torch(file), num_experts, first_layer)
        try:
            text = file.read().decode()
        except UnicodeDecodeError as error:
            raise TraceError(
                "no known load file: neither npz, npy, torch.save, JSON nor CSV"
            ) from error
    if text.lstrip().startswith(("{", "[")):
        try:
            record = json.loads(text)
        except (json.JSONDecodeError, RecursionError) as error:
            raise TraceError(f"broken or truncated JSON: {error}") from error
        return _from_record(record, num_experts, first_layer)
    return _from_counts(_read_csv(text), "the table", first_layer)


def _from_counts(array: Any, field: str, first_layer: int) -> LoadTrace:
    counts = check_counts(array, field)
    if not 0 <= first_layer < counts.shape[-2]:
        raise TraceError(
            f"{field} has {counts.shape[-2]} layers, so the first MoE layer cannot be {first_layer}"
        )
    counts = counts[..., first_layer:, :]
    is_sum = counts.ndim == 2
    return LoadTrace(counts[None] if is_sum else counts, is_sum)


def _from_record(record: Any, num_experts: int | None, first_layer: int) -> LoadTrace:
    if isinstance(record, (list, np.ndarray)) or _is_tensor(record):
        return _from_counts(_to_numpy(record), "the array", first_layer)
    if not isinstance(record, dict):
        raise TraceError(f"holds {type(record).__name__}, not counts or an object with them")
    for field in COUNT_FIELDS:
        if field in record:
            counts = check_counts(_to_numpy(record[field]), field)
            # A recorder's buffer of fixed length ends in steps that never were.
            kept = counts if counts.ndim == 2 else counts[counts.any(axis=(1, 2))]
            if not kept.size:
                raise TraceError(f"{field}: no tokens at all")
            return _from_counts(kept, field, first_layer)
    if "records" in record:
        table = record.get("last_physical_to_logical_map")
        counts = count_records(
            [
                {key: _to_numpy(value) for key, value in entry.items()}
                if isinstance(entry, dict)
                else entry
                for entry in _as_list(record["records"])
            ],
            None if table is None else _to_numpy(table),
            num_experts,
        )
        return _from_counts(counts, "records", first_layer)
    if "physical_to_logical_map" in record or "slot_to_expert" in record:
        raise TraceError("it is a placement, not a load: give it as the previous one")
    found = ", ".join(map(str, list(record)[:8])) or "nothing"
    raise TraceError(f"no known load: expected logical_count, counts or records, got {found}")


def _read_npz(
    path: Path, file: IO[bytes], num_experts: int | None, first_layer: int, serving: Serving
) -> LoadTrace:
    try:
        with zipfile.ZipFile(file) as archive:
            arrays = {}
            for member in archive.infolist():
                field = member.filename.removesuffix(".npy")
                with archive.open(member) as stream:
                    arrays[field] = _read_npy(stream, member.file_size, field)
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError) as error:
        raise TraceError(f"broken or truncated npz: {error}") from error
    if "format_version" in arrays:
        return _from_ours(arrays, first_layer)
    if "experts" in arrays or "seq_offsets" in arrays:
        for field in ("experts", "seq_offsets"):
            if field not in arrays:
                raise TraceError(f"{field} is missing: routes need experts and seq_offsets")
        return _from_routes(path, arrays, num_experts, first_layer, serving)
    return _from_record(arrays, num_experts, first_layer)


def _from_ours(arrays: dict[str, Any], first_layer: int) -> LoadTrace:
    version = arrays["format_version"]
    if version.shape != () or version != TRACE_VERSION:
        raise TraceError(f"format_version is {version}, this version reads {TRACE_VERSION}")
    for field in ("counts", "is_sum", "phases"):
        if field not in arrays:
            raise TraceError(f"{field} is missing")
    trace = _from_counts(arrays["counts"], "counts", first_layer)
    phases = _read_words(arrays["phases"], "phases")
    return LoadTrace(trace.counts, bool(arrays["is_sum"].any()), phases)


def _from_routes(
    path: Path,
    arrays: dict[str, Any],
    num_experts: int | None,
    first_layer: int,
    serving: Serving,
) -> LoadTrace:
    experts, offsets = arrays["experts"], arrays["seq_offsets"]
    domains = (
        _read_words(arrays["domains"], "domains")
        if "domains" in arrays
        else _read_meta(path.with_name("meta.json"), max(offsets.size - 1, 0))
    )
    if experts.ndim == 3 and not 0 <= first_layer < experts.shape[1]:
        raise TraceError(
            f"experts has {experts.shape[1]} layers, so the first MoE layer cannot be {first_layer}"
        )
    routes = Routes(experts[:, first_layer:], offsets, domains)
    counts, phases = steps_from_routes(routes, num_experts, serving)
    return LoadTrace(counts, phases=phases)


def _read_meta(path: Path, num_sequences: int) -> tuple[str, ...]:
    """The domain of each sequence, where a file beside the routes tells it."""
    if not path.is_file():
        return ()
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TraceError(f"{path.name} beside it is no JSON: {error}") from error
    if not isinstance(entries, list):
        raise TraceError(f"{path.name} beside it must be a list with an object per sequence")
    if len(entries) != num_sequences:
        raise TraceError(
            f"{path.name} beside it has {len(entries)} entries for {num_sequences} sequences"
        )
    domains = []
    for at, entry in enumerate(entries):
        fields = entry if isinstance(entry, dict) else {}
        domain = fields.get("domain", fields.get("dataset"))
        if not isinstance(domain, str):
            raise TraceError(f"{path.name} beside it: entry {at} must have a domain or a dataset")
        domains.append(domain)
    return tuple(domains)


def _read_words(array: Any, field: str) -> tuple[str, ...]:
    if array.ndim != 1 or (array.size and array.dtype.kind != "U"):
        raise TraceError(f"{field} must be a list of words, got {array.dtype}{list(array.shape)}")
    return tuple(str(word) for word in array)


def _is_npz(file: IO[bytes]) -> bool:
    try:
        with zipfile.ZipFile(file) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile as error:
        raise TraceError(f"broken or truncated npz or torch.save file: {error}") from error
    finally:
        file.seek(0)
    return bool(names) and all(name.endswith(".npy") for name in names)


def _read_npy(stream: IO[bytes], size: int, field: str) -> Any:
    """An array, after its header has shown that it holds numbers, and all of them."""
    try:
        version = np.lib.format.read_magic(stream)
        if version not in ((1, 0), (2, 0)):
            raise TraceError(f"{field}: npy version {version} is not known")
        read_header = (
            np.lib.format.read_array_header_1_0
            if version == (1, 0)
            else np.lib.format.read_array_header_2_0
        )
        shape, in_columns, dtype = read_header(stream)
    except (ValueError, SyntaxError) as error:
        raise TraceError(f"{field}: broken or truncated npy header") from error
    if dtype.hasobject:
        raise TraceError(
            f"{field} holds Python objects, which are never unpickled: save plain numbers"
        )
    num_bytes = int(np.prod(shape, dtype=object)) * dtype.itemsize
    # Whoever claims more than there is shall not make us ask for the memory.
    data = stream.read(num_bytes) if num_bytes <= size else b""
    if len(data) < num_bytes:
        raise TraceError(
            f"{field} is truncated: {dtype}{list(shape)} takes {num_bytes} bytes, fewer are there"
        )
    flat = np.frombuffer(data, dtype=dtype)
    return flat.reshape(shape[::-1]).T if in_columns else flat.reshape(shape)


def _read_torch(file: IO[bytes]) -> Any:
    import torch

    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        # Whatever a broken or a hostile file makes the reader say.
        raise TraceError(
            "no whole torch.save file of plain tensors and numbers: it is broken, truncated, or "
            "holds code, which is never run"
        ) from error


def _read_csv(text: str) -> Any:
    """[L, E] from a row per layer, or any counts from a header and an entry per row."""
    rows = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text)) if any(row)]
    if not rows:
        raise TraceError("is empty")
    header = [cell.lower() for cell in rows[0]]
    if header[-3:] == ["layer", "expert", "count"] and header[:-3] in ([], ["step"]):
        return _read_entries(header, rows[1:])
    width = len(rows[0])
    for at, row in enumerate(rows):
        if len(row) != width:
            raise TraceError(f"row {at + 1} has {len(row)} columns, row 1 has {width}")
    return np.array([_to_numbers(row, at + 1) for at, row in enumerate(rows)])


def _read_entries(header: Sequence[str], rows: list[list[str]]) -> Any:
    if not rows:
        raise TraceError(f"the columns {', '.join(header)} have no rows")
    for at, row in enumerate(rows):
        if len(row) != len(header):
            raise TraceError(f"row {at + 2} has {len(row)} columns, the header {len(header)}")
    table = np.array([_to_numbers(row, at + 2) for at, row in enumerate(rows)])
    places = table[:, :-1]
    if not ((places >= 0) & (places == np.floor(places)) & (places < 2**31)).all():
        raise TraceError(f"{', '.join(header[:-1])} must be whole numbers, 0 or more")
    index = places.astype(np.int64).T
    if len(np.unique(index, axis=1).T) != len(rows):
        raise TraceError(f"an entry of {', '.join(header[:-1])} is there twice")
    for name, axis in zip(header[:-1], index, strict=True):
        missing = np.setdiff1d(np.arange(axis.max() + 1), axis)
        if name != "expert" and missing.size:
            raise TraceError(f"{name} {missing[0]} is missing: they must run from 0 on")
    counts = np.zeros(tuple(index.max(axis=1) + 1))
    counts[tuple(index)] = table[:, -1]
    return counts


def _to_numbers(row: list[str], number: int) -> list[float]:
    try:
        return [float(cell) for cell in row]
    except ValueError as error:
        raise TraceError(f"row {number}: {error}; expected counts separated by commas") from error


def _as_list(value: Any) -> list[Any]:
    if not isinstance(value, list) or not value:
        raise TraceError("records must be a list of at least one record")
    return value


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "numpy") and hasattr(value, "detach")


def _to_numpy(value: Any) -> Any:
    if not _is_tensor(value):
        return value
    tensor = value.detach()
    # numpy has no bfloat16; whether its numbers are whole is seen as well in 64 bits.
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()
