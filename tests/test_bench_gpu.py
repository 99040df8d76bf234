"""The cases of wires between GPUs, as far as a CPU can tell, and the rows that come of figures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from equipoise.bench import gpu
from equipoise.bench.gpu_case import DEFAULT_CASES, GpuCase, GpuWeights, Kind, count_received
from equipoise.bench.gpu_rank import GpuSaid, GpuSpec, LimitFound, WireLeftOut, WireMeasured
from equipoise.errors import ConfigError, TransferError
from equipoise.plan.transfer_plan import make_plan


def make_case(kind: Kind) -> GpuCase:
    return GpuCase("small", 3, 8, (64, 32), kind)


@pytest.mark.parametrize("kind", ["swap", "deal", "fill"])
def test_about_half_of_what_a_rank_holds_comes_from_another(kind: Kind) -> None:
    case = make_case(kind)
    old, new = case.make_placements(2, 0)
    plan = make_plan(old, new)
    for rank in range(2):
        assert 0.3 <= count_received(plan, rank) / (3 * 8) <= 0.7
    if kind == "swap":
        assert not plan.is_local.any()
        kept = (old.slot_to_expert == new.slot_to_expert).mean(axis=1)
        assert kept.tolist() == [0.5] * 3
    if kind == "fill":
        assert (old.slot_to_expert[new.slot_to_expert != old.slot_to_expert] == -1).all()


def test_a_wrong_word_is_named() -> None:
    case = make_case("swap")
    old, _ = case.make_placements(2, 0)
    weights = GpuWeights(case, old, 1, torch.device("cpu"))
    weights.check(old, "nixl")
    every = torch.cat([t.view(torch.int64).reshape(-1) for layer in weights.tensors for t in layer])
    assert len(np.unique(every.numpy())) == every.numel()
    weights.tensors[2][1][5, 31] ^= 1
    with pytest.raises(TransferError, match="rank 1, nixl: layer 2, slot 5 does not hold expert"):
        weights.check(old, "nixl")


@pytest.mark.parametrize(("slots", "sizes"), [(1, (64, 32)), (8, (64, 12)), (8, (0, 8))])
def test_cases_that_cannot_be_are_refused(slots: int, sizes: tuple[int, int]) -> None:
    with pytest.raises(ConfigError, match=r"a case needs|multiple of 8 bytes"):
        GpuCase("bad", 3, slots, sizes)


def test_rows_carry_goals_and_whether_they_are_met(monkeypatch: pytest.MonkeyPatch) -> None:
    swap, fill = DEFAULT_CASES[0], DEFAULT_CASES[2]
    said: list[GpuSaid] = [
        LimitFound(swap.name, "one READ in place", None, 1000, 1.0),
        LimitFound(swap.name, "bare READs of the same chunks", "as is free", 1000, 1.25),
        LimitFound(swap.name, "bare READs of the same chunks", "one buffer", 1000, 2.0),
        LimitFound(fill.name, "one READ in place", None, 1000, 1.0),
        WireMeasured(swap.name, "nixl", "as is free", 1000, 1.35, 7, 5, 4),
        WireMeasured(swap.name, "nixl", "one buffer", 1000, 4.0, 7, 5, 9),
        WireMeasured(swap.name, "torch_gloo", "as is free", 1000, 12.0, 7, 5, 4),
        WireMeasured(fill.name, "nixl", "as is free", 1000, 1.2, 7, 5, 4),
        WireLeftOut("pynccl", "it is not there"),
    ]

    def run(spec: GpuSpec, seats: object, hear: object, job: str) -> None:
        del spec, seats, job
        for each in said:
            hear(each)  # type: ignore[operator]

    monkeypatch.setattr(gpu, "run_local", run)
    monkeypatch.setattr(gpu, "assign_local_seats", lambda *_: ())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "none")
    outcome = gpu.compare_on_gpus(GpuSpec(DEFAULT_CASES, ("nixl",)))
    rows = [row for row in outcome.rows if "goal" in row and row["backend"] != "processor alone"]
    found = [(row["case"], row.get("limit"), row["goal"], row["met"]) for row in rows]
    assert found == [
        (swap.name, "bare READs of the same chunks", 0.9, True),
        (swap.name, "one READ in place", 0.65, True),
        (swap.name, "bare READs of the same chunks", 0.54, False),
        (swap.name, "one READ in place", 0.39, False),
        (swap.name, None, 4.5, False),
        (fill.name, "one READ in place", 0.9, False),
        (swap.name, "torch_gloo", 10.0, False),
    ]
    assert outcome.notes[0] == "pynccl does not work here: it is not there"
