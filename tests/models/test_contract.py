"""What is taken over and moves, on real experts modules outside a model; and what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.contract import find_expert_layers
from tests.models.thread_ranks import ThreadRanks

CONFIG = EPLBConfig(
    window_size=1,
    step_interval=1,
    policy="deepseek",
    communicator="torch_gloo",
    use_async=False,
)
TOKENS, HIDDEN, TOP_K = 24, 32, 2


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    started = ThreadRanks(2)
    yield started
    started.close()


def make_experts(num_experts: int, seed: int = 0) -> Any:
    from transformers import MixtralConfig
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts

    config = MixtralConfig(hidden_size=HIDDEN, intermediate_size=32, num_local_experts=num_experts)
    config._experts_implementation = "batched_mm"
    experts = MixtralExperts(config)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in experts.parameters():
            tensor.copy_(torch.randn(tensor.shape, generator=random))
    return experts.requires_grad_(False)


class Stack(nn.Module):
    """Experts modules behind each other, with routes that depend on the token alone."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.counts = [layer.num_experts for layer in layers]

    def forward(self, hidden: Tensor, kind: Tensor) -> Tensor:
        for layer, count in zip(self.layers, self.counts, strict=True):
            routes = torch.stack([kind % count, (kind + 1) % count], dim=1)
            weights = torch.full(routes.shape, 0.5)
            hidden = torch.tanh(layer(hidden, routes, top_k_weights=weights))
        return hidden


@torch.inference_mode()
def serve(parallel: ParallelModel, rank: int, step: int) -> tuple[Tensor, Tensor]:
    random = torch.Generator().manual_seed(10 * step + rank)
    hidden = torch.randn(TOKENS, HIDDEN, generator=random)
    kind = torch.randint(step, step + 2, (TOKENS,), generator=random)
    with parallel.route() as model:
        return model(hidden, kind), hidden


def check_stack(make: Any, ranks: ThreadRanks) -> list[ParallelModel]:
    plain = make()
    parallels = ranks(lambda group: parallelize(make(), group, CONFIG))
    moves = 0
    for step in range(3):
        outputs = ranks(lambda group, step=step: serve(parallels[group.rank], group.rank, step)[0])
        for rank, output in enumerate(outputs):
            random = torch.Generator().manual_seed(10 * step + rank)
            hidden = torch.randn(TOKENS, HIDDEN, generator=random)
            kind = torch.randint(step, step + 2, (TOKENS,), generator=random)
            assert torch.equal(output, plain(hidden, kind))
        outcomes = ranks(lambda group: parallels[group.rank].step())
        moves += sum(outcome.moves for outcome in outcomes[0])
    assert moves > 0
    return parallels


def test_layers_may_differ_in_their_number_of_experts(ranks: ThreadRanks) -> None:
    parallels = check_stack(lambda: Stack(make_experts(8), make_experts(4), make_experts(8)), ranks)
    spread = parallels[0].spread
    assert [len(one.layers) for one in spread.sets] == [2, 1]
    assert [one.maps.placement.num_experts for one in spread.sets] == [8, 4]
    assert len(spread.expert_weights) == 3
    with pytest.raises(ModelError, match="layers of this model have 8 or 4 experts"):
        _ = spread.maps
    assert set(parallels[0].state.stats().models) == {"model/8", "model/4"}
    ranks(lambda group: parallels[group.rank].close())


def test_experts_stay_out_of_what_is_compiled(ranks: ThreadRanks) -> None:
    """Process groups and the host's counts are nothing that a compiler can look into."""
    plain = Stack(make_experts(8), make_experts(8))

    def compute(group: RankGroup) -> tuple[Tensor, Tensor]:
        parallel = parallelize(Stack(make_experts(8), make_experts(8)), group, CONFIG)
        random = torch.Generator().manual_seed(group.rank)
        hidden = torch.randn(TOKENS, HIDDEN, generator=random)
        kind = torch.randint(0, 8, (TOKENS,), generator=random)
        with torch.inference_mode(), parallel.lockstep() as model:
            compiled = torch.compile(model.__call__, backend="eager")
            outputs = [compiled(hidden, kind) for _ in range(2)]
        parallel.close()
        assert torch.equal(*outputs)
        return outputs[0], plain(hidden, kind)

    for got, wanted in ranks(compute):
        assert torch.equal(got, wanted)


