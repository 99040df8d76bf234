"""The whole job on GPUs: experts move, and every token is the plain model's."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from equipoise.bundled import model_directory
from equipoise.bundled.texts import KINDS, excerpts
from equipoise.config import EPLBConfig
from equipoise.job.job import run_job
from equipoise.job.records import RebalanceRecord, ResultRecord
from equipoise.job.spec import JobSpec, Prompt
from tests.ranks import Rank, processes


def serve(rank: Rank, device_group: Literal["gloo", "nccl"]) -> None:
    prompts = tuple(Prompt(kind, text) for kind in KINDS for text in excerpts(kind, 8, 96))
    spec = JobSpec(
        model=model_directory(),
        prompts=prompts,
        held_out=prompts[::4],
        num_ranks=rank.size,
        config=EPLBConfig(window_size=4, step_interval=4, policy="deepseek"),
        device="cuda",
        max_new_tokens=12,
        max_batch_size=4,
    )
    records: list[Any] = []
    group = rank.make_group(device="cuda", device_group=device_group)
    run_job(spec, group, records.append)
    group.close()
    if rank.rank == 0:
        moves = sum(r.moves for r in records if isinstance(r, RebalanceRecord))
        assert (moves > 0) == (rank.size > 1)
        (result,) = [r for r in records if isinstance(r, ResultRecord)]
        assert result.check is not None
        assert result.check.outputs_identical, result.check
        assert result.check.num_tokens == 2 * 12 * len(prompts)
        assert result.check.max_logit_diff < 1e-3
        for loss in result.losses:
            assert loss.off == pytest.approx(loss.on, abs=1e-6)
            assert loss.plain == pytest.approx(loss.on, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("num_ranks", [1, 4])
@processes(timeout_s=58)
def test_ranks_share_gpus_over_gloo(rank: Rank, num_ranks: int) -> None:
    serve(rank, "gloo")


@pytest.mark.multi_gpu
@processes(2, timeout_s=58)
def test_a_gpu_each_over_nccl(rank: Rank) -> None:
    serve(rank, "nccl")
