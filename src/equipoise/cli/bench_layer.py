"""`equipoise bench layer`: one MoE layer on ranks, beside transformers' own expert parallelism."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal

import typer

from equipoise.cli.bench import JsonPath, check_json_path, show_outcome

_COLUMNS = (
    ("routing", "routing"),
    ("tokens per rank", "tokens_per_rank"),
    ("wire", "wire"),
    ("s", "seconds"),
    ("transformers, s", "peer_seconds"),
    ("ratio", "ratio"),
    ("goal", "goal"),
    ("met", "met"),
    ("imbalance", "imbalance"),
    ("balanced", "balanced_imbalance"),
    ("in order, s", "in_order_seconds"),
    ("gain", "gain"),
)


class LayerDevice(StrEnum):
    """Where tokens and experts are."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


def bench_layer(
    device: Annotated[
        LayerDevice, typer.Option(help="Where tokens are; auto: on GPUs if there are two.")
    ] = LayerDevice.AUTO,
    ranks: Annotated[int, typer.Option(help="Processes, at least 2.")] = 2,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of each rank; one number instead of two.")
    ] = None,
    skew: Annotated[
        float, typer.Option(help="The n-th expert is chosen 1 / n**skew as often, where skewed.")
    ] = 0.5,
    kernels: Annotated[
        str, typer.Option(help="Of transformers, for both sides: grouped_mm, batched_mm, eager.")
    ] = "grouped_mm",
    rounds: Annotated[int, typer.Option(help="How often each side is timed.")] = 11,
    seed: Annotated[int, typer.Option(help="Of weights, tokens and their routes.")] = 0,
    timeout: Annotated[float, typer.Option(help="Longest wait for another rank, in s.")] = 60.0,
    json_path: JsonPath = None,
) -> None:
    """Compute one MoE layer on ranks, beside transformers' own expert parallelism."""
    check_json_path(json_path)
    from equipoise.bench.layer import compare_layer
    from equipoise.bench.layer_case import QWEN3_30B, SMALL, LayerSpec, make_cases
    from equipoise.errors import ConfigError

    if kernels not in ("grouped_mm", "batched_mm", "eager"):
        raise ConfigError(f"--kernels must be grouped_mm, batched_mm or eager, got {kernels}")
    on_gpus = device is LayerDevice.CUDA or (device is LayerDevice.AUTO and _count_gpus() >= 2)
    cases = make_cases(tokens, on_gpus=on_gpus)
    size = QWEN3_30B if on_gpus else SMALL
    spec = LayerSpec(cases, size, kernels, skew, rounds, ranks, seed, timeout)
    where: Literal["cpu", "cuda"] = "cuda" if on_gpus else "cpu"
    show_outcome(compare_layer(spec, where), _COLUMNS, json_path)


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()