def test_tied_experts_share_their_slots(ranks: ThreadRanks) -> None:
    def make() -> Stack:
        first, second = make_experts(8), make_experts(8)
        for name in ("gate_up_proj", "down_proj"):
            setattr(second, name, getattr(first, name))
        stack = Stack(first, second)
        stack.all_tied_weights_keys = {  # type: ignore[assignment]
            f"layers.1.{name}": f"layers.0.{name}" for name in ("gate_up_proj", "down_proj")
        }
        return stack

    parallels = check_stack(make, ranks)
    (one,) = parallels[0].spread.sets
    assert len(one.layers) == 1
    first, second = parallels[0].model.layers
    assert first.down_proj is second.down_proj
    ranks(lambda group: parallels[group.rank].close())


def make_fp8_stack() -> nn.Module:
    """Block-quantised experts as transformers makes them for an FP8 checkpoint."""
    from transformers.integrations.finegrained_fp8 import ALL_FP8_EXPERTS_FUNCTIONS, FP8Experts
    from transformers.integrations.moe import use_experts_implementation

    kind = type("FP8Experts", (FP8Experts,), {})
    decorated: Any = use_experts_implementation(kind, experts_interface=ALL_FP8_EXPERTS_FUNCTIONS)
    config = SimpleNamespace(
        hidden_size=HIDDEN, moe_intermediate_size=32, num_experts=8, hidden_act="silu"
    )
    experts = decorated(config, block_size=(16, 16), activation_scheme="static")
    random = torch.Generator().manual_seed(0)
    for tensor in experts.parameters():
        noise = torch.randint(0, 120, (tensor.nbytes,), generator=random, dtype=torch.uint8)
        tensor.data = noise.view(tensor.dtype).view(tensor.shape)
    return Stack(experts.requires_grad_(False))


def test_scales_of_quantised_weights_move_with_them(ranks: ThreadRanks) -> None:
    whole = make_fp8_stack().layers[0]  # type: ignore[index]

    def balance(group: RankGroup) -> int:
        parallel = parallelize(make_fp8_stack(), group, CONFIG)
        (one,) = parallel.spread.sets
        (layer,) = one.layers
        assert set(layer.tensors) == {name for name, _ in whole.named_parameters()}
        assert any("scale_inv" in name for name in layer.tensors)
        assert any("activation_scale" in name for name in layer.tensors)
        moves = 0
        for step in range(3):
            # All tokens of a step go to one expert.
            one.recorder.record(0, one.maps.expert_to_slots[0, [3 * step]].repeat(50, 1)[:, 0])
            moves += sum(outcome.moves for outcome in parallel.step())
            check_bytes(parallel, group.rank)
        parallel.close()
        return moves

    def check_bytes(parallel: ParallelModel, rank: int) -> None:
        (one,) = parallel.spread.sets
        num_slots = one.maps.placement.topology.slots_per_rank
        held = one.maps.placement.slot_to_expert[0, rank * num_slots : (rank + 1) * num_slots]
        for name, slots in zip(one.layers[0].tensors, one.weights[0], strict=True):
            full = getattr(whole, name)
            for slot, expert in enumerate(held):
                if expert >= 0:
                    got, wanted = slots[slot], full[expert]
                    assert torch.equal(
                        got.reshape(-1).view(torch.uint8), wanted.reshape(-1).view(torch.uint8)
                    )

    assert min(ranks(balance)) > 0


def test_a_buffer_of_experts_moves(ranks: ThreadRanks) -> None:
    experts = make_experts(8)
    experts.register_buffer("input_scale", torch.arange(8.0))
    (layer,) = find_expert_layers(Stack(experts))
    assert layer.tensors == ("gate_up_proj", "down_proj", "input_scale")


def test_what_may_belong_to_an_expert_is_never_left_behind() -> None:
    experts = make_experts(8)
    experts.scale = nn.Parameter(torch.ones(3))
    with pytest.raises(ModelError, match=r"layers\.0\.scale has shape \[3\]: neither one entry"):
        find_expert_layers(Stack(experts))
    experts = make_experts(8)
    experts.quantizer = nn.Module()
    experts.quantizer.register_buffer("zero_points", torch.zeros(8, 4))
    with pytest.raises(ModelError, match=r"quantizer\.zero_points has shape \[8, 4\] and looks as"):
        find_expert_layers(Stack(experts))
    experts = make_experts(8)
    experts.one_for_all = nn.Parameter(torch.ones(1))
    assert len(find_expert_layers(Stack(experts))[0].tensors) == 2


def test_experts_are_taken_over_once(ranks: ThreadRanks) -> None:
    def take_twice(group: RankGroup) -> None:
        model = Stack(make_experts(8))
        parallelize(model, group, CONFIG).close()
        with pytest.raises(ModelError, match=r"layers\.0: its experts have been taken over alre"):
            parallelize(model, group, CONFIG)

    ranks(take_twice)
