"""The engine on GPUs: tokens are the plain model's, whatever moves; in bf16 within what rounding does."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from equipoise.bundled import model_directory
from equipoise.bundled.texts import KINDS, excerpts
from equipoise.config import EPLBConfig
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.requests import Request, SamplingParams
from equipoise.models.loading import load_model, load_tokenizer
from equipoise.models.parallel import parallelize
from tests.ranks import Rank, processes

MAX_NEW = 24
BF16_TOLERANCE = 0.25
"""Of logits, whose standard deviation is about 4: rows come in other batches, and round elsewhere."""


def serve(rank: Rank, dtype: torch.dtype, device_group: Literal["gloo", "nccl"]) -> None:
    group = rank.make_group(device="cuda", device_group=device_group)
    config = EPLBConfig(window_size=4, step_interval=4, policy="deepseek")
    parallel = parallelize(model_directory(), group, config, dtype=dtype, attention="sdpa")
    initial = parallel.spread.maps.placement
    limits = EngineLimits(6, 256 + MAX_NEW, prefill_chunk=100, keep_logits=True)
    engine = Engine(parallel, limits)
    tokenizer = load_tokenizer(model_directory())
    texts = [text for kind in KINDS for text in excerpts(kind, 12, 200)]
    requests = [
        Request(
            str(number),
            tuple(tokenizer(text[: 20 + 9 * number % 180])["input_ids"]),
            SamplingParams(max_new_tokens=MAX_NEW - number % 7),
        )
        for number, text in enumerate(texts)
        if number % group.size == group.rank
    ]
    waiting = list(requests)
    working = torch.tensor([1])
    while working:
        # They come and go: two more at each step.
        engine.submit(*waiting[:2])
        del waiting[:2]
        engine.step()
        working = torch.tensor([int(engine.has_work or bool(waiting))])
        group.all_reduce(working, "max")
    if group.size > 1:
        assert parallel.spread.maps.placement != initial
    plain: Any = load_model(model_directory(), dtype, group.device)
    for request in requests:
        compare(plain, request, dtype)
    parallel.close()
    group.close()


def compare(plain: Any, request: Request, dtype: torch.dtype) -> None:
    tokens = torch.tensor([[*request.tokens, *request.generated[:-1]]], device=plain.device)
    with torch.inference_mode():
        output = plain(tokens, use_cache=False, logits_to_keep=len(request.generated))
    want, got = output.logits[0].float().cpu(), torch.stack(request.logits)
    top = want.topk(2)
    gap = top.values[:, 0] - top.values[:, 1]
    tolerance = 2e-3 if dtype == torch.float32 else BF16_TOLERANCE
    assert (got - want).abs().max() <= tolerance
    differs = top.indices[:, 0] != torch.tensor(request.generated)
    assert not (differs & (gap > (0.0 if dtype == torch.float32 else 2 * tolerance))).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_ranks", [1, 4])
@processes(timeout_s=58)
def test_ranks_share_gpus_over_gloo(rank: Rank, num_ranks: int, dtype: torch.dtype) -> None:
    serve(rank, dtype, "gloo")


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@processes(2, timeout_s=58)
def test_a_gpu_each_over_nccl(rank: Rank, dtype: torch.dtype) -> None:
    serve(rank, dtype, "nccl")
