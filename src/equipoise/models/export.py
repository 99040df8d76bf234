"""The logical model back as a checkpoint, from whatever placement stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import ExpertParallelModel, ExpertSet
from equipoise.models.headers import INDEX
from equipoise.models.quiet import first_line
from equipoise.models.skeleton import DTYPES


@dataclass(frozen=True)
class _Row:
    """One MoE layer: row `row` of a set's placement."""

    one: ExpertSet
    row: int

    @property
    def names(self) -> list[str]:
        return self.one.layers[self.row].full_names()

    def slot_of(self, expert: int) -> tuple[int, int]:
        """Rank and local slot of the first replica of an expert."""
        placement = self.one.maps.placement
        slot = int(placement.expert_to_slots[self.row, expert, 0])
        return divmod(slot, placement.topology.slots_per_rank)


def write_checkpoint(
    spread: ExpertParallelModel,
    group: RankGroup,
    directory: Path,
    source: Checkpoint | None,
) -> None:
    """Write every expert once, and what all ranks have, as transformers and `source` name them.

    A layer is written by one rank, which gathers it first; ranks take turns. Files are written
    beside `directory`, under its name and ".partial", which is renamed at the end: there is a whole
    checkpoint or none.

    Args:
        spread: the model; its slots are read.
        group: its ranks; all see the same file system.
        directory: must not be there yet.
        source: what it was read from, whose dtypes are kept, and whose other files are copied; None
            writes the dtypes that the model has.
    Collective: every rank of the group, at the same step.
    Raises: ModelError on every rank if the directory is there, cannot be written, or if the model
        does not hold what the source does: it was dequantised, or read in a narrower dtype.
    """
    partial = directory.with_name(directory.name + ".partial")
    try:
        _all_or_none(group, lambda: _begin(directory, partial, source, group.rank))
        parts = list(_group_rows(spread, source))
        total = len(parts) + 1
        writer = _Writer(spread, group, partial, source, total)
        _all_or_none(group, lambda: writer.write(parts))
        _all_or_none(group, lambda: _finish(spread, group, directory, partial, source))
    finally:
        if group.rank == 0:
            shutil.rmtree(partial, ignore_errors=True)


