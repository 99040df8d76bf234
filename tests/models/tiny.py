"""Tiny random models of every family that can be taken over, found in the files of transformers."""

from __future__ import annotations

import dataclasses
import functools
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from equipoise.models.contract import ADAPTED, ALIKE

KERNELS = ("batched_mm", "grouped_mm", "eager")
EXPERTS, TOP_K, VOCABULARY = 8, 3, 97
LARGEST = 10_000_000
"""Parameters; a model that stays larger than this has a part that was not made small."""

_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
_MULTI_ROPE = _ROPE | {"mrope_section": [1, 1, 2]}

# Experts are a multiple of 32 wide: an activation over other sizes ends in a scalar remainder, and
# there the last bits depend on the place of a token in the batch.
SIZES: dict[str, Any] = {
    "adapter_in_dim": 32,
    "adapter_input_size": 32,
    "adapter_out_dim": 32,
    "bos_token_id": 1,
    "d_model": 32,
    "depth": 1,
    "embed_dim": 32,
    "enable_moe_block": True,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 24,
    "encoder_layers": 1,
    "eos_token_id": 2,
    "expert_intermediate_size": 32,
    "first_k_dense_replace": 1,
    "global_head_dim": 8,
    "head_dim": 8,
    "hidden_size": 32,
    "hidden_size_per_layer_input": 8,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "index_topk": 4,
    "initializer_range": 0.1,
    "intermediate_size": 32,
    "kv_lora_rank": 16,
    "linear_head_dim": 8,
    "linear_key_head_dim": 8,
    "linear_num_heads": 4,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 8,
    "mamba_d_head": 8,
    "mamba_d_state": 8,
    "mamba_head_dim": 8,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "max_position_embeddings": 128,
    "moe_intermediate_size": 32,
    "moe_k": TOP_K,
    "moe_num_experts": EXPERTS,
    "moe_num_shared_experts": 1,
    "moe_topk": TOP_K,
    "n_group": 1,
    "n_groups": 1,
    "n_routed_experts": EXPERTS,
    "n_shared_experts": 1,
    "num_attention_heads": 4,
    "num_dense_layers": 1,
    "num_experts": EXPERTS,
    "num_experts_per_tok": TOP_K,
    "num_heads": 4,
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "num_local_experts": EXPERTS,
    "num_position_embeddings": 16,
    "num_shared_experts": 1,
    "out_hidden_size": 32,
    "output_dim": 32,
    "pad_token_id": 0,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "router_hidden_size": 16,
    "shared_expert_intermediate_size": 32,
    "shared_experts_intermediate_size": 32,
    "sliding_window": 8,
    "ssm_state_size": 8,
    "top_k_experts": TOP_K,
    "topk_group": 1,
    "use_cache": False,
    "v_head_dim": 8,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
}
"""What makes a configuration small, by the name of its field; fields that it lacks are left out."""

EXCEPTIONS: dict[str, dict[str, Any]] = {
    "Llama4TextConfig": {"num_experts_per_tok": 1, "intermediate_size_mlp": 32},
    "BeamConfig": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "DbrxConfig": {"attn_config": {"kv_n_heads": 4, "rope_theta": 10_000.0}},
    "DeepseekV4Config": {"mlp_layer_types": ["moe", "moe", "moe"]},
    "DeepseekOcr2TextConfig": {"mlp_layer_types": ["dense", "sparse", "sparse"]},
    "Dots3NoteTextConfig": {"use_sliding_window": False},
    "Dots3NoteVisionConfig": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "num_experts_per_tok": 2,
    },
    "Ernie4_5_VLMoeTextConfig": {
        "moe_intermediate_size": [32, 32],
        "head_dim": 8,
        "rope_parameters": _MULTI_ROPE,
    },
    "Glm4vMoeTextConfig": {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "rope_parameters": _MULTI_ROPE,
    },
    "Glm5NextTextConfig": {
        "head_dim": 0,
        "index_kpool": 2,
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "qk_rope_head_dim": 0,
    },
    "HYV4VLTextConfig": {"rope_parameters": _MULTI_ROPE},
    "JambaConfig": {
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "Lfm2MoeConfig": {"layer_types": ["conv", "full_attention", "full_attention"]},
    "MiMoV2FlashConfig": {"num_key_value_heads": 2},
    "MuseSparkTextConfig": {"moe_hidden_size": 32},
    "Qwen3OmniMoeTalkerTextConfig": {"shared_expert_intermediate_size": 32},
    "Step3p7TextConfig": {
        "mlp_layer_types": ["dense", "sparse", "sparse"],
        "share_expert_dim": 32,
    },
    "ZayaConfig": {"num_experts_per_tok": 1},
}
"""What single configurations need besides."""


@dataclass(frozen=True)
class Family:
    """One experts class.

    Attributes:
        experts: its name.
        folder: of transformers.models.
        module: where it is defined.
        kernels: implementations that it can compute with.
    """

    experts: str
    folder: str
    module: str
    kernels: tuple[str, ...] = KERNELS


