"""`equipoise plan` and `equipoise policies`: what they print, write and refuse."""

from __future__ import annotations

import json

import numpy as np
import pytest

from equipoise.placement import Placement, place_in_order
from equipoise.placement_files import read_placement, write_placement
from equipoise.topology import Topology
from tests.command_line import run_command

LOAD = [[8, 8, 2, 2], [1, 1, 9, 9]]
"""In order on two ranks of two slots: 16 and 4, then 2 and 18."""


@pytest.fixture
def load(tmp_path):
    path = tmp_path / "load.json"
    path.write_text(json.dumps({"logical_count": LOAD}))
    return path


def test_a_plan_from_nothing_says_what_it_changes_and_writes_it(tmp_path, load):
    out, figures = tmp_path / "placement.json", tmp_path / "figures.json"
    done = run_command(
        "plan", load, "--ranks=2", "--slots-per-rank=2", "--policy=deepseek",
        f"--output={out}", f"--json={figures}", "--expert-bytes=1000000", "--link-gb-per-s=1",
    )  # fmt: skip
    assert done.code == 0
    assert "1 sum of unknown numbers of steps, each of 2 layers x 4 experts, 40 assign" in done.out
    result = json.loads(figures.read_text())
    assert result["balancedness"] == {
        "before": {
            "mean": (10 / 16 + 10 / 18) / 2,
            "worst": 10 / 18,
            "per_layer": [0.625, 10 / 18],
        },
        "after": {"mean": 1.0, "worst": 1.0, "per_layer": [1.0, 1.0]},
    }
    # In each layer one expert goes each way, 1 MB at 1 GB/s: a rank receives two.
    assert (result["moves"], result["moves_per_layer"]) == (4, [2, 2])
    assert (result["bytes"], result["transfer_s"]) == (4_000_000, 0.002)
    assert result["rank_load"] == {"before": [18 / 20, 22 / 20], "after": [1.0, 1.0]}
    lines = [line.split() for line in done.out.splitlines()]
    assert ["mean", "of", "layers", "0.590", "1.000"] in lines
    assert ["1", "1.10", "1.00"] in lines
    assert "4 experts received (50.0% of all slots), up to 2 by one rank" in done.out
    assert "4.0 MB, 2 ms at 1.0 MB an expert and 1 GB/s a rank" in done.out
    assert f"wrote {out} for equipoise\n" in done.out
    placement = read_placement(out)
    assert placement.fingerprint() == result["fingerprint"]
    loads = np.take_along_axis(np.array(LOAD), placement.slot_to_expert, axis=1)
    assert loads.reshape(2, 2, 2).sum(axis=2).tolist() == [[10, 10], [10, 10]]


@pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm", "vllm-ascend"])
def test_every_engines_format_is_written(tmp_path, load, kind):
    out = tmp_path / "placement"
    done = run_command(
        "plan", load, "--ranks=2", "--redundant-experts=2", f"--output={out}", f"--format={kind}"
    )
    assert done.code == 0
    topology = Topology(2, 3)
    assert read_placement(out, num_experts=4, topology=topology).num_layers == 2


def test_a_plan_from_what_stands_keeps_to_the_budget(tmp_path, load):
    standing = tmp_path / "standing.json"
    write_placement(place_in_order(2, 4, Topology(2, 2)), standing)
    figures = tmp_path / "figures.json"
    done = run_command(
        "plan", load, f"--previous={standing}", f"--json={figures}", "--move-budget=0.25"
    )
    assert done.code == 0
    result = json.loads(figures.read_text())
    # A quarter of 8 slots is one swap in one layer: the worse one.
    assert (result["moves"], result["ranks"], result["slots_per_rank"]) == (2, 2, 2)
    assert result["balancedness"]["after"]["per_layer"] == [0.625, 1.0]
    assert "previous" in done.out


def test_dense_layers_are_left_out_of_the_load_and_put_back_for_sglang(tmp_path):
    load, out = tmp_path / "load.json", tmp_path / "placement.json"
    load.write_text(json.dumps({"logical_count": [[0] * 4, *LOAD]}))
    done = run_command(
        "plan", load, "--ranks=2", "--redundant-experts=0", "--first-layer=1",
        f"--output={out}", "--format=sglang",
    )  # fmt: skip
    assert done.code == 0
    assert len(json.loads(out.read_text())["physical_to_logical_map"]) == 3


