"""The engine: whatever moves between ranks, tokens are those of the plain model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from equipoise.balancer import EplbState
from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.engine.engine import Engine, EngineLimits, Request
from equipoise.engine.figures import StepFigures
from equipoise.errors import ModelError
from equipoise.job.ledger import merge_steps
from equipoise.load.recorder import LoadRecorder
from equipoise.models.experts import ExpertParallelModel, make_expert_parallel
from equipoise.placement import place_in_order
from equipoise.policy import get_policy
from equipoise.topology import Topology
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

CPU = torch.device("cpu")
MAX_NEW = 14


def draw_prompts(lengths: list[int]) -> list[tuple[int, ...]]:
    random = torch.Generator().manual_seed(9)
    return [tuple(torch.randint(2, VOCABULARY, (n,), generator=random).tolist()) for n in lengths]


def spread_model(group: RankGroup, family: str) -> ExpertParallelModel:
    topology = Topology(group.size, EXPERTS // group.size + 1)
    placement = place_in_order(LAYERS, EXPERTS, topology)
    return make_expert_parallel(
        make_model(family),
        PlacementMaps(placement, CPU),
        group.rank,
        create_dispatcher("torch", group, topology),
        LoadRecorder(LAYERS, topology.num_slots, CPU),
    )


def balance(spread: ExpertParallelModel, group: RankGroup, step_interval: int) -> EplbState:
    config = EPLBConfig(
        window_size=8, step_interval=step_interval, communicator="torch_gloo", use_async=False
    )
    state = EplbState(config, group, get_policy("deepseek"))
    communicator = create_eplb_communicator(group, "torch_gloo", spread.expert_weights)
    state.add_model("tiny", spread.expert_weights, spread.maps, spread.recorder, communicator)
    return state


def run_until_idle(engine: Engine, group: RankGroup) -> list[StepFigures]:
    """In lockstep: everybody steps as long as anybody has work."""
    figures = []
    working = torch.tensor([1])
    while working:
        figures.append(engine.step()[0])
        working = torch.tensor([int(engine.has_work)])
        group.all_reduce(working, "max")
    return figures


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


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_tokens_are_those_of_generate_while_experts_move(rank: Rank, num_ranks: int) -> None:
    """Mixed lengths, more prompts than rows, uneven ranks, texts that end early."""
    group = rank.make_group()
    for family in FAMILIES:
        compare_with_generate(family, group)
    group.barrier()


def compare_with_generate(family: str, group: RankGroup) -> None:
    prompts = draw_prompts([5, 1, 17, 9, 30, 2, 8, 3, 21])
    end = generate(family, prompts[:1], None)[0][4]
    requests = [Request(i, 0, prompts[i]) for i in range(group.rank, len(prompts), group.size)]
    want = generate(family, [request.tokens for request in requests], end)
    assert group.rank != 0 or min(map(len, want)) < MAX_NEW

    spread = spread_model(group, family)
    initial = spread.maps.placement
    limits = EngineLimits(2, MAX_NEW, 30 + MAX_NEW, frozenset([end]), keep_logits=True)
    engine = Engine(spread, group.rank, limits, balance(spread, group, step_interval=5))
    engine.submit(requests)
    run_until_idle(engine, group)

    assert [request.generated for request in requests] == want
    for request in requests:
        assert [int(row.argmax()) for row in request.logits] == request.generated
    if group.size > 1:
        assert spread.maps.placement != initial


@processes(2)
def test_a_rank_without_prompts_takes_part(rank: Rank) -> None:
    group = rank.make_group()
    prompts = draw_prompts([4, 6])
    spread = spread_model(group, "olmoe")
    engine = Engine(spread, rank.rank, EngineLimits(1, MAX_NEW, 20))
    requests = [Request(i, 0, prompt) for i, prompt in enumerate(prompts)]
    engine.submit(requests if rank.rank == 1 else [])
    figures = run_until_idle(engine, group)
    if rank.rank == 1:
        assert [r.generated for r in requests] == generate("olmoe", prompts, None)
    else:
        assert not any(step.num_tokens or step.slot_count.any() for step in figures)
    group.barrier()


@processes(2)
def test_merged_figures_count_every_token_once(rank: Rank) -> None:
    """Prompts of 5 and 7 tokens on rank 0, kind 0; one of 3 on rank 1, kind 1; 4 new tokens."""
    group = rank.make_group()
    spread = spread_model(group, "qwen3_moe")
    engine = Engine(spread, rank.rank, EngineLimits(2, 4, 20))
    lengths = [5, 7] if rank.rank == 0 else [3]
    engine.submit(Request(i, rank.rank, p) for i, p in enumerate(draw_prompts(lengths)))
    figures = [engine.step()[0] for _ in range(6)]
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
        for layer, row in enumerate(spread.maps.placement.slot_to_expert):
            for expert in range(EXPERTS):
                held = record.slot_count[layer][row == expert].sum()
                assert record.logical_count[layer, expert] == held
        assert record.expert_cpu_s.shape == (2,)
        assert record.step_s > 0


def test_a_kind_is_named_while_it_runs_alone() -> None:
    group = make_lone_group()
    spread = spread_model(group, "mixtral")
    engine = Engine(spread, 0, EngineLimits(1, 2, 12))
    engine.submit(Request(i, i, prompt) for i, prompt in enumerate(draw_prompts([3, 4])))
    figures = [engine.step()[0] for _ in range(5)]
    records, anybody_works = merge_steps(
        group, figures, first_step=1, in_pass="on", kinds=("prose", "code"), has_work=False
    )
    assert [record.kind for record in records] == ["prose", "prose", "code", "code"]
    assert not anybody_works


def test_all_slots_of_an_expert_get_their_share() -> None:
    """One token per step, as in decoding: replicas still take turns."""
    group = make_lone_group()
    topology = Topology(1, 2 * EXPERTS)
    spread = make_expert_parallel(
        make_model("qwen3_moe"),
        PlacementMaps(place_in_order(LAYERS, EXPERTS, topology), CPU),
        0,
        create_dispatcher("torch", group, topology),
        LoadRecorder(LAYERS, topology.num_slots, CPU),
    )
    engine = Engine(spread, 0, EngineLimits(1, 60, 64))
    engine.submit([Request(0, 0, draw_prompts([4])[0])])
    figures = run_until_idle(engine, group)
    counts = np.array([step.slot_count.numpy() for step in figures[1:]]).sum(axis=0)
    first, second = counts[:, :EXPERTS].sum(), counts[:, EXPERTS:].sum()
    assert abs(first - second) <= 0.1 * (first + second)


def test_a_window_shorter_than_a_request_is_refused() -> None:
    spread = spread_model(make_lone_group(), "mixtral")
    spread.model.config.sliding_window = 16
    with pytest.raises(ModelError, match="last 16 tokens only, and a request may have 20: windows"):
        Engine(spread, 0, EngineLimits(1, 4, 20))
