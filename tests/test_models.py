"""Models from directories, and their experts as slots: logits are those of the plain model."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import ModelError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.experts import ExpertParallelModel, make_expert_parallel
from equipoise.models.families import ModelShape, read_model_shape
from equipoise.models.loading import load_model, load_tokenizer
from equipoise.placement import Placement, place_in_order
from equipoise.topology import Topology
from tests.ranks import Rank, processes

CPU = torch.device("cpu")
LAYERS, EXPERTS, TOP_K, VOCABULARY = 2, 8, 3, 97
FAMILIES = ("qwen3_moe", "mixtral", "olmoe")


def make_model(family: str, vocabulary: int = VOCABULARY) -> nn.Module:
    """A tiny model with random weights, big enough that experts differ audibly."""
    import transformers

    shape: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts_per_tok": TOP_K,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    match family:
        case "qwen3_moe":
            config: Any = transformers.Qwen3MoeConfig(
                **shape, num_experts=EXPERTS, moe_intermediate_size=24, head_dim=8
            )
            model: Any = transformers.Qwen3MoeForCausalLM(config)
        case "mixtral":
            config = transformers.MixtralConfig(**shape, num_local_experts=EXPERTS)
            model = transformers.MixtralForCausalLM(config)
        case _:
            config = transformers.OlmoeConfig(**shape, num_experts=EXPERTS)
            model = transformers.OlmoeForCausalLM(config)
    evaluated: nn.Module = model.eval().requires_grad_(False)
    return evaluated


def shuffle(topology: Topology, seed: int) -> Placement:
    """Every expert once, the remaining slots replicas or empty, all in random order."""
    random = np.random.default_rng(seed)
    rows = []
    for _ in range(LAYERS):
        spare = random.integers(-1, EXPERTS, topology.num_slots - EXPERTS)
        rows.append(random.permutation(np.concatenate([np.arange(EXPERTS), spare])))
    return Placement(np.array(rows), EXPERTS, topology)


def spread_experts(group: RankGroup, family: str, placement: Placement) -> ExpertParallelModel:
    maps = PlacementMaps(placement, CPU)
    return make_expert_parallel(
        make_model(family),
        maps,
        group.rank,
        create_dispatcher("torch", group, placement.topology),
        LoadRecorder(LAYERS, placement.num_slots, CPU),
    )


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_logits_are_those_of_the_plain_model(rank: Rank, num_ranks: int) -> None:
    placement = shuffle(Topology(num_ranks, 12 // num_ranks + 1), seed=num_ranks)
    group = rank.make_group()
    for family in FAMILIES:
        compare_with_plain(family, placement, group)
    group.barrier()


def compare_with_plain(family: str, placement: Placement, group: RankGroup) -> None:
    rank = group.rank
    spread = spread_experts(group, family, placement)
    plain = make_model(family)
    random = torch.Generator().manual_seed(rank)
    with torch.inference_mode():
        for turn in range(3):
            shape = (1 + rank, 20 + 5 * turn)
            tokens = torch.randint(VOCABULARY, shape, generator=random)
            with spread.route(None, first_position=turn + rank) as model:
                got = model(input_ids=tokens, use_cache=False).logits
            want = plain(input_ids=tokens, use_cache=False).logits
            assert want.std() > 0.05
            assert (got - want).abs().max() <= 2e-6 * max(1.0, want.abs().max().item())
    tokens_here = sum((1 + rank) * (20 + 5 * turn) for turn in range(3))
    assert spread.recorder.counts.sum(1).tolist() == [tokens_here * TOP_K] * LAYERS
    assert spread.recorder.counts[spread.maps.slot_to_expert < 0].sum() == 0
    assert spread.expert_cpu_s > 0


@processes(2)
def test_slots_and_padding(rank: Rank) -> None:
    group = rank.make_group()
    check_slots_hold_what_the_placement_says(group)
    check_padding_is_sent_nowhere_and_not_counted(group)
    group.barrier()


def check_slots_hold_what_the_placement_says(group: RankGroup) -> None:
    placement = shuffle(Topology(2, 6), seed=3)
    spread = spread_experts(group, "qwen3_moe", placement)
    plain = make_model("qwen3_moe")
    mine = slice(6 * group.rank, 6 * group.rank + 6)
    for layer, weights in enumerate(spread.expert_weights):
        experts: Any = plain.get_submodule(f"model.layers.{layer}.mlp.experts")
        assert len(weights) == 2
        for slots, full in zip(weights, (experts.gate_up_proj, experts.down_proj), strict=True):
            assert slots.is_contiguous()
            assert not slots.requires_grad
            for slot, expert in zip(slots, placement.slot_to_expert[layer, mine], strict=True):
                assert torch.equal(slot, full[expert] if expert >= 0 else torch.zeros_like(slot))


def make_lone_group() -> RankGroup:
    return create_rank_group(
        dist.HashStore(), 0, 1, CPU, timeout=timedelta(seconds=30), device_group="gloo"
    )


def test_weights_are_those_that_the_model_computes_with() -> None:
    placement = place_in_order(LAYERS, EXPERTS, Topology(1, EXPERTS))
    spread = spread_experts(make_lone_group(), "mixtral", placement)
    tokens = torch.arange(10)[None]
    with torch.inference_mode(), spread.route(None, 0) as model:
        before = model(input_ids=tokens).logits
        for layer in spread.expert_weights:
            for tensor in layer:
                tensor.zero_()
        assert not torch.allclose(before, model(input_ids=tokens).logits)


def check_padding_is_sent_nowhere_and_not_counted(group: RankGroup) -> None:
    spread = spread_experts(group, "olmoe", shuffle(Topology(2, 5), seed=1))
    plain = make_model("olmoe")
    tokens = torch.arange(2, 26).view(2, 12)
    length = 12 if group.rank == 0 else 0
    valid = torch.zeros(2, 12, dtype=torch.bool)
    valid[0], valid[1, :5] = group.rank == 0, True
    with torch.inference_mode(), spread.route(valid.flatten(), 0) as model:
        got = model(input_ids=tokens, use_cache=False).logits
        want = plain(input_ids=tokens, use_cache=False).logits
    torch.testing.assert_close(got[valid], want[valid], rtol=0, atol=5e-6)
    assert spread.recorder.counts.sum().item() == (length + 5) * TOP_K * LAYERS


def test_what_cannot_be_taken_over_is_refused() -> None:
    placement = place_in_order(LAYERS, EXPERTS, Topology(1, EXPERTS))
    maps = PlacementMaps(placement, CPU)
    dispatcher = create_dispatcher("torch", make_lone_group(), placement.topology)
    recorder = LoadRecorder(LAYERS, EXPERTS, CPU)
    with pytest.raises(ModelError, match="Linear has no experts that can be taken over"):
        make_expert_parallel(nn.Linear(2, 2), maps, 0, dispatcher, recorder)
    other = PlacementMaps(place_in_order(3, 6, Topology(1, 8)), CPU)
    with pytest.raises(ModelError, match="has 2 MoE layers of 8 experts, the placement 3 of 6"):
        make_expert_parallel(make_model("mixtral"), other, 0, dispatcher, recorder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_comes_back_without_network_or_noise(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    saved: Any = make_model(family)
    saved.save_pretrained(tmp_path)
    capfd.readouterr()

    def refuse(*_: object) -> None:
        raise AssertionError("a connection was asked for")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    model: Any = load_model(tmp_path, torch.float32, CPU)
    assert capfd.readouterr() == ("", "")
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, saved(tokens).logits)
    assert read_model_shape(tmp_path) == ModelShape(family, LAYERS, EXPERTS, TOP_K)


def test_dense_layers_are_not_counted(tmp_path: Path) -> None:
    config = {
        "model_type": "qwen3_moe",
        "num_hidden_layers": 6,
        "num_experts": 16,
        "num_experts_per_tok": 2,
        "mlp_only_layers": [1],
        "decoder_sparse_step": 2,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_model_shape(tmp_path) == ModelShape("qwen3_moe", 2, 16, 2)


def write_config(directory: Path, **changes: object) -> None:
    config = {
        "model_type": "olmoe",
        "num_hidden_layers": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    }
    (directory / "config.json").write_text(json.dumps({**config, **changes}))


def test_wrong_checkpoints_are_refused_in_one_line(tmp_path: Path) -> None:
    def refuse(expected: str) -> None:
        with pytest.raises(ModelError, match=expected) as raised:
            load_model(tmp_path, torch.float32, CPU)
        assert "\n" not in str(raised.value)
        assert str(tmp_path) in str(raised.value)

    refuse("has no config.json; is it a checkpoint")
    (tmp_path / "config.json").write_text("{")
    refuse("cannot be read as JSON")
    (tmp_path / "config.json").write_text("[]")
    refuse("must be a JSON object, not list")
    write_config(tmp_path, model_type="llama")
    refuse("model_type 'llama' is not a family that can be served: ask for one of qwen3_moe, mix")
    write_config(tmp_path, num_experts=0)
    refuse("must give num_experts as a whole number of at least 1, got 0")
    write_config(tmp_path)
    refuse(r"has no weights \(\*\.safetensors\)")
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    refuse(r"weights are pickled \(pytorch_model.bin\).*convert them to safetensors")
    (tmp_path / "model.safetensors").write_bytes(b"garbage")
    refuse("cannot be loaded: ")
    with pytest.raises(ModelError, match="no such directory"):
        read_model_shape(tmp_path / "absent")


def test_weights_that_lack_a_tensor_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    saved: Any = make_model("qwen3_moe")
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.mlp.gate.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"lack 1 tensors, like model\.layers\.1\.mlp\.gate"):
        load_model(tmp_path, torch.float32, CPU)


def test_a_missing_tokenizer_is_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer \(tokenizer_config.json or tok"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(tmp_path)


def test_shapes_are_read_without_torch() -> None:
    code = (
        "import sys, equipoise.models.families, equipoise.job.spec\n"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=110)
