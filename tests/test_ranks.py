"""The test ranks themselves: what goes wrong in one is told by its number."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from tests.ranks import Rank, processes, run_ranks


@processes(3)
def test_every_rank_runs_the_body(rank: Rank) -> None:
    (rank.path / f"rank-{rank.rank}").write_text(str(rank.size))
    rank.store.set(f"here/{rank.rank}", "yes")
    rank.store.wait([f"here/{other}" for other in range(rank.size)])
    assert {p.name for p in rank.path.glob("rank-*")} == {"rank-0", "rank-1", "rank-2"}


@pytest.mark.parametrize("num_ranks", [1, 2])
@processes()
def test_size_comes_from_the_parameter(rank: Rank, num_ranks: int) -> None:
    assert rank.size == num_ranks


def fail_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        raise RuntimeError("rank one has had enough")


def die_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hang_on_one(rank: Rank) -> None:
    if rank.rank == 1:
        signal.pause()


def test_a_raising_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match=r"rank 1 raised:[\s\S]*had enough"):
        run_ranks(fail_on_one, 2, tmp_path, {})


def test_a_dead_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 died: exit code -9"):
        run_ranks(die_on_one, 2, tmp_path, {})


def test_a_hung_rank_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 1 still running"):
        run_ranks(hang_on_one, 2, tmp_path, {}, timeout_s=10.0)


def test_a_rank_that_should_die_and_does_not_is_named(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="rank 0 was expected to die, and finished"):
        run_ranks(fail_on_one, 1, tmp_path, {}, frozenset({0}))
