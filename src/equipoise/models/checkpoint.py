"""Weights of a checkpoint, read tensor by tensor: the experts that are asked for, and the rest.

A rank reads what every rank has and its own experts, each into its place and nothing else, so that
the host holds no more than the rank's own weights and one tensor on its way. What goes to a GPU is
read ahead by threads, many experts at once.
"""

from __future__ import annotations

import copy
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import ModelError
from equipoise.models.contract import ExpertLayer
from equipoise.models.experts import ExpertReader
from equipoise.models.headers import StoredTensor, read_headers
from equipoise.models.quantised import keeps_quantised
from equipoise.models.quiet import first_line, quiet
from equipoise.models.read_ahead import ReadAhead
from equipoise.models.skeleton import (
    Conversion,
    build_skeleton,
    check_dtype,
    find_missing,
    sort_sources,
)
from equipoise.models.stored_experts import (
    BATCH_BYTES,
    Batch,
    Part,
    check_complete,
    check_shape,
    make_batches,
    pick_parts,
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
        dequantize: whether quantised weights become those that need no kernels.

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
        *,
        dequantize: bool = False,
    ) -> None:
        self.directory = directory
        self._device = device or torch.device("cpu")
        self.stored = read_headers(directory)
        self._skeleton = build_skeleton(
            directory, dtype, self._device, attention, dequantize=dequantize
        )
        self.model = self._skeleton.model
        self.layers = self._skeleton.layers
        # The transforms keep what they have seen: those that load are not those that sort.
        self._conversions = copy.deepcopy(self._skeleton.conversions)
        conversions, self.unused = sort_sources(self._skeleton, self.stored)
        self._experts, self._shared = self._divide(conversions)
        self._check(conversions)
        self._files: dict[Path, Any] = {}
        self._ahead: ReadAhead | None = None
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
        """Whether weights are quantised, as they are stored and in memory."""
        return keeps_quantised(self._skeleton.quantizer)

    @property
    def is_dequantised(self) -> bool:
        """Whether weights are stored quantised, and are not in memory."""
        return self._skeleton.quantizer is not None and not self.is_quantised

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
            part.span.num_bytes
            for conversion in self._experts[layer.name]
            for parts in pick_parts(conversion, layer, range(1)).values()
            for part in parts
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
        for _, tensors in self.read_experts(layer, [expert]):
            return [tensor[0] for tensor in tensors]
        raise AssertionError("one expert was asked for")

    def read_experts(
        self, layer: ExpertLayer, experts: Sequence[int]
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """As the protocol of readers says; raises as `read_expert`."""
        with self.read_ahead([(layer, experts)]) as reader:
            yield from reader.read_experts(layer, experts)

    @contextmanager
    def read_ahead(
        self, wanted: Iterable[tuple[ExpertLayer, Sequence[int]]]
    ) -> Iterator[ExpertReader]:
        """Have experts of many layers read before they are asked for.

        On the CPU they are not: there the host would hold what is ahead.

        Args:
            wanted: layers and, in ascending order, experts of theirs, as they will be asked for.
        Returns:
            What to ask, within.
        Collective: none.
        Raises: as `read_expert`.
        """
        batches = [
            batch
            for layer, experts in wanted
            for batch in make_batches(self._experts[layer.name], layer, experts, self._most_bytes)
        ]
        with closing(self._read(part for batch in batches for part in batch.parts)) as tensors:
            yield _Ahead(self, batches, tensors)

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
        """Close the files, when nothing is read; twice is fine. They open again when needed."""
        with self._lock:
            self._files.clear()
            ahead, self._ahead = self._ahead, None
        if ahead is not None:
            ahead.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _most_bytes(self) -> int:
        """That are read and converted at once, if an expert does not take more."""
        return 1 if self._device.type == "cpu" else BATCH_BYTES

    def _read(self, parts: Iterable[Part]) -> Generator[Tensor]:
        """Read parts, in order, to the device."""
        if self._device.type == "cpu":
            for part in parts:
                tensor: Tensor = self._open(part.stored)[part.index]
                self._count(tensor.nbytes)
                yield tensor
            return
        parts = list(parts)
        with closing(self._open_ahead().read(part.span for part in parts)) as several:
            for part, data in zip(parts, several, strict=True):
                self._count(part.span.num_bytes)
                yield part.shaped(data)

    def _open_ahead(self) -> ReadAhead:
        with self._lock:
            self._ahead = self._ahead or ReadAhead(self._device)
            return self._ahead

    def _convert(
        self, layer: ExpertLayer, experts: range, read: dict[Part, Tensor]
    ) -> list[Tensor]:
        """Make experts, of what was read for them."""
        made: dict[str, Tensor] = {}
        for conversion in self._experts[layer.name]:
            tensors = {
                pattern: [read[part] for part in parts]
                for pattern, parts in pick_parts(conversion, layer, experts).items()
            }
            made |= conversion.convert(tensors, self._skeleton, len(experts))
        return [made[name] for name in layer.full_names()]

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
        rehearsed: set[Any] = set()
        for conversion in self._shared:
            target = known[conversion.target]
            for several in conversion.sources.values():
                for stored in several:
                    check_dtype(self._skeleton, stored, target)
                    if conversion.converter is None:
                        check_shape(stored, target.shape)
        for layer in self.layers:
            for conversion in self._experts[layer.name]:
                for several in conversion.sources.values():
                    check_complete(self.directory, layer, several)
                    for stored in several:
                        check_dtype(self._skeleton, stored, known[conversion.target])
            picked = [
                pick_parts(conversion, layer, range(1)) for conversion in self._experts[layer.name]
            ]
            # Layers are mostly alike.
            kind = _describe(layer, picked, known)
            if kind not in rehearsed:
                self._rehearse(layer, picked, known)
                rehearsed.add(kind)

    def _rehearse(
        self,
        layer: ExpertLayer,
        picked: list[dict[str, list[Part]]],
        known: dict[str, Tensor],
    ) -> None:
        """Convert one expert without data: what comes out must fit the model."""
        made: dict[str, Tensor] = {}
        for conversion, parts_by_pattern in zip(self._experts[layer.name], picked, strict=True):
            tensors = {
                pattern: [part.on_meta() for part in parts]
                for pattern, parts in parts_by_pattern.items()
            }
            try:
                made |= conversion.convert(tensors, self._skeleton, 1)
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


def _describe(
    layer: ExpertLayer, picked: list[dict[str, list[Part]]], known: dict[str, Tensor]
) -> tuple[Any, ...]:
    """What an expert of a layer is made of, and what it should become."""
    return (
        tuple(
            (pattern, tuple((part.shape, part.stored.dtype) for part in parts))
            for conversion in picked
            for pattern, parts in conversion.items()
        ),
        tuple(
            (tensor, tuple(known[name].shape))
            for tensor, name in zip(layer.tensors, layer.full_names(), strict=True)
        ),
    )


class _Slice:
    """A stored tensor that transformers' loader reads when it is due, counted."""

    def __init__(self, checkpoint: Checkpoint, stored: StoredTensor) -> None:
        self._checkpoint, self._stored = checkpoint, stored

    def __getitem__(self, index: Any) -> Tensor:
        checkpoint = self._checkpoint
        if index is ... and checkpoint._device.type != "cpu":
            (read,) = checkpoint._read([Part(self._stored)])
            return read
        tensor: Tensor = checkpoint._open(self._stored)[index]
        checkpoint._count(tensor.nbytes)
        # Memory of its own: the file may change or go while the model serves.
        return tensor.clone() if checkpoint._device.type == "cpu" else tensor

    def get_dtype(self) -> str:
        """As safetensors' slices have it."""
        return self._stored.dtype

    def get_shape(self) -> list[int]:
        """As safetensors' slices have it."""
        return list(self._stored.shape)


class _Ahead:
    """Experts that are read in a known order."""

    def __init__(
        self, checkpoint: Checkpoint, batches: Iterable[Batch], tensors: Iterator[Tensor]
    ) -> None:
        self._checkpoint, self._batches, self._tensors = checkpoint, deque(batches), tensors

    def read_experts(
        self, layer: ExpertLayer, experts: Sequence[int]
    ) -> Iterator[tuple[range, list[Tensor]]]:
        """As the protocol of readers says."""
        left = len(experts)
        while left:
            batch = self._batches.popleft()
            assert batch.layer.name == layer.name, "experts are asked for in another order"
            read = {part: next(self._tensors) for part in batch.parts}
            yield batch.experts, self._checkpoint._convert(layer, batch.experts, read)
            left -= len(batch.experts)
