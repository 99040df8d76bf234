"""Families on GPUs: logits of the plain model on the same GPU, and checkpoints straight to it."""

from __future__ import annotations

import copy
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.export import write_checkpoint
from equipoise.models.loading import load_spread
from equipoise.models.parallel import _plan_sets
from equipoise.models.read_ahead import ReadAhead, Span
from equipoise.transfer import rearrange_expert_weights_inplace
from tests.models.fp8 import write_fp8
from tests.models.saved import find_family
from tests.models.test_export import read_bytes
from tests.models.test_generate import look, make_request
from tests.models.tiny import VOCABULARY, make_tiny, run
from tests.placements import make_random_placement
from tests.ranks import Rank, processes

FAMILIES = (
    "DeepseekV3Experts",  # shared experts, dense layers, experts in groups
    "Glm4MoeExperts",
    "GptOssExperts",  # biases, interleaved, transposed
    "MiniMaxM2Experts",
    "MixtralExperts",
    "OlmoeExperts",
    "Qwen3MoeExperts",
)
CHECKPOINTS = ("DeepseekV3Experts", "GptOssExperts", "MixtralExperts")
GENERATING = ("Qwen3MoeExperts", "GptOssExperts")
WAYS = (
    (torch.float32, "batched_mm", "eager"),
    (torch.float32, "batched_mm", "sdpa"),
    (torch.bfloat16, "grouped_mm", "eager"),
)
REBALANCES = 3


def configure(communicator: str) -> EPLBConfig:
    return EPLBConfig(
        window_size=1,
        step_interval=1,
        num_redundant_experts=2,
        policy="deepseek",
        communicator=communicator,
        use_async=False,
    )


def draw_tokens(step: int, rank: int, device: torch.device) -> torch.Tensor:
    random = torch.Generator().manual_seed(step)
    # Few kinds of token, others at each step, so that experts are loaded unevenly.
    first = VOCABULARY // 5 * (step % 4) + 3
    tokens = torch.randint(first, first + 12, (2, 40 + 8 * rank), generator=random)
    return tokens.to(device)


@pytest.mark.multi_gpu
@pytest.mark.parametrize("communicator", ["nixl", "torch_nccl"])
@processes(2, timeout_s=58)
def test_families_have_the_plain_models_logits(rank: Rank, communicator: str) -> None:
    if communicator == "nixl":
        pytest.importorskip("nixl_cu13")
    group = rank.make_group(device="cuda", device_group="nccl")
    dtypes = (torch.bfloat16, torch.float32, torch.float16)
    for experts, dtype in itertools.product(FAMILIES, dtypes):
        exact = make_tiny(find_family(experts)).to(group.device)
        plain = copy.deepcopy(exact).to(dtype)
        parallel = parallelize(copy.deepcopy(plain), group, configure(communicator))
        moves = 0
        for step in range(REBALANCES + 1):
            tokens = draw_tokens(step, group.rank, group.device)
            for kernels in ("grouped_mm", "batched_mm"):
                compare_logits(parallel, plain, exact, tokens, kernels, experts)
            moves += sum(outcome.moves for outcome in parallel.step())
        assert moves > 0, experts
        parallel.close()
    group.close()


def compare_logits(
    parallel: ParallelModel,
    plain: Any,
    exact: Any,
    tokens: torch.Tensor,
    kernels: str,
    experts: str,
) -> None:
    """In fp32 alike; in half precision as near to the exact ones as the plain model is."""
    plain.set_experts_implementation(kernels)
    parallel.model.set_experts_implementation(kernels)
    with parallel.route():
        got = run(parallel.model, tokens).float()
    want = run(plain, tokens).float()
    assert want.isfinite().all()
    assert want.std() > 0.01
    if plain.dtype == torch.float32:
        print(f"{experts} {kernels} {plain.dtype}: {(got - want).abs().max():.2e}", flush=True)
        assert (got - want).abs().max() <= 2e-5 * max(1.0, float(want.abs().max())), experts
        return
    truth = run(exact, tokens)
    # Where rounding moves a token to another expert its logits change, in the plain model too: so
    # most tokens are looked at, and none may be off by more than the worst of the plain model.
    ours, own = (got - truth).abs().amax(-1), (want - truth).abs().amax(-1)
    said = f"{ours.median():.2e}, the plain model's own {own.median():.2e}"
    print(f"{experts} {kernels} {plain.dtype}: {said}", flush=True)
    assert ours.median() <= 1.5 * own.median(), experts
    assert ours.max() <= 2 * own.max() + 1e-3, experts