def test_the_same_load_gives_the_same_bytes(tmp_path, load):
    for name in ("a", "b"):
        assert run_command("plan", load, "--ranks=2", f"--output={tmp_path / name}").code == 0
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_expert_groups_and_survival_are_passed_on(tmp_path, load):
    out = tmp_path / "placement.json"
    done = run_command(
        "plan", load, "--ranks=4", "--nodes=2", "--slots-per-rank=2", "--survival=node",
        "--min-copies=2", f"--output={out}",
    )  # fmt: skip
    assert done.code == 0
    on_node = read_placement(out).slot_to_expert.reshape(2, 2, 4)
    assert all(set(on_node[layer, node]) == {0, 1, 2, 3} for layer in (0, 1) for node in (0, 1))


BAD = {
    "no ranks": ([], "say how many ranks there are by --ranks, or what stands by --previous"),
    "ranks that do not divide": (
        ["--ranks=3", "--redundant-experts=1"],
        "4 experts and 1 redundant ones make 5 slots, which 3 ranks do not divide: ask for 2, 5 or",
    ),
    "too few slots": (
        ["--ranks=2", "--slots-per-rank=1"],
        "2 slots cannot hold 4 experts on 2 ranks: ask for at least 2 slots per rank",
    ),
    "no ranks at all": (["--ranks=0"], "--ranks must be at least 1, got 0"),
    "nodes that do not divide": (
        ["--ranks=2", "--nodes=3"],
        "2 ranks cannot be spread evenly over 3 nodes",
    ),
    "slots twice": (
        ["--ranks=2", "--slots-per-rank=2", "--redundant-experts=2"],
        "--slots-per-rank and --redundant-experts say the same: give one of them",
    ),
    "slots without ranks": (
        ["--slots-per-rank=2"],
        "--slots-per-rank, --redundant-experts and --nodes need --ranks",
    ),
    "a policy that is none": (
        ["--ranks=2", "--policy=flo"],
        "no policy 'flo': did you mean 'flow'?",
    ),
    "an option of another policy": (
        ["--ranks=2", "--policy=deepseek", "--move-budget=0.1"],
        "policy 'deepseek' takes no move_budget: flow does",
    ),
    "a survival that is not to be had": (
        ["--ranks=2", "--slots-per-rank=2", "--survival=rank", "--min-copies=2"],
        "4 slots cannot hold 2 copies of 4 experts: ask for at least 4 slots per rank",
    ),
    "another number of experts": (
        ["--ranks=2", "--num-experts=5"],
        "load.json: it counts 4 experts in each layer, expected 5",
    ),
    "bytes that cannot be": (["--ranks=2", "--expert-bytes=0"], "expert_bytes must be at least 1"),
    "no such previous": (["--previous=nowhere.json"], "nowhere.json: No such file or directory"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_is_one_line_and_exit_2_and_nothing_is_written(tmp_path, load, case):
    options, message = BAD[case]
    out, figures = tmp_path / "placement.json", tmp_path / "figures.json"
    done = run_command("plan", load, *options, f"--output={out}", f"--json={figures}")
    assert done.code == 2
    assert message in done.err
    assert done.err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [load]


def test_a_bad_load_writes_nothing(tmp_path):
    load = tmp_path / "load.json"
    load.write_text('{"logical_count": [[1, 2, -3, 4]]}')
    done = run_command("plan", load, "--ranks=2", f"--output={tmp_path / 'placement.json'}")
    assert done.code == 2
    assert done.err == (
        f"equipoise: {load}: logical_count: layer 0, expert 2 has -3: it must be a whole number "
        "of tokens, 0 or more\n"
    )
    assert list(tmp_path.iterdir()) == [load]


def test_a_file_that_cannot_be_written_is_refused_before_the_work(tmp_path, load):
    done = run_command("plan", load, "--ranks=2", f"--output={tmp_path / 'no' / 'placement.json'}")
    assert done.code == 2
    assert f"--output {tmp_path / 'no' / 'placement.json'}: there is no directory" in done.err


def test_a_previous_placement_of_another_shape_is_refused(tmp_path, load):
    standing = tmp_path / "standing.json"
    write_placement(Placement(np.array([[0, 1, 2, 3]]), 4, Topology(2, 2)), standing)
    done = run_command("plan", load, f"--previous={standing}")
    assert done.code == 2
    assert "the standing placement is 1 layers x 4 experts" in done.err


def test_policies_are_listed_with_where_they_come_from():
    done = run_command("policies")
    assert done.code == 0
    assert "deepseek  equipoise.policy.deepseek  Expert Parallelism Load Balancer" in done.out
    assert "flow      equipoise.policy.flow      Balance for few moves" in done.out
