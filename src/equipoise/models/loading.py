"""Models and tokenizers from a directory: no network, no pickles, nothing on the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint, Progress
from equipoise.models.contract import ExpertLayer
from equipoise.models.experts import ExpertParallelModel, SetPlan, list_held, take_over
from equipoise.models.families import check_weights, read_model_shape
from equipoise.models.quiet import first_line, quiet

_TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


def load_model(directory: Path, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """Load a causal language model for inference.

    Args:
        directory: a Hugging Face checkpoint with safetensors.
        dtype: of the weights.
        device: where they go.
    Returns:
        The plain transformers model, in evaluation mode.
    Collective: none.
    Raises: ModelError, in one line, if the directory, config.json or weights are missing or
        unreadable, weights are pickled, or the model is not of a family that can be served.
    """
    read_model_shape(directory)
    check_weights(directory)
    transformers: Any = import_module("transformers")
    with quiet():
        try:
            model, report = transformers.AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                attn_implementation="sdpa",
                use_safetensors=True,
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        except Exception as error:  # transformers raises whatever its readers raise
            raise ModelError(f"{directory}: cannot be loaded: {first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{directory}: the weights lack {len(missing)} tensors, like {missing[0]}")
    loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def load_spread(
    checkpoint: Checkpoint,
    plans: Sequence[SetPlan],
    group: RankGroup,
    progress: Progress | None = None,
) -> ExpertParallelModel:
    """Read what this rank needs of a checkpoint: the experts of its slots, and what all ranks have.

    Args:
        checkpoint: open, for the group's device.
        plans: of all its sets of layers.
        group: the ranks.
        progress: told of every read.
    Returns:
        The model with this rank's slots, on the group's device.
    Collective: every rank of the group; the slowest must be ready within the deadline of the first.
    Raises: ModelError on every rank if a rank cannot read its weights; MembershipError if one does
        not come.
    """
    failure: ModelError | None = None
    spread: ExpertParallelModel | None = None
    try:
        wanted = [held for plan in plans for held in _list_experts(plan, group.rank)]
        bytes_due = sum(checkpoint.count_bytes(layer) * len(held) for layer, held in wanted)
        checkpoint.watch(progress, checkpoint.shared_bytes + bytes_due)
        with checkpoint.read_ahead(wanted) as reader:
            spread = take_over(checkpoint.model, plans, group.rank, reader)
        checkpoint.load_shared()
    except ModelError as error:
        failure = error
    finally:
        checkpoint.watch(None, 0)
        checkpoint.close()
    failed = torch.full((1,), -1 if failure is None else group.rank)
    group.all_reduce(failed, "max")
    if failure is not None:
        raise failure
    if spread is None or failed.item() >= 0:
        raise ModelError(f"rank {failed.item()} could not load {checkpoint.directory}")
    return spread


def _list_experts(plan: SetPlan, rank: int) -> Iterator[tuple[ExpertLayer, list[int]]]:
    """What a rank holds of each layer."""
    placement = plan.maps.placement
    num_slots = placement.topology.slots_per_rank
    mine = placement.slot_to_expert[:, rank * num_slots : (rank + 1) * num_slots]
    for layer, held in zip(plan.layers, mine, strict=True):
        yield layer, list_held(held.tolist())


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Collective: none.
    Raises: ModelError, in one line, if there is none that can be read.
    """
    # Without its files transformers makes an empty tokenizer up.
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"{directory}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    transformers: Any = import_module("transformers")
    with quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # as above
            raise ModelError(
                f"{directory}: its tokenizer cannot be loaded: {first_line(error)}"
            ) from error
