"""What chunks need is there when it is asked for, and a few chunks ahead."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from equipoise.transfer.chunk_list import ChunkList
from equipoise.transfer.mover import ChunkMover


class Recorded:
    """A mover, and its communicator, that write down which chunks each step was for."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, list[Any]]] = []
        self.communicator = SimpleNamespace(foresee=lambda some: self._note("list", some))

    def find_moves(self, share: int, buffer: torch.Tensor) -> tuple[int, int]:
        return share, int(buffer)

    def prepare_many(self, shares: list[int], buffers: list[torch.Tensor]) -> list[tuple[int, int]]:
        made = list(zip(shares, map(int, buffers), strict=True))
        self._note("prepare", made)
        return made

    def _note(self, step: str, some: Sequence[Any]) -> None:
        self.steps.append((step, list(some)))


def make_list(mover: Recorded, num_chunks: int, num_buffers: int = 3) -> ChunkList:
    buffers = [torch.tensor(number) for number in range(num_buffers)]
    return ChunkList(cast(ChunkMover, mover), cast(Any, lambda number: number), buffers, num_chunks)


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 8, 40])
@pytest.mark.parametrize("looks", [0, 1, 5])
def test_each_chunk_gets_its_own(num_chunks: int, looks: int) -> None:
    mover = Recorded()
    listed = make_list(mover, num_chunks)
    for number in range(num_chunks):
        assert cast(object, listed.take_moves(number)) == (number, number % 3)
        copies, part = listed.take_copies(number)
        assert copies[part] == (number, number % 3)  # type: ignore[index]
        for _ in range(looks):
            listed.look_ahead()
    for step in ("list", "prepare"):
        done = [chunk for name, some in mover.steps if name == step for chunk in some]
        assert done == [(number, number % 3) for number in range(num_chunks)]


@pytest.mark.parametrize(
    ("num_buffers", "expected"), [(1, [1, 2, *[4] * 9, 1]), (2, [1, 2, 4, 8, 8, 8, 8, 1])]
)
def test_the_first_chunk_is_listed_alone_and_then_ever_more_at_once(
    num_buffers: int, expected: list[int]
) -> None:
    mover = Recorded()
    listed = make_list(mover, 40, num_buffers)
    listed.take_moves(0)
    assert mover.steps == [("list", [(0, 0)])]
    for number in range(1, 40):
        listed.take_moves(number)
        listed.take_copies(number - 1)
    sizes = [len(some) for name, some in mover.steps if name == "list"]
    assert sizes == expected


def test_a_look_ahead_is_one_step_and_stops_where_enough_is_ready() -> None:
    mover = Recorded()
    listed = make_list(mover, 100, 1)
    before = 0
    for _ in range(50):
        listed.look_ahead()
        assert len(mover.steps) <= before + 1
        before = len(mover.steps)
    # Memory is held for what is ready.
    assert sum(len(some) for name, some in mover.steps if name == "list") == 7
