"""A model on the meta device, and which stored tensors each of its own is made of."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.models.contract import ExpertLayer, find_expert_layers
from equipoise.models.families import read_config
from equipoise.models.headers import StoredTensor
from equipoise.models.quantised import choose_quantisation
from equipoise.models.quiet import first_line, quiet

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_AUTO = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForSeq2SeqLM",
    "AutoModel",
)
_FLOATS = ("F16", "BF16", "F32", "F64")


@dataclass(frozen=True)
class Skeleton:
    """A model without weights.

    Attributes:
        model: on the meta device, experts whole.
        layers: its MoE layers.
        dtype: of its weights.
        quantizer: transformers' own, where the configuration names a quantisation.
        conversions: transformers' transforms from stored tensors to the model's.
    """

    model: Any
    layers: list[ExpertLayer]
    dtype: torch.dtype
    quantizer: Any
    conversions: list[Any]
    _experts: dict[str, tuple[torch.dtype, tuple[int, ...]]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        known = self.model.state_dict()
        names = [name for layer in self.layers for name in layer.full_names()]
        shapes = {name: (known[name].dtype, tuple(known[name].shape[1:])) for name in names}
        object.__setattr__(self, "_experts", shapes)

    def with_experts(self, num_experts: int) -> Any:
        """What operations on some experts of each layer take for the model."""
        return _SomeExperts(self.model, self._experts, num_experts)


class _SomeExperts:
    """The model as it were if each layer had so many experts.

    Some operations look at the shape that the model wants, and ours are done on a few.
    """

    def __init__(
        self,
        model: Any,
        experts: dict[str, tuple[torch.dtype, tuple[int, ...]]],
        num_experts: int,
    ) -> None:
        self._model, self._experts, self._num_experts = model, experts, num_experts

    def get_parameter(self, name: str) -> Tensor:
        """As the model's method."""
        if name in self._experts:
            dtype, shape = self._experts[name]
            return torch.empty((self._num_experts, *shape), dtype=dtype, device="meta")
        parameter: Tensor = self._model.get_parameter(name)
        return parameter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


@dataclass
class Conversion:
    """Tensors of the model that are made of the same stored ones, as transformers makes them.

    Attributes:
        target: name of the first that is made.
        converter: how; None if the stored tensor is the model's.
        sources: per pattern of the converter, the stored tensors, expert by expert where there is
            one for each.
    """

    target: str
    converter: Any
    sources: dict[str, list[StoredTensor]] = field(default_factory=dict)

    def convert(
        self, tensors: dict[str, list[Tensor]], skeleton: Skeleton, num_experts: int
    ) -> dict[str, Tensor]:
        """Make the model's tensors of some experts, by name, of those stored.

        Raises: whatever an operation of transformers raises for tensors that do not fit it.
        """
        if self.converter is None:
            return {self.target: next(iter(tensors.values()))[0]}
        converter = copy.deepcopy(self.converter)
        for pattern, several in tensors.items():
            for stored, tensor in zip(self.sources[pattern], several, strict=False):
                converter.add_tensor(self.target, stored.name, pattern, tensor)
        made = converter.convert(
            self.target,
            model=skeleton.with_experts(num_experts),
            config=skeleton.model.config,
            hf_quantizer=skeleton.quantizer,
        )
        return {
            name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in made.items()
        }

    def targets(self) -> list[str]:
        """Names of the model's tensors that are made."""
        if self.converter is None:
            return [self.target]
        first, *others = self.converter.target_patterns
        return [self.target, *(self.target.replace(first, other) for other in others)]


def build_skeleton(
    directory: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str | None = None,
    *,
    dequantize: bool = False,
) -> Skeleton:
    """Make a checkpoint's model without its weights.

    Args:
        directory: a Hugging Face checkpoint; only config.json is read.
        dtype: of the weights; None for that of the configuration, float32 if it names none.
        device: where it is to be, which a quantisation may ask; None for the CPU.
        attention: transformers' attention implementation; None lets it choose.
        dequantize: whether quantised weights become those that need no kernels.
    Collective: none.
    Raises: ModelError, in one line, if the configuration is missing or wrong, is of no model of
        transformers, or has experts that cannot be taken over.
    """
    model, chosen, quantizer = build_model(
        directory, dtype, device, attention, dequantize=dequantize
    )
    mapping: Any = import_module("transformers.conversion_mapping")
    conversions = mapping.get_model_conversion_mapping(model, None, quantizer)
    return Skeleton(model, find_expert_layers(model), chosen, quantizer, conversions)


