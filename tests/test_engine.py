"""The engine: whatever moves between ranks, tokens are those of the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.engine import attention
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepResult
from equipoise.engine.requests import Delta, Request, SamplingParams
from equipoise.errors import ConfigError, ModelError
from equipoise.job.ledger import merge_steps
from equipoise.models.parallel import ParallelModel, parallelize
from equipoise.placement import place_in_order
from equipoise.topology import Topology
from tests.models.tiny import list_families, make_tiny
from tests.ranks import Rank, processes
from tests.test_models import (
    EXPERTS,
    FAMILIES,
    LAYERS,
    TOP_K,
    VOCABULARY,
    make_lone_group,
    make_model,
)

MAX_NEW = 14


def draw_prompts(lengths: list[int]) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(9)
    return [tuple(torch.randint(2, VOCABULARY, (n,), generator=random).tolist()) for n in lengths]


def spread_model(group: RankGroup, family: str, **config: Any) -> ParallelModel:
    settings = {"policy": "deepseek", "communicator": "torch_gloo", "use_async": False} | config
    topology = Topology(group.size, EXPERTS // group.size + 1)
    return parallelize(
        make_model(family),
        group,
        EPLBConfig(window_size=8, **settings),
        placement=place_in_order(LAYERS, EXPERTS, topology),
    )


def make_request(number: int, tokens: tuple[int, ...], **sampling: Any) -> Request:
    return Request(str(number), tokens, SamplingParams(**({"max_new_tokens": MAX_NEW} | sampling)))


def run_until_idle(engine: Engine, group: RankGroup) -> list[StepResult]:
    """In lockstep: everybody steps as long as anybody has work."""
    results = []
    working = torch.tensor([1])
    while working:
        results.append(engine.step())
        working = torch.tensor([int(engine.has_work)])
        group.all_reduce(working, "max")
    return results


def join(results: list[StepResult]) -> dict[str, list[int]]:
    """Tokens by request, of deltas that must be in order and whole."""
    tokens: dict[str, list[int]] = {}
    ended: set[str] = set()
    for delta in (delta for result in results for delta in result.deltas):
        assert delta.request_id not in ended
        assert delta.position == len(tokens.setdefault(delta.request_id, []))
        tokens[delta.request_id] += delta.tokens
        if delta.finish_reason is not None:
            ended.add(delta.request_id)
    assert ended == set(tokens)
    return tokens


def generate(family: str, prompts: list[tuple[int, ...]], end: int | None) -> list[list[int]]:
    """Greedy decoding by transformers itself, one prompt at a time."""
    plain: Any = make_model(family)
    plain.generation_config.eos_token_id = end
    tokens = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        whole = plain.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_NEW, do_sample=False
        )
        tokens.append(whole[0, len(prompt) :].tolist())
    return tokens


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes(timeout_s=290)
def test_tokens_are_those_of_generate_while_experts_move(rank: Rank, num_ranks: int) -> None:
    """Mixed lengths, more prompts than rows, prompts in chunks, uneven ranks, early ends."""
    group = rank.make_group()
    for family in FAMILIES:
        compare_with_generate(family, group)
    group.barrier()


def compare_with_generate(family: str, group: RankGroup) -> None:
    prompts = draw_prompts([5, 1, 17, 9, 30, 2, 8, 3, 21])
    end = generate(family, prompts[:1], None)[0][4]
    requests = [make_request(i, prompts[i]) for i in range(group.rank, len(prompts), group.size)]
    want = generate(family, [request.tokens for request in requests], end)
    assert group.rank != 0 or min(map(len, want)) < MAX_NEW

    parallel = spread_model(group, family, step_interval=5)
    initial = parallel.spread.maps.placement
    limits = EngineLimits(
        3, 30 + MAX_NEW, prefill_chunk=7, end_tokens=frozenset([end]), keep_logits=True
    )
    engine = Engine(parallel, limits)
    engine.submit(*requests)
    results = run_until_idle(engine, group)

    assert [request.generated for request in requests] == want
    assert join(results) == {request.id: request.generated for request in requests}
    for request in requests:
        assert [int(row.argmax()) for row in request.logits] == request.generated
    if group.size > 1:
        assert parallel.spread.maps.placement != initial
    parallel.close()


@processes(2)
def test_a_rank_without_prompts_takes_part(rank: Rank) -> None:
    group = rank.make_group()
    prompts = draw_prompts([4, 6])
    parallel = spread_model(group, "olmoe")
    engine = Engine(parallel, EngineLimits(1, 20, keep_load=True))
    requests = [make_request(i, prompt) for i, prompt in enumerate(prompts)]
    if rank.rank == 1:
        engine.submit(*requests)
    results = run_until_idle(engine, group)
    if rank.rank == 1:
        assert [r.generated for r in requests] == generate("olmoe", prompts, 1)
    else:
        assert not any(result.deltas or result.figures.num_tokens for result in results)
        assert not any(result.figures.loads[0].slot_count.any() for result in results)
    group.barrier()


@processes(2)
def test_merged_figures_count_every_token_once(rank: Rank) -> None:
    """Prompts of 5 and 7 tokens on rank 0, kind 0; one of 3 on rank 1, kind 1; 4 new tokens."""
    group = rank.make_group()
    parallel = spread_model(group, "qwen3_moe")
    engine = Engine(parallel, EngineLimits(2, 20, keep_load=True))
    for number, tokens in enumerate(draw_prompts([5, 7] if rank.rank == 0 else [3])):
        request = make_request(number, tokens, max_new_tokens=4, ignore_end=True)
        request.kind = rank.rank
        engine.submit(request)
    figures = [engine.step().figures for _ in range(6)]
    assert not engine.has_work
    records, anybody_works = merge_steps(
        group,
        figures,
        first_step=11,
        in_pass="off",
        kinds=("prose", "code"),
        has_work=rank.rank == 1,
    )
    assert anybody_works
    if rank.rank == 1:
        assert records == []
        return
    assert [record.step for record in records] == [11, 12, 13, 14]
    assert [record.num_tokens for record in records] == [15, 3, 3, 3]
    assert [record.num_new_tokens for record in records] == [3, 3, 3, 3]
    assert [record.kind for record in records] == [None] * 4
    for record in records:
        expected = [record.num_tokens * TOP_K] * LAYERS
        assert record.slot_count.sum(axis=1).tolist() == expected
        assert record.logical_count.sum(axis=1).tolist() == expected
        for layer, row in enumerate(parallel.spread.maps.placement.slot_to_expert):
            for expert in range(EXPERTS):
                held = record.slot_count[layer][row == expert].sum()
                assert record.logical_count[layer, expert] == held
        assert record.expert_cpu_s.shape == (2,)
        assert record.step_s > 0


def test_a_kind_is_named_while_it_runs_alone() -> None:
    group = make_lone_group()
    engine = Engine(spread_model(group, "mixtral"), EngineLimits(1, 12, keep_load=True))
    for kind, tokens in enumerate(draw_prompts([3, 4])):
        request = make_request(kind, tokens, max_new_tokens=2, ignore_end=True)
        request.kind = kind
        engine.submit(request)
    figures = [engine.step().figures for _ in range(5)]
    records, anybody_works = merge_steps(
        group, figures, first_step=1, in_pass="on", kinds=("prose", "code"), has_work=False
    )
    assert [record.kind for record in records] == ["prose", "prose", "code", "code"]
    assert not anybody_works


def test_all_slots_of_an_expert_get_their_share() -> None:
    """One token per step, as in decoding: replicas still take turns."""
    group = make_lone_group()
    placement = place_in_order(LAYERS, EXPERTS, Topology(1, 2 * EXPERTS))
    config = EPLBConfig(communicator="torch_gloo", use_async=False)
    parallel = parallelize(make_model("qwen3_moe"), group, config, placement=placement)
    engine = Engine(parallel, EngineLimits(1, 64, keep_load=True), balance=False)
    engine.submit(make_request(0, draw_prompts([4])[0], max_new_tokens=60, ignore_end=True))
    results = run_until_idle(engine, group)
    counts = sum(result.figures.loads[0].slot_count.numpy() for result in results[1:])
    first, second = np.split(counts, 2, axis=1)
    assert abs(first.sum() - second.sum()) <= 0.1 * counts.sum()


def make_windowed(window: int | None, kind: str = "sdpa") -> Any:
    """Mixtral, each of whose tokens looks at so many."""
    model: Any = make_model("mixtral")
    model.set_attn_implementation(kind)
    model.config.sliding_window = window
    for layer in model.model.layers:
        layer.self_attn.sliding_window = window
    return model


def generate_uncached(model: Any, prompts: list[tuple[int, ...]]) -> list[list[int]]:
    """Greedy decoding of whole texts, one at a time."""
    texts = [list(prompt) for prompt in prompts]
    for tokens in texts * MAX_NEW:
        logits = model(torch.tensor([tokens]), use_cache=False).logits
        tokens.append(int(logits[0, -1].argmax()))
    return [tokens[-MAX_NEW:] for tokens in texts]


@pytest.mark.parametrize("window", [3, 16])
def test_a_window_is_kept(window: int) -> None:
    """Shorter than a chunk, and than a request."""
    model = make_windowed(window)
    prompts = draw_prompts([30, 6])
    want = generate_uncached(model, prompts)
    plainly = generate("mixtral", prompts, None)
    assert want != plainly

    group = make_lone_group()
    config = EPLBConfig(communicator="torch_gloo", use_async=False)
    engine = Engine(parallelize(model, group, config), EngineLimits(2, 44, prefill_chunk=8))
    requests = [make_request(i, prompt, ignore_end=True) for i, prompt in enumerate(prompts)]
    engine.submit(*requests)
    run_until_idle(engine, group)
    assert [request.generated for request in requests] == want


@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("kind", ["sdpa", "eager"])
def test_prompts_of_one_length_are_attended_at_once(
    kind: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beside others, a prompt in parts, and decoding sequences; 5 tokens in a row are not alike."""
    model = make_windowed(window, kind)
    prompts = draw_prompts([6, 6, 6, 9, 4, 4, 10, 5, 5])
    want = generate_uncached(model, prompts)
    parallel = parallelize(model, make_lone_group(), EPLBConfig(use_async=False))
    engine = Engine(parallel, EngineLimits(9, 30, prefill_chunk=40, end_tokens=frozenset()))
    asked = count_attention(monkeypatch)
    requests = [make_request(i, prompt) for i, prompt in enumerate(prompts)]
    engine.submit(*requests[:7])
    engine.step()
    assert asked == [(3, 6, 6), (1, 9, 9), (2, 4, 4), (1, 5, 5)] * LAYERS
    asked.clear()
    engine.submit(*requests[7:])
    engine.step()
    assert asked == [(6, 1, 10), (1, 5, 10), (2, 5, 5)] * LAYERS
    while engine.has_work:
        engine.step()
    assert [request.generated for request in requests] == want


