"""Weights of a checkpoint, read tensor by tensor: the experts that are asked for, and the rest.

A rank reads what every rank has and its own experts, each into its place and nothing else, so that
the host holds no more than the rank's own weights and one tensor on its way.
"""

from __future__ import annotations

import copy
import re
import threading
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ModelError
from equipoise.models.contract import ExpertLayer
from equipoise.models.headers import StoredTensor, read_headers
from equipoise.models.quiet import first_line, quiet
from equipoise.models.skeleton import (
    DTYPES,
    Conversion,
    build_skeleton,
    check_dtype,
    find_missing,
    sort_sources,
)

Progress = Callable[[int, int], None]
"""Called with the bytes read so far and those that the rank will read; from any thread."""


class Checkpoint:
    """A Hugging Face checkpoint whose headers have been checked, open for reading.

    Args:
        directory: config.json and safetensors files.
        dtype: of the model's weights; None for that of the configuration.
        device: where weights go.
        attention: transformers' attention implementation; None lets it choose.

    Attributes:
        directory: where it is.
        model: transformers' model; on the meta device until `load_shared`.
        layers: its MoE layers.
        stored: all tensors of the files, by name.
        unused: those that the model has no use for.
        bytes_read: of data, so far.

    Collective: none.
    Raises: ModelError, in one line that names the file, the tensor or the expert, if anything is
        missing, truncated, there twice, of another shape or dtype than the model asks, or if the
        model has experts that cannot be taken over.
    """

    def __init__(
        self,
        directory: Path,
        dtype: torch.dtype | None = None,
        device: torch.device | None = None,
        attention: str | None = None,
    ) -> None:
        self.directory = directory
        self._device = device or torch.device("cpu")
        self.stored = read_headers(directory)
        self._skeleton = build_skeleton(directory, dtype, self._device, attention)
        self.model = self._skeleton.model
        self.layers = self._skeleton.layers
        # The transforms keep what they have seen: those that load are not those that sort.
        self._conversions = copy.deepcopy(self._skeleton.conversions)
        conversions, self.unused = sort_sources(self._skeleton, self.stored)
        self._experts, self._shared = self._divide(conversions)
        self._check(conversions)
        self._files: dict[Path, Any] = {}
        self._lock = threading.Lock()
        self.bytes_read = 0
        self._progress: Progress | None = None
        self._bytes_due = 0

    @property
    def shared_bytes(self) -> int:
        """Stored bytes of what every rank has."""
        return sum(t.num_bytes for c in self._shared for some in c.sources.values() for t in some)

    @property
    def num_parameters(self) -> int:
        """Parameters of the logical model, tied ones once; before the experts are taken over."""
        tied = getattr(self.model, "all_tied_weights_keys", None) or {}
        return sum(p.numel() for name, p in self.model.named_parameters() if name not in tied)

    @property
    def is_quantised(self) -> bool:
        """Whether the configuration names a quantisation."""
        return self._skeleton.quantizer is not None

    def name_first_source(self, layer: ExpertLayer) -> str:
        """A stored tensor of a layer's experts; layers that share theirs have the same."""
        return min(
            stored.name
            for conversion in self._experts[layer.name]
            for several in conversion.sources.values()
            for stored in several
        )

    def count_bytes(self, layer: ExpertLayer) -> int:
        """Stored bytes of one expert of a layer."""
        return sum(
            stored.num_bytes // (layer.num_experts if fused else 1)
            for conversion in self._experts[layer.name]
            for stored, fused in _pick(conversion, layer, 0)
        )

    def watch(self, progress: Progress | None, bytes_due: int) -> None:
        """Have `progress` told of every read from now on."""
        self._progress, self._bytes_due = progress, bytes_due

    def read_expert(self, layer: ExpertLayer, expert: int) -> list[Tensor]:
        """Read one expert, wherever the files keep it.

        Args:
            layer: one of `layers`.
            expert: 0..E-1.
        Returns:
            Its tensors, each without the first dimension, in the order of `layer.tensors`, on the
            device, in the dtype that is stored.
        Collective: none.
        Raises: ModelError if a file cannot be read any more.
        """
        made: dict[str, Tensor] = {}
        for conversion in self._experts[layer.name]:
            picked = _pick(conversion, layer, expert)
            tensors: dict[str, list[Tensor]] = {}
            for pattern, several in conversion.sources.items():
                names = {stored.name for stored in several}
                tensors[pattern] = [
                    self._read(stored, slice(expert, expert + 1) if fused else ...)
                    for stored, fused in picked
                    if stored.name in names
                ]
            made |= conversion.convert(tensors, self._skeleton)
        return [made[name][0] for name in layer.full_names()]

    def load_shared(self) -> None:
        """Give the model all weights but its experts, which must have been taken over.

        transformers' own loader does it: conversions, dtypes, tied weights, computed buffers.

        Collective: none.
        Raises: ModelError if a tensor cannot be read or does not fit.
        """
        modeling: Any = import_module("transformers.modeling_utils")
        loading: Any = import_module("transformers.core_model_loading")
        model, skeleton = self.model, self._skeleton
        config = modeling.LoadStateDictConfig(
            pretrained_model_name_or_path=str(self.directory),
            device_map={"": self._device},
            dtype=skeleton.dtype,
            dtype_plan=model._get_dtype_plan(skeleton.dtype),
            hf_quantizer=skeleton.quantizer,
            weight_mapping=self._conversions,
        )
        sources = {
            stored.name: _Slice(self, stored)
            for conversion in self._shared
            for several in conversion.sources.values()
            for stored in several
        }
        with quiet():
            try:
                info, _ = loading.convert_and_load_state_dict_in_model(model, sources, config)
                self._check_loaded(info)
                taken_over = {name for layer in self.layers for name in layer.full_names()}
                info.missing_keys -= taken_over
                type(model)._finalize_model_loading(model, config, info)
                if skeleton.quantizer is not None:
                    skeleton.quantizer.postprocess_model(model)
            except ModelError:
                raise
            except Exception as error:  # transformers raises whatever its loader raises
                raise ModelError(
                    f"{self.directory}: cannot be loaded: {first_line(error)}"
                ) from error
        self.finish_without_loading()

    def finish_without_loading(self) -> None:
        """What `load_shared` does once the weights are there, for a model that got them elsewhere.

        Collective: none.
        """
        model, skeleton = self.model, self._skeleton
        model._weight_conversions = [c for c in skeleton.conversions if c.was_used()]
        self._load_generation_config()
        model.eval().requires_grad_(False)

    def close(self) -> None:
        """Close the files; twice is fine. They open again when something is read."""
        with self._lock:
            self._files.clear()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _read(self, stored: StoredTensor, index: Any) -> Tensor:
        tensor = self._open(stored)[index]
        self._count(tensor.nbytes)
        moved: Tensor = tensor.to(self._device)
        return moved

    def _open(self, stored: StoredTensor) -> Any:
        safetensors: Any = import_module("safetensors")
        try:
            with self._lock:
                if stored.file not in self._files:
                    self._files[stored.file] = safetensors.safe_open(stored.file, framework="pt")
                return self._files[stored.file].get_slice(stored.name)
        except (OSError, safetensors.SafetensorError) as error:
            raise ModelError(f"{stored.file}: cannot be read: {first_line(error)}") from error

    def _count(self, num_bytes: int) -> None:
        with self._lock:
            self.bytes_read += num_bytes
            if self._progress is not None:
                self._progress(self.bytes_read, self._bytes_due)

    def _divide(
        self, conversions: list[Conversion]
    ) -> tuple[dict[str, list[Conversion]], list[Conversion]]:
        owner = {name: layer.name for layer in self.layers for name in layer.full_names()}
        experts: dict[str, list[Conversion]] = {layer.name: [] for layer in self.layers}
        shared = []
        for conversion in conversions:
            owners = {owner[name] for name in conversion.targets() if name in owner}
            for name in owners:
                experts[name].append(conversion)
            if not owners:
                shared.append(conversion)
        return experts, shared

    def _check(self, conversions: list[Conversion]) -> None:
        missing = find_missing(self._skeleton, conversions)
        if missing:
            raise ModelError(
                f"{self.directory}: the weights lack {len(missing)} tensors, like {missing[0]}"
            )
        known = self.model.state_dict()
        for conversion in self._shared:
            target = known[conversion.target]
            for several in conversion.sources.values():
                for stored in several:
                    check_dtype(self._skeleton, stored, target)
                    if conversion.converter is None:
                        _check_shape(stored, target.shape)
        for layer in self.layers:
            for conversion in self._experts[layer.name]:
                for several in conversion.sources.values():
                    _check_complete(self.directory, layer, several)
                    for stored in several:
                        check_dtype(self._skeleton, stored, known[conversion.target])
            self._rehearse(layer)

    def _rehearse(self, layer: ExpertLayer) -> None:
        """Convert one expert without data: what comes out must fit the model."""
        known = self.model.state_dict()
        made: dict[str, Tensor] = {}
        for conversion in self._experts[layer.name]:
            tensors: dict[str, list[Tensor]] = {}
            picked = {stored.name: fused for stored, fused in _pick(conversion, layer, 0)}
            for pattern, several in conversion.sources.items():
                tensors[pattern] = [
                    torch.empty(
                        (1, *stored.shape[1:]) if picked[stored.name] else stored.shape,
                        dtype=DTYPES[stored.dtype],
                        device="meta",
                    )
                    for stored in several
                    if stored.name in picked
                ]
            try:
                made |= conversion.convert(tensors, self._skeleton)
            except Exception as error:  # operations raise whatever PyTorch raises
                raise ModelError(
                    f"{self.directory}: {conversion.target} cannot be read expert by expert: "
                    f"{first_line(error)}"
                ) from error
        for name in layer.full_names():
            wanted = (1, *known[name].shape[1:])
            got = tuple(made[name].shape) if name in made else None
            if got != wanted:
                raise ModelError(
                    f"{self.directory}: an expert of {name} is stored in shape {list(got or ())}, "
                    f"but the model has {list(wanted)}"
                )

    def _check_loaded(self, info: Any) -> None:
        for name, got, wanted in info.mismatched_keys:
            raise ModelError(
                f"{self.directory}: {name} is stored in shape {list(got)}, but the model has "
                f"{list(wanted)}"
            )
        for name in info.conversion_errors:
            raise ModelError(f"{self.directory}: {name} cannot be made of what is stored")

    def _load_generation_config(self) -> None:
        if (self.directory / "generation_config.json").exists() and self.model.can_generate():
            transformers: Any = import_module("transformers")
            self.model.generation_config = transformers.GenerationConfig.from_pretrained(
                self.directory, local_files_only=True
            )


