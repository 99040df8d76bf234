"""Which modules of a model are experts that can be taken over, and which of their tensors move.

transformers marks experts whose computation it lets others choose: `@use_experts_implementation`.
They have `num_experts` and `is_transposed`, are called with (hidden [T, D], experts [T, K], weights
[T, K]), and keep whatever belongs to an expert in tensors whose first dimension is the expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor, nn

from equipoise.errors import ModelError
from equipoise.models.llama4 import EXPERTS, adapt_llama4

ALIKE = frozenset({"Step3p7Experts"})
"""Classes without the decorator that are called alike and keep their tensors alike."""

ADAPTED = frozenset({EXPERTS})
"""Classes that are brought into the contract by an adapter of their own."""

REASONS = {
    "DbrxExperts": "all experts of a layer are one matrix [E * I, D]",
    "JetMoeParallelExperts": (
        "attention is a mixture of experts too, and rows come sorted by a router of its own"
    ),
    "LongcatFlashExperts": "some experts are the identity and have no weights",
    "NllbMoeExperts": "each expert is a module of its own, and a capacity drops tokens",
    "SwitchTransformersExperts": "each expert is a module of its own, and a capacity drops tokens",
}
"""Why experts classes of transformers outside the contract are refused."""


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one MoE layer.

    Attributes:
        name: path of the module in the model.
        module: the experts.
        num_experts: E.
        tensors: names of parameters and buffers [E, ...], which move with their expert.
        copies: other modules that share these tensors; they are tied to this one.
    """

    name: str
    module: nn.Module
    num_experts: int
    tensors: tuple[str, ...]
    copies: tuple[nn.Module, ...] = ()

    def full_names(self) -> list[str]:
        """Names of the tensors in the model's state dict."""
        return [f"{self.name}.{name}" for name in self.tensors]


def find_expert_layers(model: nn.Module) -> list[ExpertLayer]:
    """Find the experts of a model, in the order of its modules.

    Args:
        model: as transformers makes it, on any device, meta included. Families with an adapter are
            brought into the contract first, in place.
    Returns:
        One entry per MoE layer, whatever the number of experts; none for a dense model.
    Collective: none.
    Raises: ModelError, naming the module or the tensor, if there are experts that cannot be taken
        over, that have been already, or that have a tensor that may be an expert's or may not.
    """
    adapt_llama4(model)
    tied: dict[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    layers: dict[str, ExpertLayer] = {}
    copies: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        if not _is_expert_module(name, module):
            continue
        layer = _describe(name, module)
        origin = _find_origin(layer, tied)
        if origin is None:
            layers[name] = layer
        else:
            copies.setdefault(origin, []).append(module)
    return [
        ExpertLayer(
            layer.name,
            layer.module,
            layer.num_experts,
            layer.tensors,
            tuple(copies.get(name, ())),
        )
        for name, layer in layers.items()
    ]


def group_by_size(layers: list[ExpertLayer]) -> list[list[ExpertLayer]]:
    """Layers that have as many experts, in the order of their first layer."""
    groups: dict[int, list[ExpertLayer]] = {}
    for layer in layers:
        groups.setdefault(layer.num_experts, []).append(layer)
    return list(groups.values())


def _is_expert_module(name: str, module: nn.Module) -> bool:
    kind = type(module)
    decorated = (
        hasattr(module, "num_experts")
        and hasattr(module, "is_transposed")
        and hasattr(kind.forward, "__wrapped__")
    )
    if decorated or kind.__name__ in ALIKE:
        if "forward" in vars(module):
            raise ModelError(f"{name}: its experts have been taken over already")
        if len(inspect.signature(kind.forward).parameters) != 4:
            raise ModelError(
                f"{name}: {kind.__name__} is not called with hidden states, experts and weights "
                "alone, and cannot be taken over"
            )
        return True
    reason = REASONS.get(kind.__name__)
    if reason is None and kind.__name__.endswith("Experts") and "Shared" not in kind.__name__:
        reason = "it is not decorated with transformers' use_experts_implementation"
    if reason is not None:
        raise ModelError(f"{name}: {kind.__name__} cannot be taken over: {reason}")
    return False


def _describe(name: str, module: nn.Module) -> ExpertLayer:
    num_experts = int(module.num_experts)  # type: ignore[arg-type]
    per_expert = []
    for tensor_name, tensor in _own_tensors(module):
        if tensor.ndim and tensor.shape[0] == num_experts:
            per_expert.append(tensor_name)
        elif tensor.numel() > 1:
            raise ModelError(
                f"{name}.{tensor_name} has shape {list(tensor.shape)}: neither one entry for each "
                f"of {num_experts} experts nor one for all, so it is not known what moves with an "
                "expert"
            )
    for path, child in module.named_modules():
        for tensor_name, tensor in _own_tensors(child) if path else ():
            if tensor.ndim and tensor.shape[0] == num_experts and num_experts > 1:
                raise ModelError(
                    f"{name}.{path}.{tensor_name} has shape {list(tensor.shape)} and looks as if "
                    f"it held one entry for each of {num_experts} experts, but is a part of "
                    f"{type(child).__name__}, which is not known to: it would stay behind when "
                    "experts move"
                )
    if not per_expert:
        raise ModelError(f"{name}: {type(module).__name__} has no tensor for each expert")
    return ExpertLayer(name, module, num_experts, tuple(per_expert))


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)


def _find_origin(layer: ExpertLayer, tied: dict[str, str]) -> str | None:
    """The module that all tensors of a layer are tied to; None if they are its own."""
    origins = {
        tied[name].rpartition(".")[0] if name in tied else None for name in layer.full_names()
    }
    if len(origins) > 1:
        raise ModelError(f"{layer.name}: some of its tensors are tied to others, and some are not")
    return next(iter(origins))
