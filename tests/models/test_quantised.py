"""Quantised checkpoints: scales go where their expert goes; what cannot be done is said by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from equipoise import ParallelModel, parallelize
from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup
from equipoise.errors import ModelError
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.export import write_checkpoint
from equipoise.models.inspection import inspect_checkpoint
from equipoise.models.loading import load_spread
from equipoise.models.parallel import _plan_sets
from equipoise.models.quantised import check_kernels
from equipoise.transfer import rearrange_expert_weights_inplace
from tests.models.fp8 import write_fp8, write_mxfp4
from tests.models.saved import save
from tests.models.test_checkpoint import CONFIG, TOKENS
from tests.models.test_export import read_bytes
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import run
from tests.placements import make_random_placement

FAMILIES = ("DeepseekV3Experts", "MixtralExperts", "Qwen3MoeExperts")


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    torch.set_num_threads(1)
    started = ThreadRanks(2)
    yield started
    started.close()


@pytest.fixture(params=FAMILIES)
def fp8(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    save(request.param, tmp_path / "plain")
    write_fp8(tmp_path / "plain", tmp_path / "fp8")
    return tmp_path / "fp8"


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers dequantises where there is no GPU; bytes travel and are kept anywhere."""
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    monkeypatch.setattr(FineGrainedFP8HfQuantizer, "validate_environment", lambda *_, **__: None)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_scales_move_with_their_expert_and_are_written_back(fp8: Path, ranks: ThreadRanks) -> None:
    stored = read_bytes(fp8)

    def act(group: RankGroup) -> int:
        checkpoint = Checkpoint(fp8)
        assert checkpoint.is_quantised
        (plan,) = plans = _plan_sets([checkpoint.layers], group, CONFIG, 1, None)
        spread = load_spread(checkpoint, plans, group)
        (one,) = spread.sets
        for layer, weights in zip(one.layers, one.weights, strict=True):
            dtypes = {name: slots.dtype for name, slots in zip(layer.tensors, weights, strict=True)}
            assert dtypes["down_proj"] == torch.float8_e4m3fn
            assert dtypes["down_proj_scale_inv"] == torch.float32
            assert len(dtypes) == 4
        standing = one.maps.placement
        communicator = create_eplb_communicator(group, "torch_gloo", one.weights)
        moves = 0
        for seed in range(3):
            target = make_random_placement(
                np.random.default_rng(seed), len(one.layers), 8, standing.topology
            )
            moves += int((target.slot_to_expert != standing.slot_to_expert).sum())
            rearrange_expert_weights_inplace(standing, target, one.weights, communicator, group)
            standing = target
            one.maps.commit(standing)
        write_checkpoint(spread, group, fp8.parent / "again", checkpoint)
        communicator.close()
        plan.dispatcher.close()
        return moves

    assert min(ranks(act)) > 0
    again = fp8.parent / "again"
    assert read_bytes(again) == stored
    assert sum("experts" in name and "scale_inv" in name for name in stored) >= 3 * 8 * 2
    assert json.loads((again / "config.json").read_text())["quantization_config"]
    shutil.rmtree(again)


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_kernels_fp8_is_refused_before_it_is_read(fp8: Path, ranks: ThreadRanks) -> None:
    def act(group: RankGroup) -> None:
        with pytest.raises(ModelError, match=r"cannot be loaded .* or ask for dequantize=True"):
            parallelize(fp8, group, CONFIG)

    ranks(act)
    assert any("dequantize=True" in line for line in inspect_checkpoint(fp8, 2, None).refused)
    model = Checkpoint(fp8).model
    with pytest.raises(ModelError, match=r"ForCausalLM has FP8 weights"):
        check_kernels(model)


def test_fp8_is_dequantised_as_transformers_does_it(fp8: Path, ranks: ThreadRanks) -> None:
    pytest.importorskip("accelerate", reason="transformers reads FP8 with accelerate")
    compare(fp8, ranks)


def test_mxfp4_is_dequantised_as_transformers_does_it(tmp_path: Path, ranks: ThreadRanks) -> None:
    pytest.importorskip("accelerate", reason="transformers reads MXFP4 with accelerate")
    save("GptOssExperts", tmp_path / "plain")
    write_mxfp4(tmp_path / "plain", tmp_path / "mxfp4")
    compare(tmp_path / "mxfp4", ranks)


def compare(directory: Path, ranks: ThreadRanks) -> None:
    """Logits in bf16, through rebalances; bytes read are those that are stored."""
    from transformers import AutoModelForCausalLM

    plain: Any = AutoModelForCausalLM.from_pretrained(directory).eval()
    plain.set_experts_implementation("batched_mm")

    def act(group: RankGroup) -> tuple[list[torch.Tensor], ParallelModel]:
        parallel = parallelize(directory, group, CONFIG, dequantize=True)
        parallel.model.set_experts_implementation("batched_mm")
        logits = []
        for step in range(3):
            with parallel.route():
                logits.append(run(parallel.model, TOKENS + 7 * step + group.rank))
            parallel.step()
        with pytest.raises(ModelError, match=r"were dequantised as they were read|could not"):
            parallel.to_checkpoint(directory.parent / "never")
        parallel.close()
        return logits, parallel

    for rank, (logits, parallel) in enumerate(ranks(act)):
        for step, got in enumerate(logits):
            assert torch.equal(got, run(plain, TOKENS + 7 * step + rank))
        checkpoint = parallel.checkpoint
        assert checkpoint is not None
        assert checkpoint.is_dequantised
        # They begin in order, so that a rank's slots hold different experts.
        held = parallel.spread.maps.placement.topology.slots_per_rank
        own = sum(held * checkpoint.count_bytes(layer) for layer in checkpoint.layers)
        assert checkpoint.bytes_read == checkpoint.shared_bytes + own


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_other_quantisations_are_refused_by_name(method: str, tmp_path: Path) -> None:
    save("MixtralExperts", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": method, "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=rf"quantised by {method}, .* fp8 and mxfp4 can be"):
        Checkpoint(tmp_path)
    found = inspect_checkpoint(tmp_path, 2, None)
    assert (found.quantisation, found.sets[0].num_experts) == (method, 8)
    assert any(f"quantised by {method}" in line for line in found.refused)


def test_there_must_be_something_to_dequantise(tmp_path: Path) -> None:
    save("MixtralExperts", tmp_path)
    with pytest.raises(ModelError, match=r"config\.json names no quantisation"):
        Checkpoint(tmp_path, dequantize=True)