class _Slice:
    """A stored tensor that transformers' loader reads when it is due, counted."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredTensor) -> None:
        self._checkpoint, self._stored = checkpoint, stored

    def __getitem__(self, index: Any) -> Tensor:
        tensor: Tensor = self._checkpoint._open(self._stored)[index]
        self._checkpoint._count(tensor.nbytes)
        # Memory of its own: the file may change or go while the model serves.
        return tensor.clone() if self._checkpoint._device.type == "cpu" else tensor

    def get_dtype(self) -> str:
        """As safetensors' slices have it."""
        return self._stored.dtype

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        return list(self._stored.shape)


def _pick(
    conversion: Conversion, layer: ExpertLayer, expert: int
) -> list[tuple[StoredTensor, bool]]:
    """Stored tensors that one expert is made of, and whether it is a slice of each.

    Where there are several for each expert, block after block, it has one of each block.
    """
    picked = []
    for several in conversion.sources.values():
        if len(several) >= layer.num_experts and len(several) % layer.num_experts == 0:
            picked += [(stored, False) for stored in several[expert :: layer.num_experts]]
        else:
            picked += [
                (stored, bool(stored.shape) and stored.shape[0] == layer.num_experts)
                for stored in several
            ]
    return picked


def _check_complete(directory: Path, layer: ExpertLayer, several: list[StoredTensor]) -> None:
    """Refuse a pattern that has tensors for some experts only, or one that is not as the others."""
    if len(several) == 1:
        return
    if len(several) % layer.num_experts:
        raise ModelError(
            f"{directory}: {layer.name} lacks expert {_find_gap(layer, several)} of "
            f"{layer.num_experts}: {len(several)} tensors are stored like {several[0].name}"
        )
    for stored in several:
        _check_shape(stored, several[0].shape)


def _find_gap(layer: ExpertLayer, several: list[StoredTensor]) -> str:
    numbers = [[int(n) for n in re.findall(r"\d+", stored.name)] for stored in several]
    places = {len(found) for found in numbers}
    if len(places) == 1:
        for column in zip(*numbers, strict=True):
            if len(set(column)) == len(several):
                gap = sorted(set(range(layer.num_experts)) - set(column))
                return ", ".join(map(str, gap))
    return "or another"


def _check_shape(stored: StoredTensor, wanted: Any) -> None:
    if tuple(stored.shape) != tuple(wanted):
        raise ModelError(
            f"{stored.file}: {stored.name} has shape {list(stored.shape)}, but {list(wanted)} is "
            "wanted"
        )