@pytest.mark.multi_gpu
@pytest.mark.parametrize("communicator", ["nixl", "torch_nccl"])
@processes(2, timeout_s=58)
def test_every_rank_generates_its_own_batch(rank: Rank, communicator: str) -> None:
    """Rank 0 wants fewer tokens than rank 1 and keeps step; then it wants none."""
    if communicator == "nixl":
        pytest.importorskip("nixl_cu13")
    group = rank.make_group(device="cuda", device_group="nccl")
    request = {
        name: given.to(group.device) if isinstance(given, torch.Tensor) else given
        for name, given in make_request(group.rank).items()
    }
    most = make_request(1)["max_new_tokens"]
    assert request["max_new_tokens"] < most or group.rank == 1
    for experts, (dtype, kernels, attention) in itertools.product(GENERATING, WAYS):
        source = rank.path / f"{experts}-{dtype}-{attention}"
        plain: Any = make_tiny(find_family(experts)).to(dtype)
        if attention == "sdpa" and not plain._supports_sdpa:
            continue
        if group.rank == 0:
            plain.save_pretrained(source)
        group.barrier()
        plain.to(group.device)
        plain.set_attn_implementation(attention)
        plain.set_experts_implementation(kernels)
        parallel = parallelize(source, group, configure(communicator), attention=attention)
        parallel.model.set_experts_implementation(kernels)
        check_tokens(plain, request, parallel.generate(**request))
        assert parallel.state.stats().steps == most
        tokens = parallel.generate(**request) if group.rank == 1 else parallel.generate()
        assert (tokens is None) == (group.rank == 0)
        if tokens is not None:
            check_tokens(plain, request, tokens)
        stats = parallel.state.stats()
        assert stats.steps == 2 * most
        assert stats.models["model"].moves > 0
        # In bf16 a router that is rounded elsewhere sends a token elsewhere.
        if dtype == torch.float32:
            with parallel.lockstep() as model:
                check_told(look(model), look(plain))
        parallel.close()
        print(f"{experts} {dtype} {kernels} {attention}: {2 * most} calls", flush=True)
    group.close()


@pytest.mark.multi_gpu
@processes(2, timeout_s=110)
def test_what_is_compiled_over_static_caches_leaves_experts_out(rank: Rank) -> None:
    """transformers compiles on a GPU what generates over a cache of fixed size."""
    from torch._dynamo.utils import counters

    # A rank that compiles longer is waited for.
    group = rank.make_group(device="cuda", device_group="nccl", timeout_s=60)
    plain: Any = make_tiny(find_family("Qwen3MoeExperts")).to(group.device)
    plain.set_experts_implementation("batched_mm")
    parallel = parallelize(copy.deepcopy(plain), group, configure("torch_nccl"))
    parallel.model.set_experts_implementation("batched_mm")
    request = make_request(group.rank)
    given = {name: request[name].to(group.device) for name in ("input_ids", "attention_mask")}
    wanted = plain.generate(**(request | given))
    for _ in range(2):
        tokens = parallel.generate(**(request | given), cache_implementation="static")
        assert torch.equal(tokens, wanted)
    assert counters["stats"]["unique_graphs"] > 0
    print(dict(counters["stats"]), dict(counters["graph_break"]), flush=True)
    parallel.close()
    group.close()


