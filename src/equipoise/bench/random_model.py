"""A checkpoint of any size with random weights, for what depends on how many bytes there are."""

from __future__ import annotations

import json
import os
import shutil
import struct
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from math import isqrt
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.bundled import model_directory
from equipoise.errors import ConfigError


class _Stored(NamedTuple):
    """A dtype as safetensors has it."""

    name: str
    itemsize: int


_STORED = {"float32": _Stored("F32", 4), "bfloat16": _Stored("BF16", 2)}
_POOL_FLOATS = 1 << 22
"""Random numbers that are drawn; each tensor is another stretch of them."""
_NUM_WRITERS = 8


def write_random_model(
    directory: Path,
    num_bytes: float,
    seed: int = 0,
    *,
    num_layers: int = 4,
    num_experts: int = 128,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> None:
    """Write a model of the bundled one's tokens and architecture.

    Its answers mean nothing, but they are some model's, so that they can be compared.

    Args:
        directory: gets the files; must be there.
        num_bytes: of its experts, about.
        seed: of its weights.
        num_layers: L.
        num_experts: E.
        dtype: of the weights.
    Collective: none.
    Raises: ConfigError if so few bytes make no expert of any size; OSError if it cannot be written.
    """
    hidden = _find_hidden(num_bytes, num_layers * num_experts, _STORED[dtype].itemsize)
    transformers: Any = import_module("transformers")
    bundled = json.loads((model_directory() / "config.json").read_text())
    config = transformers.Qwen3MoeConfig(
        vocab_size=bundled["vocab_size"],
        hidden_size=hidden,
        intermediate_size=hidden,
        moe_intermediate_size=hidden,
        num_hidden_layers=num_layers,
        num_attention_heads=max(1, hidden // 128),
        num_key_value_heads=1,
        head_dim=64,
        num_experts=num_experts,
        num_experts_per_tok=2,
        max_position_embeddings=1024,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype=dtype,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    config.save_pretrained(directory)
    for file in model_directory().glob("*token*"):
        shutil.copy(file, directory)
    file = directory / "model.safetensors"
    _write_weights(file, _list_tensors(config), hidden, seed, _STORED[dtype])


def _find_hidden(num_bytes: float, count: int, itemsize: int) -> int:
    """Of so many experts that are three square matrices, a multiple of 16."""
    each = num_bytes / (count * 3 * itemsize)
    hidden = isqrt(int(each)) // 16 * 16
    if hidden < 16:
        least = count * 3 * itemsize * 16**2
        raise ConfigError(f"a random model has at least {least:,} bytes, got {num_bytes:,.0f}")
    return hidden


def _list_tensors(config: Any) -> dict[str, tuple[int, ...]]:
    """Tensors as such checkpoints have them: an expert's projections one by one."""
    torch: Any = import_module("torch")
    transformers: Any = import_module("transformers")
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    listed = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if ".experts." not in name
    }
    inner, outer = config.moe_intermediate_size, config.hidden_size
    for layer in range(config.num_hidden_layers):
        for expert in range(config.num_experts):
            path = f"model.layers.{layer}.mlp.experts.{expert}"
            listed[f"{path}.gate_proj.weight"] = (inner, outer)
            listed[f"{path}.up_proj.weight"] = (inner, outer)
            listed[f"{path}.down_proj.weight"] = (outer, inner)
    return listed


def _write_weights(
    path: Path, shapes: dict[str, tuple[int, ...]], hidden: int, seed: int, stored: _Stored
) -> None:
    header: dict[str, Any] = {}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + stored.itemsize * int(np.prod(shape))
        header[name] = {"dtype": stored.name, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    random = np.random.default_rng(seed)
    most = max(int(np.prod(shape)) for shape in shapes.values())
    # As large as keeps what passes through a layer about as large as it was.
    pool = random.standard_normal(max(_POOL_FLOATS, 4 * most), dtype=np.float32)
    pool *= hidden**-0.5
    kept = _narrow(pool, stored)
    with path.open("wb", buffering=0) as file, ThreadPoolExecutor(_NUM_WRITERS) as writers:
        file.write(struct.pack("<Q", len(text)) + text)
        jobs = []
        for name, shape in shapes.items():
            count = int(np.prod(shape))
            first = int(random.integers(0, len(pool) - count + 1))
            some = kept[first : first + count]
            if "norm" in name:
                some = _narrow(np.ones(count, dtype=np.float32), stored)
            start = 8 + len(text) + header[name]["data_offsets"][0]
            jobs.append(writers.submit(_write_at, file.fileno(), some, start))
        for job in jobs:
            job.result()


def _write_at(descriptor: int, values: NDArray[Any], start: int) -> None:
    left = values.data.cast("B")
    while left:
        written = os.pwrite(descriptor, left, start)
        left, start = left[written:], start + written


def _narrow(values: NDArray[np.float32], stored: _Stored) -> NDArray[Any]:
    """As they are stored; of bfloat16 the upper halves, which are numbers as random."""
    if stored.itemsize == 4:
        return values
    return (values.view(np.uint32) >> 16).astype(np.uint16)
