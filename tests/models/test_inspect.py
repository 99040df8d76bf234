"""What `equipoise inspect` says, from configurations alone and from checkpoints."""

from __future__ import annotations

import json
from pathlib import Path

from tests.command_line import run_command
from tests.models.saved import find_family, save
from tests.models.test_damaged_checkpoints import truncate
from tests.models.tiny import list_outside, make_skeleton, make_tiny


def write_config(experts: str, directory: Path) -> None:
    make_tiny(find_family(experts)).config.save_pretrained(directory)


def test_a_configuration_suffices(tmp_path: Path) -> None:
    model = make_tiny(find_family("MixtralExperts"))
    model.config.save_pretrained(tmp_path)
    done = run_command("inspect", tmp_path, "--ranks", 4, "--json")
    assert (done.code, done.err) == (0, "")
    found = json.loads(done.out)
    (one,) = found["sets"]
    expert = 3 * 32 * 32 * 4
    assert (one["num_layers"], one["num_experts"], one["top_k"]) == (3, 8, 3)
    assert one["expert_bytes"] == [expert, expert]
    assert one["slots_per_rank"] == 3
    assert one["rank_bytes"] == 3 * 3 * expert
    whole = sum(parameter.nbytes for parameter in model.parameters())
    assert found["shared_bytes"] == whole - 3 * 8 * expert
    assert found["rank_bytes"] == found["shared_bytes"] + one["rank_bytes"]
    assert found["adapter"] == "use_experts_implementation"
    assert found["refused"] == []


def test_what_it_prints(tmp_path: Path) -> None:
    write_config("Ernie4_5_VLMoeMoeExperts", tmp_path)
    done = run_command("inspect", tmp_path, "--ranks", 3, "--redundant-experts", 2)
    assert done.code == 0
    lines = done.out.splitlines()
    assert lines[0].startswith("Ernie4_5_VLMoeForConditionalGeneration (ernie4_5_vl_moe) in float3")
    assert "8 experts and 2 redundant ones make 10 slots, which 3 ranks do not divide" in done.out
    assert "refused: equipoise run: serves" in done.out
    done = run_command("inspect", tmp_path)
    assert "weights of each of 4 ranks: " in done.out


def test_refusals_are_named(tmp_path: Path) -> None:
    outside = next(f for f in list_outside() if f.experts == "DbrxExperts")
    make_skeleton(outside).config.save_pretrained(tmp_path)
    done = run_command("inspect", tmp_path)
    assert done.code == 0
    assert "DbrxExperts cannot be taken over: all experts of a layer are one matrix" in done.out
    done = run_command("inspect", tmp_path / "absent")
    assert done.code == 2
    assert "no such directory" in done.err
    done = run_command("inspect", tmp_path, "--ranks", 0)
    assert done.err == "equipoise: --ranks must be at least 1, got 0\n"


def test_damaged_files_are_named(tmp_path: Path) -> None:
    save("OlmoeExperts", tmp_path)
    assert "refused" not in run_command("inspect", tmp_path).out
    truncate(tmp_path)
    assert "model.safetensors: is truncated" in run_command("inspect", tmp_path).out


def test_an_index_suffices(tmp_path: Path) -> None:
    save("OlmoeExperts", tmp_path, max_shard_size="100KB")
    for file in tmp_path.glob("*.safetensors"):
        file.unlink()
    assert "refused" not in run_command("inspect", tmp_path).out
    index = tmp_path / "model.safetensors.index.json"
    whole = json.loads(index.read_text())["weight_map"]

    def leave_out(part: str) -> str:
        kept = {name: file for name, file in whole.items() if part not in name}
        assert len(kept) < len(whole)
        index.write_text(json.dumps({"weight_map": kept}))
        return run_command("inspect", tmp_path).out

    assert "layers.1.mlp.experts lacks expert 5 of 8" in leave_out("layers.1.mlp.experts.5.")
    assert "json lacks 1 tensors, like model.norm.weight" in leave_out("model.norm.")


def test_a_dense_model_has_no_experts(tmp_path: Path) -> None:
    from transformers import LlamaConfig

    LlamaConfig(hidden_size=32, num_hidden_layers=1, intermediate_size=32).save_pretrained(tmp_path)
    assert "refused: LlamaForCausalLM has no experts" in run_command("inspect", tmp_path).out