def check_told(got: tuple[Any, list[torch.Tensor]], want: tuple[Any, list[torch.Tensor]]) -> None:
    """Router logits and hidden states of each layer, and what hooks on one of them saw."""
    (told, seen), (wanted, wanted_seen) = got, want
    assert len(told.router_logits) == len(wanted.router_logits) > 0
    assert len(seen) == len(wanted_seen) == 2
    for several, others in (
        (told.router_logits, wanted.router_logits),
        (told.hidden_states, wanted.hidden_states),
        (seen, wanted_seen),
    ):
        for one, other in zip(several, others, strict=True):
            assert (one - other).norm() <= 2e-5 * other.norm()


def check_tokens(plain: Any, request: dict[str, Any], tokens: torch.Tensor) -> None:
    """In fp32 the plain model's; in bf16 those that it holds for the best, or nearly."""
    if plain.dtype == torch.float32:
        assert torch.equal(tokens, plain.generate(**request))
        return
    prompt = request["input_ids"]
    mask = torch.cat((request["attention_mask"], torch.ones_like(tokens[:, prompt.shape[1] :])), 1)
    places = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.inference_mode():
        logits = plain(input_ids=tokens, attention_mask=mask, position_ids=places).logits.float()
    logits = logits[:, prompt.shape[1] - 1 : -1]
    chosen = logits.gather(2, tokens[:, prompt.shape[1] :, None])[..., 0]
    short = logits.amax(2) - chosen
    assert tokens.shape[1] == prompt.shape[1] + request["max_new_tokens"]
    assert short.max() <= 0.3 * logits.std()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@processes(2, timeout_s=58)
def test_checkpoints_go_straight_to_their_gpu_and_back(rank: Rank, dtype: torch.dtype) -> None:
    group = rank.make_group(device="cuda", device_group="nccl")
    for experts in CHECKPOINTS:
        source, target = rank.path / experts, rank.path / f"{experts}-again"
        if group.rank == 0:
            make_tiny(find_family(experts)).to(dtype).save_pretrained(
                source, max_shard_size="100KB"
            )
        group.barrier()
        plain = make_tiny(find_family(experts)).to(dtype)
        parallel = parallelize(source, group, configure("torch_gloo"))
        assert parallel.model.dtype == dtype
        assert parallel.checkpoint is not None
        check_weights(parallel, plain, group)
        shared, read = parallel.checkpoint.shared_bytes, parallel.checkpoint.bytes_read
        assert shared < read < sum(t.num_bytes for t in parallel.checkpoint.stored.values())
        for step in range(REBALANCES):
            with parallel.route() as model:
                run(model, draw_tokens(step, group.rank, group.device))
            parallel.step()
        check_weights(parallel, plain, group)
        parallel.to_checkpoint(target)
        assert read_bytes(target) == read_bytes(source)
        parallel.close()
    group.close()


@pytest.mark.multi_gpu
@pytest.mark.parametrize("communicator", ["nixl", "torch_nccl"])
@processes(2, timeout_s=58)
def test_fp8_experts_move_with_their_scales(rank: Rank, communicator: str) -> None:
    """They stay FP8 in memory, and bytes are looked at: kernels for them are of a hub."""
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate")
    group = rank.make_group(device="cuda", device_group="nccl")
    source, target = make_fp8(rank, group), rank.path / "again"
    checkpoint = Checkpoint(source, device=group.device)
    assert checkpoint.is_quantised
    plans = _plan_sets([checkpoint.layers], group, configure(communicator), 1, None)
    spread = load_spread(checkpoint, plans, group)
    (one,) = spread.sets
    assert {slots.dtype for slots in one.weights[0]} == {torch.float8_e4m3fn, torch.float32}
    standing, moves = one.maps.placement, 0
    wires = create_eplb_communicator(group, communicator, one.weights)
    for seed in range(5):
        wanted = make_random_placement(
            np.random.default_rng(seed), len(one.layers), 8, standing.topology
        )
        moves += int((wanted.slot_to_expert != standing.slot_to_expert).sum())
        rearrange_expert_weights_inplace(standing, wanted, one.weights, wires, group)
        standing = wanted
        one.maps.commit(standing)
    write_checkpoint(spread, group, target, checkpoint)
    assert moves > 0
    assert read_bytes(target) == read_bytes(source)
    wires.close()
    group.close()


