"""`equipoise bench transfer`: wires side by side, on bytes that are what they should be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from typer.testing import CliRunner

from equipoise.bench.transfer import compare_transfers
from equipoise.bench.transfer_case import RankShare, TransferSpec, make_case
from equipoise.bench.transfer_rank import LeftOut, Measured, Said, measure_transfers
from equipoise.cli.bench_transfer import bench_transfer
from equipoise.errors import CommunicatorUnavailable, ConfigError, EquipoiseError, TransferError
from equipoise.launch.failure import JobFailed
from tests.ranks import Rank, hide_nixl, processes

COLUMNS = {
    "backend",
    "bytes_received_per_rank",
    "seconds",
    "gb_per_s",
    "limit",
    "limit_gb_per_s",
    "ratio",
    "peak_extra_bytes",
    "goal",
    "goal_of",
    "goal_is",
    "met",
}


def run_command(*words: str) -> str:
    """What the command prints; raises what it raises."""
    app = typer.Typer()
    app.command()(bench_transfer)
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "200"})
    if result.exception is not None:
        raise result.exception
    return result.stdout


def count_moves(spec: TransferSpec) -> int:
    """Slots that get an expert of another rank: every expert has one slot, and began in order."""
    experts = np.arange(spec.num_ranks * spec.slots_per_rank)
    table = np.tile(experts, (spec.num_layers, 1))
    dealt = np.random.default_rng(spec.seed).permuted(table, axis=1)
    rank_of_slot = experts // spec.slots_per_rank
    return int((dealt // spec.slots_per_rank != rank_of_slot).sum())


def test_backends_are_compared_on_the_same_bytes(tmp_path: Path) -> None:
    path = tmp_path / "figures.json"
    options = "--ranks 2 --layers 3 --slots 2 --expert-bytes 1600000 --rounds 2 --seed 5"
    shown = run_command(*options.split(), "--json", str(path))
    outcome = json.loads(path.read_text())
    spec = TransferSpec(2, 3, 2, 1_600_000, seed=5)
    *wires, processor = outcome["rows"]
    assert [row["backend"] for row in wires] == ["nixl", "torch_gloo"]
    assert [row["limit"] for row in wires] == ["memcpy", "raw gloo message"]
    assert (processor["backend"], processor["goal_of"]) == ("processor alone", "seconds")
    assert processor["met"] is (0 < processor["seconds"] <= processor["goal"])
    for row in wires:
        assert row.keys() >= COLUMNS
        assert row["bytes_received_per_rank"] == count_moves(spec) * 1_600_000 // 2
        assert row["gb_per_s"] == pytest.approx(
            row["bytes_received_per_rank"] / row["seconds"] / 1e9
        )
        assert row["ratio"] == pytest.approx(row["gb_per_s"] / row["limit_gb_per_s"])
        assert (row["goal"], row["goal_of"]) == (0.8, "ratio")
        assert row["met"] is (row["ratio"] >= 0.8)
        assert row["peak_extra_bytes"] > 0
        assert row["backend"] in shown
        assert len(row["seconds_of_rounds"]) == len(row["limit_seconds_of_rounds"]) == 2
    assert outcome["setting"]["moves"] == count_moves(spec)
    assert any("need GPUs" in note and "pynccl" in note for note in outcome["notes"])
    assert all(note in shown for note in outcome["notes"])


def test_each_expert_that_comes_is_checked_byte_by_byte() -> None:
    case = make_case(TransferSpec(num_ranks=3, num_layers=2, slots_per_rank=4, expert_bytes=100))
    shares = [RankShare(case, rank) for rank in range(3)]
    assert [share.into.numel() for share in shares] == case.received_bytes
    share, plan = shares[1], case.plan
    # As the wire would: by source, layer, tensor, expert; straight from the senders' weights.
    rows = np.flatnonzero((plan.dst_rank == 1) & ~plan.is_local)
    parts = []
    for source in (0, 2):
        for layer in range(2):
            chosen = rows[(plan.src_rank[rows] == source) & (plan.layer[rows] == layer)]
            for tensor in shares[source].weights[layer]:
                parts += [tensor[plan.src_slot[row] % 4] for row in chosen]
    share.into.copy_(torch.cat(parts))
    share.check("by hand")
    assert sum(share.received_from.values()) == share.into.numel()
    for position in (0, share.into.numel() // 2, share.into.numel() - 1):
        share.into[position] ^= 1
        with pytest.raises(TransferError, match=r"rank 1, by hand: layer \d, expert \d+ from rank"):
            share.check("by hand")
        share.into[position] ^= 1
    share.check("by hand")


@processes(2)
def test_a_wire_that_does_not_work_here_is_named_and_the_others_are_measured(rank: Rank) -> None:
    hide_nixl()
    said: list[Said] = []
    small = TransferSpec(2, 2, 3, expert_bytes=5_000, num_rounds=1)
    group = rank.make_group()
    measure_transfers(small, group, said.append)
    if rank.rank == 0:
        left_out, on_gpus, measured, by_group = said
        assert isinstance(left_out, LeftOut)
        assert isinstance(on_gpus, LeftOut)
        assert isinstance(by_group, LeftOut)
        assert [on_gpus.backend, by_group.backend] == ["pynccl", "torch_nccl"]
        assert left_out.backend == "nixl"
        assert "ranks 0, 1 cannot import: pip install 'equipoise[nixl]'" in left_out.reason
        assert isinstance(measured, Measured)
        assert measured.backend == "torch_gloo"
    else:
        assert said == []
    asked = TransferSpec(2, 2, 3, expert_bytes=5_000, backends=("nixl",))
    with pytest.raises(CommunicatorUnavailable, match="cannot import"):
        measure_transfers(asked, group, said.append)


def test_a_wire_between_gpus_is_refused_on_the_cpu() -> None:
    with pytest.raises(JobFailed, match="pynccl moves weights between GPUs"):
        run_command("--backend", "pynccl", "--ranks", "2", "--device", "cpu")


@pytest.mark.parametrize(
    ("words", "error", "complaint"),
    [
        ("--ranks 1", ConfigError, "--ranks must be at least 2, got 1"),
        ("--device cpu --kind deal", ConfigError, "--kind is for GPUs: on the CPU every slot gets"),
        ("--layers 0", ConfigError, "--layers must be at least 1, got 0"),
        ("--slots -3", ConfigError, "--slots must be at least 1, got -3"),
        ("--expert-bytes 0", ConfigError, "--expert-bytes must be at least 1, got 0"),
        ("--rounds 0", ConfigError, "--rounds must be at least 1, got 0"),
        ("--seed -1", ConfigError, "--seed must be at least 0, got -1"),
        ("--timeout 0", ConfigError, "--timeout must be a number above 0, got 0.0"),
        ("--timeout nan", ConfigError, "--timeout must be a number above 0, got nan"),
        ("--backend nixel", ConfigError, "unknown communicator 'nixel': did you mean 'nixl'?"),
        ("--backend auto", ConfigError, "--backend auto is no wire of its own"),
        ("--expert-bytes 90000000000", ConfigError, "ranks of 7200.0 GB of experts may take"),
        ("--json /nowhere/at/all.json", ConfigError, "--json"),
    ],
)
def test_what_cannot_be_is_refused_before_any_rank_starts(
    words: str, error: type[EquipoiseError], complaint: str
) -> None:
    with pytest.raises(error) as caught:
        run_command(*words.split())
    assert complaint in str(caught.value)


@pytest.mark.parametrize("users", [None, "0"])
def test_ranks_have_huge_pages_unless_the_user_says_otherwise(users: str | None) -> None:
    code = "import os; from equipoise.launch.local import preload_ranks; preload_ranks()"
    environment = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}
    if users is not None:
        environment["THP_MEM_ALLOC_ENABLE"] = users
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print(os.environ['THP_MEM_ALLOC_ENABLE'])"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert (done.stdout, done.stderr) == (f"{users or 1}\n", "")


def test_a_plan_that_moves_nothing_is_refused() -> None:
    seeds = (seed for seed in range(100) if not count_moves(TransferSpec(2, 1, 1, seed=seed)))
    seed = next(seeds)
    with pytest.raises(ConfigError, match=f"with --seed {seed} no expert changes its rank"):
        compare_transfers(TransferSpec(2, 1, 1, seed=seed))