def build_model(
    directory: Path,
    dtype: torch.dtype | None = None,
    device: torch.device | None = None,
    attention: str | None = None,
    *,
    dequantize: bool = False,
    ignore_quantisation: bool = False,
) -> tuple[Any, torch.dtype, Any]:
    """Make the model alone, on the meta device, its dtype, and what quantises it; as above.

    `ignore_quantisation` makes it as if its weights were not quantised.
    """
    read_config(directory)
    transformers: Any = import_module("transformers")
    with quiet():
        try:
            config = transformers.AutoConfig.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
            if attention is not None:
                config._attn_implementation = attention
            if ignore_quantisation and hasattr(config, "quantization_config"):
                del config.quantization_config
            choose_quantisation(config, dequantize=dequantize)
            chosen = dtype or getattr(config, "dtype", None) or torch.float32
            model, quantizer = _make_model(transformers, config, chosen, device)
        except ModelError as error:
            raise ModelError(f"{directory}: {error}") from error
        except Exception as error:  # transformers raises whatever its readers raise
            raise ModelError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    return model, chosen, quantizer


def _make_model(
    transformers: Any, config: Any, dtype: torch.dtype, device: torch.device | None
) -> tuple[nn.Module, Any]:
    device_map = {"": device or torch.device("cpu")}
    auto: Any = import_module("transformers.quantizers.auto")
    quantizer, config, _ = auto.get_hf_quantizer(config, None, device_map, True, {})
    if quantizer is not None:
        dtype = quantizer.update_dtype(dtype) if hasattr(quantizer, "update_dtype") else dtype
    config.dtype = dtype
    kind = _choose_class(transformers, config)
    contexts: Any = import_module("transformers.utils.generic").ContextManagers
    with contexts(kind.get_init_context(dtype, quantizer is not None, False, None)):
        model = kind(config)
        if quantizer is not None:
            quantizer.preprocess_model(model=model, dtype=dtype, device_map=device_map)
    made: nn.Module = model
    return made, quantizer


def _choose_class(transformers: Any, config: Any) -> Any:
    """The class that the checkpoint was written from, or the one that generates text."""
    for name in getattr(config, "architectures", None) or ():
        kind = getattr(transformers, name, None)
        if kind is not None and hasattr(kind, "get_init_context"):
            return kind
    for name in _AUTO:
        choices = getattr(transformers, name)._model_mapping
        if type(config) in choices:
            return choices[type(config)]
    raise ModelError(
        f"model_type {config.model_type!r} is not one that transformers has a model for"
    )


def sort_sources(
    skeleton: Skeleton, stored: dict[str, StoredTensor]
) -> tuple[list[Conversion], list[StoredTensor]]:
    """Find out what each stored tensor is for.

    Args:
        skeleton: the model; its conversions are marked as used where they are.
        stored: by name.
    Returns:
        The conversions, and the stored tensors that the model has no use for.
    Collective: none.
    """
    loading: Any = import_module("transformers.core_model_loading")
    renamings = [c for c in skeleton.conversions if isinstance(c, loading.WeightRenaming)]
    if not any(_may_rename(renaming, stored) for renaming in renamings):
        # Most checkpoints: to ask each of them for each tensor takes as long as the rest.
        renamings = []
    converters = [c for c in skeleton.conversions if isinstance(c, loading.WeightConverter)]
    by_pattern = {p: converter for converter in converters for p in converter.source_patterns}
    prefix, known = skeleton.model.base_model_prefix, skeleton.model.state_dict()
    made: dict[str, Conversion] = {}
    unused = []
    for name in sorted(stored, key=loading.dot_natural_key):
        target, pattern = loading.rename_source_key(name, renamings, converters, prefix, known)
        if target not in known and name in known:
            target, pattern = loading.rename_source_key(name, [], [], prefix, known)
        if target not in known:
            unused.append(stored[name])
            continue
        converter = None if pattern is None else by_pattern[pattern]
        conversion = made.setdefault(target, Conversion(target, converter))
        conversion.sources.setdefault(pattern or name, []).append(stored[name])
    return list(made.values()), unused


def _may_rename(renaming: Any, names: Iterable[str]) -> bool:
    """Whether one of transformers' renamings matches any of these names."""
    if renaming.scope_prefix is not None:
        return True
    return any(map(renaming.compiled_sources.search, names))


def find_missing(skeleton: Skeleton, conversions: Iterable[Conversion]) -> list[str]:
    """Names of the model's tensors that no stored tensor is for, and that must be stored."""
    model = skeleton.model
    made = {name for conversion in conversions for name in conversion.targets()}
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    optional = [
        re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()
    ]
    return sorted(
        name
        for name in model.state_dict()
        if name not in made and name not in tied and not any(p.search(name) for p in optional)
    )


def check_dtype(skeleton: Skeleton, stored: StoredTensor, target: Tensor) -> None:
    """Refuse what is not stored as numbers of the kind that the model computes with.

    Raises: ModelError that names the tensor.
    """
    if skeleton.quantizer is not None:
        return
    if target.is_floating_point() and stored.dtype not in _FLOATS:
        raise ModelError(
            f"{stored.file}: {stored.name} is stored as {stored.dtype}, but the model computes "
            "with floating point, and config.json names no quantisation"
        )