@functools.cache
def list_families() -> tuple[Family, ...]:
    """Every experts class of the installed transformers within the contract; imports no model."""
    decorated = r"^@use_experts_implementation\b[^\n]*\nclass (\w+)\("
    named = r"^class ({})\("
    alike, adapted = (named.format("|".join(sorted(some))) for some in (ALIKE, ADAPTED))
    families = [Family(*found) for found in _scan(decorated)]
    families += [Family(*found, kernels=("eager",)) for found in _scan(alike)]
    families += [Family(*found, kernels=("grouped_mm",)) for found in _scan(adapted)]
    return tuple(families)


@functools.cache
def list_outside() -> tuple[Family, ...]:
    """Every class of the installed transformers that is called experts and is not within it."""
    within = {family.experts for family in list_families()}
    named = [Family(*found) for found in _scan(r"^class (\w+Experts)\(")]
    return tuple(
        family
        for family in named
        if family.experts not in within and "Shared" not in family.experts
    )


def _scan(pattern: str) -> Iterator[tuple[str, str, str]]:
    import transformers

    root = Path(transformers.__file__).parent / "models"
    for path in sorted(root.glob("*/modeling_*.py")):
        for name in re.findall(pattern, path.read_text(encoding="utf-8"), re.MULTILINE):
            yield name, path.parent.name, f"transformers.models.{path.parent.name}.{path.stem}"


def make_tiny(family: Family, seed: int = 0) -> Any:
    """A tiny random model that computes with a family's experts, in evaluation mode.

    Raises: LookupError that says what was tried, if no configuration alone makes one.
    """

    def build(skeleton: nn.Module, experts: type[nn.Module]) -> nn.Module:
        size = sum(parameter.numel() for parameter in skeleton.parameters())
        if size > LARGEST:
            raise ValueError(f"{size} parameters")
        torch.manual_seed(seed)
        model = type(skeleton)(skeleton.config).eval().requires_grad_(False)
        stir(model, experts)
        run(model, torch.arange(5, 25)[None])
        return model

    return _try_heads(family, build)


def make_skeleton(family: Family) -> Any:
    """A tiny model with a family's experts, on the meta device; it need not compute anything."""
    return _try_heads(family, lambda skeleton, _: skeleton)


def _try_heads(family: Family, build: Callable[[Any, type[nn.Module]], nn.Module]) -> Any:
    module = importlib.import_module(family.module)
    experts = getattr(module, family.experts)
    tried = []
    for head in _list_heads(module):
        try:
            config = shrink(head.config_class)
            with torch.device("meta"):
                skeleton = head(config)
            if any(type(part) is experts for part in skeleton.modules()):
                return build(skeleton, experts)
        except Exception as error:  # models of others raise whatever they raise
            tried.append(f"{head.__name__}: {type(error).__name__}: {str(error)[:200]}")
    raise LookupError(f"{family.experts}: " + ("; ".join(tried) or "no model has it"))


def shrink(config_class: Any) -> Any:
    """A small configuration, its parts made small too."""
    fields = {field.name for field in dataclasses.fields(config_class)}
    chosen = {name: size for name, size in SIZES.items() if name in fields}
    for name, part in (getattr(config_class, "sub_configs", None) or {}).items():
        if isinstance(part, type) and part.__name__ != "AutoConfig":
            chosen[name] = shrink(part)
    return config_class(**chosen | EXCEPTIONS.get(config_class.__name__, {}))


def stir(model: nn.Module, experts: type[nn.Module]) -> None:
    """Give experts, and biases and scales that start as a constant, values of their own.

    Not every family initialises its experts.
    """
    random = torch.Generator().manual_seed(1)
    for module in model.modules():
        for tensor in module.parameters(recurse=False):
            if type(module) is experts:
                tensor.copy_(torch.randn(tensor.shape, generator=random) * 0.1)
            elif tensor.is_floating_point() and tensor.numel() > 1 and tensor.min() == tensor.max():
                tensor.add_(torch.randn(tensor.shape, generator=random), alpha=0.05)


@torch.inference_mode()
def run(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits or hidden states of a model for tokens [B, T]."""
    arguments: dict[str, Any] = {"use_cache": False}
    if "Talker" in type(model).__name__:
        arguments["inputs_embeds"] = model.get_input_embeddings()(tokens)
    else:
        arguments["input_ids"] = tokens
    output = model(**arguments)
    result: torch.Tensor = output.logits if hasattr(output, "logits") else output.last_hidden_state
    return result


def _list_heads(module: Any) -> Iterator[Any]:
    """Models of a file: those that generate text first, then their bases."""
    from transformers import PreTrainedModel

    heads = [
        value
        for name, value in vars(module).items()
        if inspect.isclass(value)
        and issubclass(value, PreTrainedModel)
        and value.__module__ == module.__name__
        and isinstance(value.config_class, type)
        and not name.lower().endswith("pretrainedmodel")
    ]
    order = ("ForCausalLM", "ForConditionalGeneration", "For", "")
    yield from sorted(heads, key=lambda head: [word in head.__name__ for word in order].index(True))
