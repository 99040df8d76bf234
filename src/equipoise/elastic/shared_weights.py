"""What every rank has beside experts: listed on ranks that serve, made anew on a newcomer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.models.experts import ExpertParallelModel

Kind = Literal["parameter", "buffer", "attribute"]


@dataclass(frozen=True)
class SharedTensor:
    """A tensor of the model that every rank has.

    Attributes:
        names: paths in the model; several where it is tied.
        kind: what it is to its modules.
        shape: its.
        dtype: as torch names it, without "torch.".
        tensor: itself, on a rank that has it.
    """

    names: tuple[str, ...]
    kind: Kind
    shape: tuple[int, ...]
    dtype: str
    tensor: Tensor | None = None

    @property
    def num_bytes(self) -> int:
        """Of its elements."""
        size = getattr(torch, self.dtype).itemsize
        for length in self.shape:
            size *= length
        return int(size)

    def to_json(self) -> dict[str, Any]:
        """All but the tensor."""
        return {
            "names": list(self.names),
            "kind": self.kind,
            "shape": list(self.shape),
            "dtype": self.dtype,
        }

    @classmethod
    def from_json(cls, data: Any) -> SharedTensor:
        """What `to_json` wrote."""
        return cls(
            tuple(map(str, data["names"])),
            data["kind"],
            tuple(map(int, data["shape"])),
            str(data["dtype"]),
        )


def list_shared(spread: ExpertParallelModel) -> list[SharedTensor]:
    """What of a model belongs to no expert: parameters, buffers, and tensors that modules keep.

    Collective: none; the same on every rank of a model but for the tensors themselves.
    """
    found: dict[int, SharedTensor] = {}
    for name, kind, tensor in _walk(spread):
        before = found.get(id(tensor))
        names = (name,) if before is None else (*before.names, name)
        dtype = str(tensor.dtype).removeprefix("torch.")
        found[id(tensor)] = SharedTensor(names, kind, tuple(tensor.shape), dtype, tensor)
    return list(found.values())


def give_shared(
    spread: ExpertParallelModel, wanted: Sequence[SharedTensor], device: torch.device
) -> list[SharedTensor]:
    """Make memory for what a newcomer's model lacks, and have the model hold it.

    Args:
        spread: on the meta device but for its experts.
        wanted: as a rank that serves lists it.
        device: where tensors go.
    Returns:
        The same, each with its tensor, to be filled before the first call of the model.
    Collective: none.
    Raises: ModelError if the model has no such tensor, or one that nobody gives.
    """
    modules = dict(spread.model.named_modules())
    given = []
    for one in wanted:
        tensor = torch.empty(one.shape, dtype=getattr(torch, one.dtype), device=device)
        held: Any = tensor
        if one.kind == "parameter":
            held = nn.Parameter(tensor, requires_grad=False)
        for name in one.names:
            path, _, leaf = name.rpartition(".")
            if path not in modules or not hasattr(modules[path], leaf):
                raise ModelError(f"the model has no {name}, which ranks that serve have")
            setattr(modules[path], leaf, held)
        given.append(SharedTensor(one.names, one.kind, one.shape, one.dtype, tensor))
    left = [name for name, _, tensor in _walk(spread) if tensor.is_meta]
    if left:
        raise ModelError(f"no rank that serves gives {left[0]}, which the model needs")
    return given


def _walk(spread: ExpertParallelModel) -> Iterator[tuple[str, Kind, Tensor]]:
    """Every tensor of every module that is not an expert's, under each of its names."""
    experts: dict[int, tuple[str, ...]] = {}
    for one in spread.sets:
        for layer in one.layers:
            for module in (layer.module, *layer.copies):
                experts[id(module)] = layer.tensors
    for path, module in spread.model.named_modules():
        skipped = experts.get(id(module), ())
        kinds: tuple[tuple[Kind, dict[str, Any]], ...] = (
            ("parameter", module._parameters),
            ("buffer", module._buffers),
            ("attribute", vars(module)),
        )
        for kind, held in kinds:
            for name, tensor in held.items():
                if isinstance(tensor, Tensor) and name not in skipped:
                    yield f"{path}.{name}" if path else name, kind, tensor