def count_attention(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Sequences, tokens and keys of each call of the family's own attention from now on."""
    asked = []

    def find_counted(name: str, module: Any) -> Any:
        inner = find_inner(name, module)

        def attend(module: Any, query: Tensor, key: Tensor, *given: Any, **named: Any) -> Any:
            asked.append((query.shape[0], query.shape[2], key.shape[2]))
            return inner(module, query, key, *given, **named)

        return attend

    find_inner = attention._find_inner
    monkeypatch.setattr(attention, "_find_inner", find_counted)
    return asked


def test_ends_are_told_for_what_they_are() -> None:
    group = make_lone_group()
    parallel = spread_model(group, "olmoe")
    prompts = draw_prompts([6] * 9)
    all_tokens = generate("olmoe", prompts, None)
    prompt, tokens = max(zip(prompts, all_tokens, strict=True), key=lambda it: len(set(it[1])))
    first, end = next((i, token) for i, token in enumerate(tokens) if token != tokens[0])
    engine = Engine(parallel, EngineLimits(4, 40, end_tokens=frozenset([end])))
    engine.submit(
        make_request(0, prompt),
        make_request(1, prompt, ignore_end=True),
        make_request(2, prompt, max_new_tokens=1),
        make_request(3, prompt, ignore_end=True),
    )
    results = [engine.step()]
    engine.cancel("3")
    engine.cancel("nobody")
    results += run_until_idle(engine, group)
    ends = {d.request_id: d for r in results for d in r.deltas if d.finish_reason is not None}
    assert ends["0"] == Delta("0", first, (end,), "stop")
    assert ends["1"].finish_reason == "length"
    assert ends["2"] == Delta("2", 0, (tokens[0],), "length")
    assert ends["3"] == Delta("3", 1, (), "cancelled")
    assert join(results)["1"] == tokens


def test_requests_that_cannot_be_served_are_refused() -> None:
    engine = Engine(spread_model(make_lone_group(), "olmoe"), EngineLimits(2, 20))
    engine.submit(make_request(0, (5, 6), max_new_tokens=3))
    half = make_request(3, (5,), max_new_tokens=2)
    half.generated = [7, 8]
    for request, message in (
        (make_request(0, (5,)), "request '0' has not ended yet: take another id"),
        (make_request(1, ()), "request '1' is empty: it needs at least one token"),
        (make_request(2, (5,) * 7), "'2' has 7 tokens and asks for 14 more, the engine takes 20"),
        (half, "request '3' has all of its tokens already"),
        (make_request(4, (5,), stop=("x",)), "'4' has stop strings, and the engine no tokenizer"),
    ):
        with pytest.raises(ConfigError, match=message):
            engine.submit(make_request(9, (5,)), request)
    assert engine.num_requests == 1
    for name in ("max_batch_size", "max_len", "prefill_chunk"):
        values = {"max_batch_size": 1, "max_len": 1, "prefill_chunk": 1} | {name: 0}
        with pytest.raises(ConfigError, match=f"{name} must be at least 1, got 0"):
            EngineLimits(**values)


def test_memory_is_known_before_it_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    """Keys and values of 2 heads of 8 numbers of 4 bytes, in each layer."""
    parallel = spread_model(make_lone_group(), "qwen3_moe")
    with caplog.at_level("INFO", "equipoise.engine.cache"):
        engine = Engine(parallel, EngineLimits(3, 50))
    assert engine.memory.token_bytes == 2 * 2 * 8 * 4 * LAYERS
    assert engine.memory.num_bytes == 3 * 50 * engine.memory.token_bytes
    assert "keys and values of 3 sequences of 50 tokens take 0.00 GiB" in caplog.text
    with pytest.raises(ConfigError, match=r"take [0-9.]+ GiB, and cpu has [0-9.]+ GiB free: ask"):
        Engine(parallel, EngineLimits(1 << 20, 1 << 20))


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("qwen3_next", "0 of its 3 layers attend by transformers' AttentionInterface"),
        ("phimoe", "attends to 8 tokens only, and does not tell its attention"),
        ("zaya", "a text in parts is off by 0.1. of the text as a whole"),
    ],
)
def test_models_that_it_would_serve_wrongly_are_refused(folder: str, message: str) -> None:
    family = next((one for one in list_families() if one.folder == folder), None)
    if family is None:
        pytest.skip(f"this transformers has no {folder}")
    config = EPLBConfig(communicator="torch_gloo", use_async=False)
    parallel = parallelize(make_tiny(family), make_lone_group(), config)
    with pytest.raises(ModelError, match=f"cannot be served: .*{message}"):
        Engine(parallel, EngineLimits(2, 40))
    parallel.model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ModelError, match="attends by 'flash_attention_2', which cannot be asked"):
        Engine(parallel, EngineLimits(2, 40))
