"""What a checkpoint's configuration says of its experts; read without PyTorch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import ModelError

FAMILIES = ("qwen3_moe", "mixtral", "olmoe")
"""Families that the reference engine serves, by `model_type`; `parallelize` takes many more."""

_NUM_EXPERTS_KEYS = ("num_experts", "num_local_experts")
"""Both occur, also within a family: which one depends on what wrote the file."""


@dataclass(frozen=True)
class ModelShape:
    """The experts of a model.

    Attributes:
        model_type: family, as config.json names it.
        num_layers: L, MoE layers.
        num_experts: E, of each.
        top_k: K, experts per token.
    """

    model_type: str
    num_layers: int
    num_experts: int
    top_k: int


def read_model_shape(directory: Path) -> ModelShape:
    """Read from config.json how many experts a model has.

    Args:
        directory: a Hugging Face checkpoint.
    Collective: none.
    Raises: ModelError if the directory or its config.json is missing or unreadable, or the model
        is not of a family in FAMILIES.
    """
    config = read_config(directory)
    model_type = config.get("model_type")
    if model_type not in FAMILIES:
        raise ModelError(
            f"{directory}: model_type {model_type!r} is not a family that can be served: "
            f"ask for one of {', '.join(FAMILIES)}"
        )
    num_layers = _read_count(directory, config, "num_hidden_layers")
    if model_type == "qwen3_moe":
        dense = set(config.get("mlp_only_layers") or ())
        every = _read_count(directory, {"decoder_sparse_step": 1, **config}, "decoder_sparse_step")
        moe = [i for i in range(num_layers) if i not in dense and (i + 1) % every == 0]
        num_layers = len(moe)
        if not moe:
            raise ModelError(f"{directory}: config.json makes every layer dense: no experts")
    key = next((k for k in _NUM_EXPERTS_KEYS if k in config), _NUM_EXPERTS_KEYS[0])
    return ModelShape(
        model_type,
        num_layers,
        _read_count(directory, config, key),
        _read_count(directory, config, "num_experts_per_tok"),
    )


def check_weights(directory: Path) -> None:
    """Refuse a checkpoint whose weights are missing or pickled; opens none of them.

    Args:
        directory: a Hugging Face checkpoint.
    Collective: none.
    Raises: ModelError that says what is there instead.
    """
    if any(directory.glob("*.safetensors")):
        return
    pickled = sorted(path.name for path in directory.glob("*.bin"))
    if pickled:
        raise ModelError(
            f"{directory}: weights are pickled ({pickled[0]}), which can run code: "
            "convert them to safetensors"
        )
    raise ModelError(f"{directory}: has no weights (*.safetensors)")


def read_config(directory: Path) -> dict[str, Any]:
    """Read config.json.

    Collective: none.
    Raises: ModelError if the directory or its config.json is missing, or it is no JSON object.
    """
    if not directory.is_dir():
        what = "is not a directory" if directory.exists() else "no such directory"
        raise ModelError(f"{directory}: {what}; a model is a Hugging Face checkpoint directory")
    path = directory / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelError(f"{directory}: has no config.json; is it a checkpoint?") from error
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: cannot be read as JSON: {error}") from error
    if not isinstance(config, dict):
        raise ModelError(f"{path}: must be a JSON object, not {type(config).__name__}")
    return config


def _read_count(directory: Path, config: dict[str, Any], key: str) -> int:
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ModelError(
            f"{directory}: config.json must give {key} as a whole number of at least 1, "
            f"got {value!r}"
        )
    return value