@pytest.mark.multi_gpu
@processes(2, timeout_s=58)
def test_fp8_is_computed_with_dequantised(rank: Rank) -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate")
    from transformers import AutoModelForCausalLM, FineGrainedFP8Config

    group = rank.make_group(device="cuda", device_group="nccl")
    source = make_fp8(rank, group)
    exact: Any = AutoModelForCausalLM.from_pretrained(
        source,
        dtype=torch.float32,
        quantization_config=FineGrainedFP8Config(dequantize=True),
        device_map={"": group.device},
    )
    plain = copy.deepcopy(exact).to(torch.bfloat16)
    parallel = parallelize(source, group, configure("nixl"), dequantize=True)
    assert parallel.model.dtype == torch.bfloat16
    for step in range(REBALANCES):
        tokens = draw_tokens(step, group.rank, group.device)
        for kernels in ("grouped_mm", "batched_mm"):
            exact.set_experts_implementation(kernels)
            compare_logits(parallel, plain, exact, tokens, kernels, "fp8")
        parallel.step()
    parallel.close()
    group.close()


def make_fp8(rank: Rank, group: RankGroup) -> Path:
    """A small checkpoint in FP8."""
    source = rank.path / "fp8"
    if group.rank == 0:
        make_tiny(find_family("Qwen3MoeExperts")).save_pretrained(rank.path / "plain")
        write_fp8(rank.path / "plain", source)
    group.barrier()
    return source


def check_weights(parallel: ParallelModel, plain: Any, group: RankGroup) -> None:
    whole = plain.state_dict()
    (one,) = parallel.spread.sets
    num_slots = one.maps.placement.topology.slots_per_rank
    mine = one.maps.placement.slot_to_expert[:, group.rank * num_slots :][:, :num_slots]
    per_expert = set()
    for layer, weights, held in zip(one.layers, one.weights, mine, strict=True):
        for name, slots in zip(layer.full_names(), weights, strict=True):
            per_expert.add(name)
            assert slots.device == group.device
            for slot, expert in enumerate(held):
                if expert >= 0:
                    assert torch.equal(slots[slot].cpu(), whole[name][expert]), name
    for name, tensor in parallel.model.state_dict().items():
        if name not in per_expert:
            assert tensor.device == group.device
            # Some stay in fp32 whatever the rest is in.
            assert torch.equal(tensor.cpu().to(whole[name].dtype), whole[name]), name


@pytest.mark.gpu
def test_what_is_read_ahead_is_whole_while_the_gpu_works(tmp_path: Path) -> None:
    """Memory that work on the GPU still reads or writes is given out again at once."""
    device = torch.device("cuda", 0)
    data = torch.randint(256, (40_000_000,), dtype=torch.uint8)
    (tmp_path / "bytes").write_bytes(data.numpy().tobytes())
    random = torch.Generator().manual_seed(0)
    ends = torch.randint(40_000_000, (60, 2), generator=random).sort(1).values.tolist()
    ahead = ReadAhead(device, num_threads=4, chunk_bytes=1 << 20, ahead_bytes=64 << 20)
    matrix = torch.randn(2048, 2048, device=device)
    wrong = torch.zeros(1, dtype=torch.int64, device=device)
    whole = data.to(device)
    spans = (Span(tmp_path / "bytes", begin, end - begin) for begin, end in ends)
    for tensor, (begin, end) in zip(ahead.read(spans), ends, strict=True):
        for _ in range(20):
            matrix = (matrix @ matrix).clamp(-1, 1)
        wrong += (tensor != whole[begin:end]).sum()
        # Written after it was compared, before it goes back.
        tensor.fill_(7)
    assert wrong.item() == 0
    ahead.close()
