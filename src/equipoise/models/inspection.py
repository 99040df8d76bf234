"""What a configuration says of serving a model: experts, bytes, ranks, and what would not do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from equipoise.errors import ModelError, PlacementError
from equipoise.models.contract import ADAPTED, ALIKE, ExpertLayer, find_expert_layers, group_by_size
from equipoise.models.families import FAMILIES, read_config
from equipoise.models.headers import INDEX, SINGLE, StoredTensor, read_index
from equipoise.models.quantised import check_kernels, keeps_quantised
from equipoise.models.skeleton import build_model, build_skeleton, find_missing, sort_sources
from equipoise.models.stored_experts import check_complete
from equipoise.topology import choose_num_redundant

_TOP_K = (
    "top_k",
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_k",
    "moe_topk",
    "top_k_experts",
)


@dataclass(frozen=True)
class InspectedSet:
    """MoE layers that have as many experts as each other.

    Attributes:
        experts: name of transformers' class, or several of them.
        num_layers: L.
        num_experts: E.
        top_k: K, experts per token; None where the model does not say.
        expert_bytes: of one expert, smallest and largest layer, in the model's dtype.
        slots_per_rank: S for the ranks and the redundancy asked; None if they do not divide.
        rank_bytes: of a rank's slots of these layers.
    """

    experts: str
    num_layers: int
    num_experts: int
    top_k: int | None
    expert_bytes: tuple[int, int]
    slots_per_rank: int | None
    rank_bytes: int | None


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        model_type: family, as config.json names it.
        architecture: class of transformers that is made.
        dtype: of the weights.
        quantisation: how they are quantised, None if they are not.
        adapter: how experts are taken over, None if they are not.
        sets: MoE layers by their number of experts.
        shared_bytes: of what every rank has.
        num_ranks: R.
        refused: what would not do, one line each.
    """

    model_type: str
    architecture: str
    dtype: str
    quantisation: str | None
    adapter: str | None
    sets: tuple[InspectedSet, ...]
    shared_bytes: int
    num_ranks: int
    refused: tuple[str, ...]

    @property
    def rank_bytes(self) -> int | None:
        """Weights of one rank; None if slots do not divide by ranks."""
        parts = [one.rank_bytes for one in self.sets]
        if None in parts:
            return None
        return self.shared_bytes + sum(part for part in parts if part is not None)


def inspect_checkpoint(directory: Path, num_ranks: int, num_redundant: int | None) -> Inspection:
    """Find out what serving a checkpoint takes, from config.json and the files' headers alone.

    Args:
        directory: with config.json; weights need not be there.
        num_ranks: R.
        num_redundant: redundant slots of each layer, None for what `auto` takes.
    Returns:
        What was found; what cannot be done is said in `refused`.
    Collective: none.
    Raises: ModelError if there is no configuration that transformers can make a model of.
    """
    refused: list[str] = []
    try:
        model, dtype, quantizer = build_model(directory)
        if keeps_quantised(quantizer):
            check_kernels(model)
    except ModelError as error:
        if not read_config(directory).get("quantization_config"):
            raise
        # What can be said of it all the same.
        refused.append(str(error))
        model, dtype, _ = build_model(directory, ignore_quantisation=True)
    can_be_read = not refused
    layers: list[ExpertLayer] = []
    try:
        layers = find_expert_layers(model)
        if not layers:
            refused.append(f"{type(model).__name__} has no experts")
    except ModelError as error:
        refused.append(str(error))
    sets = []
    for group in group_by_size(layers):
        one, reason = _inspect_set(model, group, num_ranks, num_redundant)
        sets.append(one)
        refused += reason
    refused += _check_files(directory) if layers and can_be_read else []
    model_type = str(model.config.model_type)
    if layers and model_type not in FAMILIES:
        refused.append(
            f"equipoise run: serves {', '.join(FAMILIES)}; use equipoise.parallelize for others"
        )
    said = read_config(directory).get("quantization_config") or {}
    return Inspection(
        model_type=model_type,
        architecture=type(model).__name__,
        dtype=str(dtype).removeprefix("torch."),
        quantisation=said.get("quant_method"),
        adapter=_name_adapter(layers),
        sets=tuple(sets),
        shared_bytes=_count_shared(model, layers),
        num_ranks=num_ranks,
        refused=tuple(refused),
    )


def _inspect_set(
    model: nn.Module, layers: list[ExpertLayer], num_ranks: int, num_redundant: int | None
) -> tuple[InspectedSet, list[str]]:
    per_expert = [_count_expert(layer) for layer in layers]
    num_experts, slots, refused = layers[0].num_experts, None, []
    try:
        extra = choose_num_redundant(num_experts, num_ranks, num_redundant)
        slots = (num_experts + extra) // num_ranks
    except PlacementError as error:
        refused.append(str(error))
    one = InspectedSet(
        experts=", ".join(sorted({type(layer.module).__name__ for layer in layers})),
        num_layers=len(layers),
        num_experts=num_experts,
        top_k=_find_top_k(model, layers[0]),
        expert_bytes=(min(per_expert), max(per_expert)),
        slots_per_rank=slots,
        rank_bytes=None if slots is None else slots * sum(per_expert),
    )
    return one, refused


def _count_expert(layer: ExpertLayer) -> int:
    tensors: list[Tensor] = [getattr(layer.module, name) for name in layer.tensors]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors) // layer.num_experts


def _count_shared(model: Any, layers: list[ExpertLayer]) -> int:
    left_out = {name for layer in layers for name in layer.full_names()}
    left_out |= set(getattr(model, "all_tied_weights_keys", None) or {})
    shared: dict[str, Tensor] = model.state_dict()
    return sum(
        tensor.numel() * tensor.element_size()
        for name, tensor in shared.items()
        if name not in left_out
    )


def _find_top_k(model: nn.Module, layer: ExpertLayer) -> int | None:
    """What the block around the experts, its router or its configuration says."""
    block = model.get_submodule(layer.name.rpartition(".")[0])
    for part in (*block.modules(), getattr(layer.module, "config", None)):
        for name in _TOP_K:
            value = getattr(part, name, None)
            if isinstance(value, int):
                return value
    return None


def _name_adapter(layers: list[ExpertLayer]) -> str | None:
    if not layers:
        return None
    if any(type(layer.module).__name__ in ALIKE for layer in layers):
        return "called alike (eager)"
    if any(type(layer.module).__name__ in ADAPTED for layer in layers):
        return "of its own (Llama 4)"
    return "use_experts_implementation"


def _check_files(directory: Path) -> list[str]:
    from equipoise.models.checkpoint import Checkpoint

    try:
        promised = read_index(directory)
        if promised and not any((directory / name).exists() for name in promised.values()):
            _check_names(directory, promised)
        elif promised or (directory / SINGLE).exists():
            Checkpoint(directory).close()
    except ModelError as error:
        return [str(error)]
    return []


def _check_names(directory: Path, promised: dict[str, str]) -> None:
    """Look for what the model needs in an index whose files are not here."""
    skeleton = build_skeleton(directory)
    stored = {
        name: StoredTensor(name, directory / file, "", (), 0, 0) for name, file in promised.items()
    }
    conversions, _ = sort_sources(skeleton, stored)
    missing = find_missing(skeleton, conversions)
    if missing:
        raise ModelError(f"{directory}: {INDEX} lacks {len(missing)} tensors, like {missing[0]}")
    owner = {name: layer for layer in skeleton.layers for name in layer.full_names()}
    for conversion in conversions:
        if conversion.target in owner:
            for several in conversion.sources.values():
                check_complete(directory, owner[conversion.target], several)
