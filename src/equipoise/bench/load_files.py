"""A checkpoint of random weights, written by ranks together; and its files in the page cache."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch

SHARD_BYTES = 4 << 30
_BLOCK_BYTES = 64 << 20
_SAMPLES = 64
_SHIFT_BYTES = 4098
_BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class CheckpointSize:
    """A Qwen3-MoE in bfloat16.

    Attributes:
        num_layers: L.
        num_experts: E.
        hidden_size: D.
        expert_size: I.
        num_heads: of queries, each 128 wide; an eighth as many of keys and values.
        vocabulary: tokens; embeddings are not tied.
    """

    num_layers: int
    num_experts: int
    hidden_size: int
    expert_size: int
    num_heads: int
    vocabulary: int

    def config(self) -> dict[str, object]:
        """Its config.json."""
        return {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "dtype": "bfloat16",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.expert_size,
            "moe_intermediate_size": self.expert_size,
            "num_experts": self.num_experts,
            "num_experts_per_tok": 8,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self._num_kv_heads,
            "head_dim": 128,
            "vocab_size": self.vocabulary,
            "tie_word_embeddings": False,
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Names and shapes, in the order in which they are stored."""
        hidden, inner = self.hidden_size, self.expert_size
        yield "model.embed_tokens.weight", (self.vocabulary, hidden)
        for number in range(self.num_layers):
            layer = f"model.layers.{number}"
            yield f"{layer}.input_layernorm.weight", (hidden,)
            for expert in range(self.num_experts):
                experts = f"{layer}.mlp.experts.{expert}"
                yield f"{experts}.down_proj.weight", (hidden, inner)
                yield f"{experts}.gate_proj.weight", (inner, hidden)
                yield f"{experts}.up_proj.weight", (inner, hidden)
            yield f"{layer}.mlp.gate.weight", (self.num_experts, hidden)
            yield f"{layer}.post_attention_layernorm.weight", (hidden,)
            yield f"{layer}.self_attn.k_norm.weight", (128,)
            yield f"{layer}.self_attn.k_proj.weight", (128 * self._num_kv_heads, hidden)
            yield f"{layer}.self_attn.o_proj.weight", (hidden, 128 * self.num_heads)
            yield f"{layer}.self_attn.q_norm.weight", (128,)
            yield f"{layer}.self_attn.q_proj.weight", (128 * self.num_heads, hidden)
            yield f"{layer}.self_attn.v_proj.weight", (128 * self._num_kv_heads, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (self.vocabulary, hidden)

    @property
    def num_bytes(self) -> int:
        """Of all tensors; layers are alike."""
        one, two = (
            sum(prod(shape) for _, shape in replace(self, num_layers=layers).tensors())
            for layers in (1, 2)
        )
        return _BFLOAT16_BYTES * (one + (self.num_layers - 1) * (two - one))

    @property
    def _num_kv_heads(self) -> int:
        return max(1, self.num_heads // 8)


def choose_size(num_bytes: float, *, large: bool) -> CheckpointSize:
    """The size of about so many bytes: layers of Qwen3-30B-A3B, or small ones.

    Collective: none.
    """
    shape = (128, 2048, 768, 32, 151_936) if large else (32, 512, 256, 8, 8192)
    one, two = (CheckpointSize(layers, *shape).num_bytes for layers in (1, 2))
    return CheckpointSize(max(1, 1 + round((num_bytes - one) / (two - one))), *shape)


def write_checkpoint(directory: Path, size: CheckpointSize, rank: int, num_ranks: int) -> None:
    """Write this rank's share of a checkpoint, to the disk.

    Args:
        directory: is there.
        size: of the model.
        rank: of the rank; 0 writes configuration and index too.
        num_ranks: R.
    Collective: every rank, each its own files.
    Raises: OSError if it cannot be written.
    """
    shards = _divide(size, num_ranks)
    names = [f"model-{k + 1:05}-of-{len(shards):05}.safetensors" for k in range(len(shards))]
    block: Any = torch.randn(_BLOCK_BYTES // 2, dtype=torch.bfloat16).view(torch.uint8).numpy()
    for number in range(rank, len(shards), num_ranks):
        _write_shard(directory / names[number], shards[number], memoryview(block))
    if rank == 0:
        files = {
            tensor: name for name, shard in zip(names, shards, strict=True) for tensor, _ in shard
        }
        index = {"metadata": {"total_size": size.num_bytes}, "weight_map": files}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index))
        (directory / "config.json").write_text(json.dumps(size.config()))


def drop_from_cache(files: Sequence[Path]) -> None:
    """Ask the system to forget what it keeps of files. Collective: none."""
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)


def measure_cached(files: Sequence[Path]) -> float | None:
    """Share of samples of files that are in the page cache; None if the system does not say.

    Collective: none.
    """
    found = []
    for path in files:
        file = os.open(path, os.O_RDONLY)
        try:
            step = max(1, path.stat().st_size // _SAMPLES)
            for begin in range(0, path.stat().st_size, step):
                try:
                    os.preadv(file, [bytearray(1)], begin, os.RWF_NOWAIT)
                    found.append(1)
                except BlockingIOError:
                    found.append(0)
        except OSError:
            return None
        finally:
            os.close(file)
    return sum(found) / len(found) if found else None


def _divide(size: CheckpointSize, num_ranks: int) -> list[list[tuple[str, tuple[int, ...]]]]:
    """Shards of about the same size, as many for each rank to write."""
    per_rank = -(-size.num_bytes // (SHARD_BYTES * num_ranks))
    most = -(-size.num_bytes // (per_rank * num_ranks))
    shards: list[list[tuple[str, tuple[int, ...]]]] = [[]]
    filled = 0
    for name, shape in size.tensors():
        if filled >= most:
            shards.append([])
            filled = 0
        shards[-1].append((name, shape))
        filled += _BFLOAT16_BYTES * prod(shape)
    return shards


def _write_shard(
    path: Path, tensors: Sequence[tuple[str, tuple[int, ...]]], block: memoryview
) -> None:
    header, end = {}, 0
    for name, shape in tensors:
        begin, end = end, end + _BFLOAT16_BYTES * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    # Other bytes at each place, for those that would be mistaken for each other.
    first = sum(path.name.encode()) * _SHIFT_BYTES
    with path.open("wb", buffering=0) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        while end:
            first %= len(block)
            count = file.write(block[first : first + min(end, len(block) - _SHIFT_BYTES)])
            first, end = first + count, end - count
        os.fsync(file.fileno())
