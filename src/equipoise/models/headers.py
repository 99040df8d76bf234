"""What the safetensors files of a checkpoint hold, from their headers alone; without PyTorch."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from equipoise.errors import ModelError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
LARGEST_HEADER_BYTES = 100_000_000
"""What the format allows."""

BITS = MappingProxyType(
    {
        **dict.fromkeys(("F4",), 4),
        **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
        **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
        **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
        **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
        **dict.fromkeys(("U32", "I32", "F32"), 32),
        **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
    }
)
"""Size of an entry of each dtype that the format has."""


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint.

    Attributes:
        name: as the file names it.
        file: which one.
        dtype: as safetensors writes it, "BF16".
        shape: as stored.
        num_bytes: of its data.
        begin: where its data begin in the file.
    """

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    begin: int


def read_headers(directory: Path) -> dict[str, StoredTensor]:
    """Read the headers of all files of a checkpoint, and check that they can be what they say.

    Args:
        directory: a Hugging Face checkpoint: model.safetensors, or several files and their index.
    Returns:
        Its tensors by name.
    Collective: none.
    Raises: ModelError, in one line that names the file and the tensor, if a file is missing,
        truncated or no safetensors file; a tensor is missing, there twice, of an unknown dtype or
        of a shape that its bytes are not.
    """
    promised = read_index(directory)
    names = [SINGLE] if promised is None else sorted(set(promised.values()))
    tensors: dict[str, StoredTensor] = {}
    for name in names:
        for tensor in read_header(directory / name):
            if tensor.name in tensors:
                other = tensors[tensor.name].file.name
                raise ModelError(f"{directory}: {tensor.name} is in {other} and in {name} too")
            tensors[tensor.name] = tensor
    for name, file in (promised or {}).items():
        if name not in tensors or tensors[name].file.name != file:
            raise ModelError(f"{directory}: {INDEX} promises {name} in {file}, which lacks it")
    return tensors


def read_header(file: Path) -> list[StoredTensor]:
    """Read the header of one file; raises as `read_headers`."""
    try:
        num_bytes = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= LARGEST_HEADER_BYTES:
                raise ModelError(f"{file}: is truncated, or no safetensors file: it has no header")
            text = stream.read(length)
    except FileNotFoundError as error:
        raise ModelError(f"{file.parent}: lacks {file.name}") from error
    except OSError as error:
        raise ModelError(f"{file}: cannot be read: {error.strerror}") from error
    if len(text) < length:
        raise ModelError(
            f"{file}: is truncated: its header ends at byte {8 + length}, the file at {num_bytes}"
        )
    entries = _parse(file, text)
    entries.pop("__metadata__", None)
    return [_check(file, name, entry, 8 + length, num_bytes) for name, entry in entries.items()]


def read_index(directory: Path) -> dict[str, str] | None:
    """Read which file each tensor is in; None if there is no index. Raises as `read_headers`."""
    path = directory / INDEX
    if not path.exists():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        promised = index["weight_map"]
        files = set(promised.values())
        if not all(isinstance(name, str) for name in (*promised, *files)):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{path}: is no index: it must map tensors to files") from error
    outside = [name for name in files if Path(name).name != name]
    if outside:
        raise ModelError(f"{path}: names {outside[0]}, which is not a file beside it")
    return dict(promised)


def _parse(file: Path, text: bytes) -> dict[str, Any]:
    def refuse_twice(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in pairs:
            if name in found:
                raise ModelError(f"{file}: its header names {name} twice")
            found[name] = value
        return found

    try:
        entries = json.loads(text, object_pairs_hook=refuse_twice)
    except ValueError as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{file}: is no safetensors file: its header is not JSON") from error
    if not isinstance(entries, dict):
        raise ModelError(f"{file}: is no safetensors file: its header is not an object")
    return entries


def _check(file: Path, name: str, entry: Any, data_start: int, file_bytes: int) -> StoredTensor:
    try:
        dtype, shape = entry["dtype"], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        sound = all(isinstance(n, int) and n >= 0 for n in (*shape, begin, end)) and begin <= end
    except (TypeError, KeyError, ValueError):
        sound = False
    if not sound:
        raise ModelError(f"{file}: its header does not say dtype, shape and place of {name}")
    if dtype not in BITS:
        raise ModelError(f"{file}: {name} is stored as {dtype}, which is no dtype of safetensors")
    needed = math.prod(shape) * BITS[dtype] // 8
    if needed != end - begin:
        raise ModelError(
            f"{file}: {name} of shape {list(shape)} in {dtype} takes {needed} bytes, but has "
            f"{end - begin}"
        )
    if data_start + end > file_bytes:
        raise ModelError(
            f"{file}: is truncated: {name} ends at byte {data_start + end}, the file at "
            f"{file_bytes}"
        )
    return StoredTensor(name, file, dtype, shape, needed, data_start + begin)
