"""Checkpoints whose weights are FP8 in blocks with a scale for each, and MXFP4 ones."""

from __future__ import annotations

import json
from pathlib import Path

import torch

BLOCK = (8, 16)
LARGEST = torch.finfo(torch.float8_e4m3fn).max
UNTOUCHED = ("embed_tokens", "lm_head", "mlp.gate.", "moe.gate.", "norm")


def write_fp8(source: Path, target: Path) -> None:
    """Quantise a checkpoint that transformers wrote in one file.

    Args:
        source: in floating point.
        target: is made.
    """
    from safetensors.torch import load_file, save_file

    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if tensor.ndim != 2 or any(part in name for part in UNTOUCHED):
            tensors[name] = tensor.to(torch.bfloat16)
        else:
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensor)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": list(BLOCK),
    }
    (target / "config.json").write_text(json.dumps(config))


def quantise(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights [N, K] -> FP8 [N, K] and scales [N / block, K / block] to multiply them with."""
    rows, columns = tensor.shape[0] // BLOCK[0], tensor.shape[1] // BLOCK[1]
    blocks = tensor.float().reshape(rows, BLOCK[0], columns, BLOCK[1])
    scale = blocks.abs().amax((1, 3)) / LARGEST
    quantised = (blocks / scale[:, None, :, None]).reshape(tensor.shape)
    return quantised.to(torch.float8_e4m3fn), scale


def write_mxfp4(source: Path, target: Path) -> None:
    """Give a GPT-OSS checkpoint random experts in MXFP4, as OpenAI's have them."""
    from safetensors.torch import load_file, save_file

    random = torch.Generator().manual_seed(0)
    tensors: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        if name.endswith(("gate_up_proj", "down_proj")):
            # [E, in, out] -> blocks of 32 along `in`, two numbers to a byte.
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32, 16)
            blocks = torch.randint(256, shape, generator=random, dtype=torch.uint8)
            scales = torch.randint(121, 125, shape[:3], generator=random, dtype=torch.uint8)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        else:
            tensors[name] = tensor.to(torch.bfloat16)
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["dtype"] = "bfloat16"
    config["quantization_config"] = {
        "quant_method": "mxfp4",
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"],
    }
    (target / "config.json").write_text(json.dumps(config))