class _Writer:
    """Writes this rank's share of the files."""

    def __init__(
        self,
        spread: ExpertParallelModel,
        group: RankGroup,
        partial: Path,
        source: Checkpoint | None,
        num_files: int,
    ) -> None:
        self._spread, self._group, self._source = spread, group, source
        self._partial, self._num_files = partial, num_files
        self._promised: dict[str, str] = {}

    def write(self, parts: list[list[_Row]]) -> None:
        """The shared weights on rank 0; then layers in turn. Collective: every rank."""
        failure: Exception | None = None
        if self._group.rank == 0:
            failure = self._try_save(0, self._shared())
        for number, rows in enumerate(parts, start=1):
            writer = number % self._group.size
            gathered: dict[str, Tensor] = {}
            for row in rows:
                gathered |= self._gather(row, writer)
            if self._group.rank == writer and failure is None:
                failure = self._try_save(number, gathered)
        if failure is not None:
            raise failure
        text = json.dumps(self._promised)
        (self._partial / f".{self._group.rank}.json").write_text(text, encoding="utf-8")

    def _shared(self) -> dict[str, Tensor]:
        model = self._spread.model
        per_expert = {
            name for one in self._spread.sets for layer in one.layers for name in layer.full_names()
        }
        tied = set(getattr(model, "all_tied_weights_keys", None) or {})
        kept = set() if self._source is None else set(self._source.stored)
        return {
            name: tensor
            for name, tensor in model.state_dict().items()
            if name not in per_expert and (name not in tied or name in kept)
        }

    def _gather(self, row: _Row, writer: int) -> dict[str, Tensor]:
        """A layer's tensors [E, ...] on the CPU of one rank; the others send what they hold."""
        rank, num_experts = self._group.rank, row.one.maps.placement.num_experts
        weights = row.one.weights[row.row]
        whole = [
            torch.empty(num_experts, *slots.shape[1:], dtype=slots.dtype)
            for slots in weights
            if rank == writer
        ]
        for expert in range(num_experts):
            owner, slot = row.slot_of(expert)
            if rank == owner == writer:
                for into, slots in zip(whole, weights, strict=True):
                    into[expert].copy_(slots[slot])
            elif rank == owner:
                for slots in weights:
                    self._group.send(_bytes(slots[slot].cpu()), writer)
            elif rank == writer:
                for into in whole:
                    self._group.recv(_bytes(into[expert]), owner)
        return dict(zip(row.names, whole, strict=True)) if rank == writer else {}

    def _try_save(self, number: int, tensors: dict[str, Tensor]) -> Exception | None:
        try:
            self._save(number, tensors)
        except Exception as error:  # told once all ranks are through
            return error
        return None

    def _save(self, number: int, tensors: dict[str, Tensor]) -> None:
        safetensors: Any = import_module("safetensors.torch")
        stored = self._revert(tensors)
        name = f"model-{number + 1:05}-of-{self._num_files:05}.safetensors"
        ready = {
            key: self._restore(key, tensor).cpu().clone(memory_format=torch.contiguous_format)
            for key, tensor in stored.items()
        }
        safetensors.save_file(ready, self._partial / name, metadata={"format": "pt"})
        self._promised |= dict.fromkeys(ready, name)

    def _revert(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Stored tensors, in the shapes of the source.

        Some operations transpose what is not of the model's shape, and transformers writes no
        transposed weights; a source that has them is met on the second attempt.
        """
        loading: Any = import_module("transformers.core_model_loading")
        stored: dict[str, Tensor] = {}
        for shapes in ({name: tensor.shape for name, tensor in tensors.items()}, {}):
            view = _Shaped(self._spread.model, shapes)
            made = loading.revert_weight_conversion(view, dict(tensors))
            wrong = {name for name in stored if not self._has_its_shape(name, stored[name])}
            stored |= {name: made[name] for name in made if name in wrong or name not in stored}
            if all(self._has_its_shape(name, tensor) for name, tensor in stored.items()):
                return stored
        misshapen = next(n for n, tensor in stored.items() if not self._has_its_shape(n, tensor))
        raise ModelError(f"{misshapen} cannot be made as it was stored")

    def _has_its_shape(self, name: str, tensor: Tensor) -> bool:
        known = {} if self._source is None else self._source.stored
        return name not in known or known[name].shape == tuple(tensor.shape)

    def _restore(self, name: str, tensor: Tensor) -> Tensor:
        """In the dtype of the source; exact, for what was read in a wider one."""
        if self._source is None or name not in self._source.stored:
            return tensor
        dtype = DTYPES[self._source.stored[name].dtype]
        if tensor.dtype != dtype and torch.promote_types(tensor.dtype, dtype) != tensor.dtype:
            raise ModelError(
                f"{name} is stored as {self._source.stored[name].dtype}, but was read as "
                f"{str(tensor.dtype).removeprefix('torch.')}: what was lost cannot be written"
            )
        return tensor.to(dtype)


class _Shaped:
    """The model, with tensors of these shapes, and of none where it is not said."""

    def __init__(self, model: Any, shapes: dict[str, torch.Size]) -> None:
        self._model, self._shapes = model, shapes

    def get_parameter(self, name: str) -> Tensor:
        """As the model's method."""
        return torch.empty(self._shapes.get(name, torch.Size([0])), device="meta")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


def _begin(directory: Path, partial: Path, source: Checkpoint | None, rank: int) -> None:
    if source is not None and source.is_dequantised:
        raise ModelError(
            f"{source.directory}: its weights were dequantised as they were read, and would not be "
            "what was stored: copy that directory, no expert of it has changed"
        )
    if rank > 0:
        return
    if directory.exists():
        raise ModelError(f"{directory}: is there already; name a directory that is not")
    if partial.exists():
        raise ModelError(f"{partial}: is there, from a write that was cut off: remove it")
    partial.mkdir(parents=True)


def _group_rows(spread: ExpertParallelModel, source: Checkpoint | None) -> Iterator[list[_Row]]:
    """Layers that are stored in the same tensors, together."""
    rows = [_Row(one, row) for one in spread.sets for row in range(len(one.layers))]
    together: dict[Any, list[_Row]] = {}
    for row in rows:
        layer = row.one.layers[row.row]
        key = layer.name if source is None else source.name_first_source(layer)
        together.setdefault(key, []).append(row)
    yield from together.values()


def _finish(
    spread: ExpertParallelModel,
    group: RankGroup,
    directory: Path,
    partial: Path,
    source: Checkpoint | None,
) -> None:
    if group.rank > 0:
        return
    promised: dict[str, str] = {}
    for rank in range(group.size):
        part = partial / f".{rank}.json"
        if not part.exists():
            raise ModelError(f"{partial}: rank {rank} does not write to this file system")
        promised |= json.loads(part.read_text(encoding="utf-8"))
        part.unlink()
    size = sum(file.stat().st_size for file in partial.glob("*.safetensors"))
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(promised.items()))}
    (partial / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    if source is None:
        spread.model.config.save_pretrained(partial)
        if spread.model.can_generate():
            spread.model.generation_config.save_pretrained(partial)
    else:
        for file in source.directory.iterdir():
            if file.is_file() and not file.name.endswith((".safetensors", ".index.json")):
                shutil.copy2(file, partial / file.name)
    partial.rename(directory)


def _all_or_none(group: RankGroup, act: Any) -> None:
    """Do something on every rank; if it fails on one, raise on all."""
    failure: ModelError | None = None
    try:
        act()
    except ModelError as error:
        failure = error
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        failure = ModelError(f"the checkpoint cannot be written: {first_line(error)}")
        failure.__cause__ = error
    failed = torch.full((1,), -1 if failure is None else group.rank)
    group.all_reduce(failed, "max")
    if failure is not None:
        raise failure
    if failed.item() >= 0:
        raise ModelError(f"rank {int(failed.item())} could not write its part of the checkpoint")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)
