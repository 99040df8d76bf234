"""One call, and a loaded model serves on several ranks with the logits of the plain one."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from equipoise import EPLBConfig, NearestReplicas, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from equipoise.errors import ConfigError, ModelError, PlacementError, TransferError
from equipoise.placement import Placement, measure_balancedness, place_in_order, spread_load
from equipoise.topology import IntArray, Topology
from tests.ranks import Rank, processes
from tests.test_models import EXPERTS, FAMILIES, LAYERS, TOP_K, VOCABULARY, make_model, shuffle

CONFIG = EPLBConfig(window_size=2, step_interval=2, policy="deepseek", use_async=False)


def run(parallel: ParallelModel, tokens: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode(), parallel.route() as model:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_logits_stay_those_of_the_plain_model(rank: Rank, num_ranks: int) -> None:
    group = rank.make_group()
    for family in FAMILIES:
        serve(group, family)
    group.barrier()


def serve(group: RankGroup, family: str) -> None:
    told: list[tuple[int, IntArray]] = []
    parallel = parallelize(
        make_model(family), group, CONFIG, on_commit=lambda *words: told.append(words)
    )
    # auto leaves one spare slot per rank.
    assert parallel.spread.maps.placement.num_slots == EXPERTS + group.size
    plain = make_model(family)
    random = torch.Generator().manual_seed(group.rank)
    # Few kinds of token, so that few experts get most of them.
    tokens = torch.randint(VOCABULARY // 20, (2, 40), generator=random)
    with torch.inference_mode():
        wanted = plain(input_ids=tokens, use_cache=False).logits
    for step in range(1, 6):
        got = run(parallel, tokens)
        assert (got - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max().item())
        assert parallel.spread.recorder.counts.sum(1).tolist() == [80 * TOP_K] * LAYERS
        outcomes = parallel.step()
        assert len(outcomes) == (step % 2 == 0)
    stats = parallel.state.stats().models["model"]
    assert stats.rebalances == 2
    if group.size > 1:
        assert stats.moves > 0
        assert told
        assert stats.balancedness_after is not None
        first = measure_start(parallel)
        assert stats.balancedness_after > first
    parallel.close()


def measure_start(parallel: ParallelModel) -> float:
    """Balancedness of experts in order, on the load of the last window."""
    load = parallel.state._models["model"].window.sum()
    parallel.state.group.all_reduce(load)
    placement = place_in_order(LAYERS, EXPERTS, parallel.spread.maps.placement.topology)
    return float(measure_balancedness(spread_load(load.numpy(), placement)).mean())


@processes(2)
def test_the_placement_to_begin_with_may_be_given(rank: Rank) -> None:
    placement = shuffle(Topology(2, 7), seed=3)
    group = rank.make_group()
    parallel = parallelize(make_model("olmoe"), group, placement=placement)
    assert parallel.spread.maps.placement == placement
    assert parallel.state.config == EPLBConfig()
    whole = make_model("olmoe").get_parameter("model.layers.1.mlp.experts.down_proj")
    mine = parallel.spread.expert_weights[1][1]
    for slot, expert in enumerate(placement.slot_to_expert[1, 7 * rank.rank : 7 * rank.rank + 7]):
        if expert >= 0:
            assert torch.equal(mine[slot], whole[expert])
    parallel.close()
    group.barrier()


@processes(2)
def test_padding_and_idle_ranks_add_no_load(rank: Rank) -> None:
    group = rank.make_group()
    parallel = parallelize(make_model("mixtral"), group, CONFIG)
    # Rank 1 is idle: its one token is padding, and it steps as often as rank 0.
    tokens = torch.arange(5)[None] if rank.rank == 0 else torch.zeros(1, 1, dtype=torch.int64)
    valid = torch.tensor([True, True, True, False, False]) if rank.rank == 0 else torch.zeros(1) > 0
    for _ in range(2):
        with torch.inference_mode(), parallel.route(valid) as model:
            model(input_ids=tokens, use_cache=False)
        counted = parallel.spread.recorder.counts.sum(1).tolist()
        assert counted == [(3 if rank.rank == 0 else 0) * TOP_K] * LAYERS
        outcomes = parallel.step()
    assert [outcome.step for outcome in outcomes] == [2]
    parallel.close()
    group.barrier()


@processes(2)
def test_replicas_take_turns_without_being_told_positions(rank: Rank) -> None:
    group = rank.make_group()
    table = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7]] * LAYERS)
    placement = Placement(table, EXPERTS, Topology(2, 8))
    parallel = parallelize(make_model("mixtral"), group, placement=placement)
    counts = torch.zeros(LAYERS, 16, dtype=torch.int64)
    for _ in range(2):
        run(parallel, torch.tensor([[3]]))
        counts += parallel.spread.recorder.counts
        parallel.step()
    # One token per step and rank: its experts' replicas took one each.
    assert counts[:, :8].tolist() == counts[:, 8:].tolist()
    assert counts.sum() == 2 * TOP_K * LAYERS
    parallel.close()
    group.barrier()


@processes(2)
def test_replicas_may_be_the_nearest(rank: Rank) -> None:
    group = rank.make_group()
    table = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 7, 6, 5, 4, 3, 2, 1, 0]] * LAYERS)
    placement = Placement(table, EXPERTS, Topology(2, 8))
    model = make_model("mixtral")
    tokens = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        expected = model(input_ids=tokens, use_cache=False).logits
    parallel = parallelize(model, group, placement=placement, replicas=NearestReplicas)
    torch.testing.assert_close(run(parallel, tokens), expected)
    own = parallel.spread.recorder.counts.view(LAYERS, 2, 8)[:, rank.rank]
    assert own.sum() == parallel.spread.recorder.counts.sum() == tokens.numel() * TOP_K * LAYERS
    parallel.close()
    group.barrier()


@processes(2)
def test_what_cannot_be_is_refused(rank: Rank) -> None:
    group = rank.make_group()
    model = make_model("olmoe")
    with pytest.raises(ModelError, match="no experts that can be taken over"):
        parallelize(nn.Linear(2, 2), group)
    with pytest.raises(PlacementError, match="8 experts and 1 redundant ones make 9 slots"):
        parallelize(model, group, EPLBConfig(num_redundant_experts=1))
    with pytest.raises(ConfigError, match="no policy 'deepsek': did you mean 'deepseek'"):
        parallelize(model, group, EPLBConfig(policy="deepsek"))
    with pytest.raises(ConfigError, match="slots are spread over 3 ranks, but 2 exchange tokens"):
        parallelize(model, group, placement=shuffle(Topology(3, 4), seed=0))
    one_layer = Placement(np.arange(8)[None], 8, Topology(2, 4))
    with pytest.raises(ModelError, match="has 2 MoE layers of 8 experts, the placement 1 of 8"):
        parallelize(model, group, placement=one_layer)
    # So far the model is whole; ranks that differ find out before anything moves.
    config = EPLBConfig(step_interval=10 + rank.rank)
    with pytest.raises(TransferError, match="rank 1 and rank 0 come with different configuration"):
        parallelize(model, group, config)
