"""Models and tokenizers from a directory: no network, no pickles, nothing on the terminal."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.errors import ModelError
from equipoise.models.families import check_weights, read_model_shape

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
    with _quiet():
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
            raise ModelError(f"{directory}: cannot be loaded: {_first_line(error)}") from error
    missing = sorted(report["missing_keys"])
    if missing:
        raise ModelError(f"{directory}: the weights lack {len(missing)} tensors, like {missing[0]}")
    loaded: nn.Module = model.to(device).eval().requires_grad_(False)
    return loaded


def load_tokenizer(directory: Path) -> Any:
    """Load the tokenizer of a checkpoint.

    Collective: none.
    Raises: ModelError, in one line, if there is none that can be read.
    """
    # Without its files transformers makes an empty tokenizer up.
    if not any((directory / name).exists() for name in _TOKENIZER_FILES):
        raise ModelError(f"{directory}: has no tokenizer ({' or '.join(_TOKENIZER_FILES)})")
    transformers: Any = import_module("transformers")
    with _quiet():
        try:
            return transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
        except Exception as error:  # as above
            raise ModelError(
                f"{directory}: its tokenizer cannot be loaded: {_first_line(error)}"
            ) from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' bars and notices off the terminal, which belongs to the caller."""
    logging: Any = import_module("transformers.utils.logging")
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
