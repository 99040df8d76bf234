"""The table of docs/communicators.md, cell by cell."""

from __future__ import annotations

import logging
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.comm import create_eplb_communicator, list_communicators, registry
from equipoise.comm.memory import MemoryEplbCommunicator
from equipoise.errors import CommunicatorUnavailable, ConfigError, EquipoiseError
from tests.ranks import Rank, processes

NO_NIXL = (
    "the communicator nixl needs NIXL, which ranks 0, 1 cannot import: "
    r"pip install 'equipoise\[nixl\]'"
)
NOT_YET = "is not in this version: there are auto, nixl, torch_gloo"
UNKNOWN = "unknown communicator 'memory': there are auto, nixl, torch_gloo"

# Asked for, whether NIXL is installed -> what it is and why, or the error.
CELLS: dict[tuple[str | None, bool], tuple[str, str] | tuple[type[EquipoiseError], str]] = {
    (None, True): ("nixl", "auto; every rank has NIXL"),
    (None, False): ("torch_gloo", "auto; ranks 0, 1 cannot import NIXL"),
    ("auto", True): ("nixl", "auto; every rank has NIXL"),
    ("auto", False): ("torch_gloo", "auto; ranks 0, 1 cannot import NIXL"),
    ("nixl", True): ("nixl", "as asked for"),
    ("nixl", False): (CommunicatorUnavailable, NO_NIXL),
    ("torch_gloo", True): ("torch_gloo", "as asked for"),
    ("torch_gloo", False): ("torch_gloo", "as asked for"),
    ("torch_nccl", True): (CommunicatorUnavailable, f"communicator 'torch_nccl' {NOT_YET}"),
    ("pynccl", True): (CommunicatorUnavailable, f"communicator 'pynccl' {NOT_YET}"),
    ("memory", True): (ConfigError, UNKNOWN),
}


class Coordinator:
    """Whatever an engine calls it."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.cpu_group = self.device_group = group


def make_coordinator(rank: Rank, kind: str) -> Any:
    if kind == "store":
        return rank.make_group()
    if kind == "workers":
        return rank.make_group().fork("balancer")
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=rank.size)
    group = dist.group.WORLD if kind == "world" else dist.new_group([0, 1])
    assert group is not None
    return Coordinator(group)


def listen() -> list[str]:
    """What the registry logs from now on."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.comm.registry")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    return lines


def hide_nixl() -> None:
    for name in ("nixl", "nixl_cu13", "nixl_cu12", "rixl"):
        sys.modules[name] = None  # type: ignore[assignment]


def check_cell(rank: Rank, coordinator: Any, cell: tuple[str | None, bool], device: str) -> None:
    backend, with_nixl = cell
    if not with_nixl:
        hide_nixl()
    lines = listen()
    expected, word = CELLS[cell]
    weights = [[torch.zeros(2, 3, device=device)]]
    if not isinstance(expected, str):
        with pytest.raises(expected, match=word):
            create_eplb_communicator(coordinator, backend, weights)
        assert lines == []
        return
    communicator = create_eplb_communicator(coordinator, backend, weights)
    assert (communicator.name, communicator.reason) == (expected, word)
    assert lines == ([f"communicator {expected}: {word}"] if rank.rank == 0 else [])
    into = torch.zeros(3, device=device)
    communicator.add_send(torch.full((3,), float(rank.rank), device=device), 1 - rank.rank)
    communicator.add_recv(into, 1 - rank.rank)
    communicator.execute()
    assert into.tolist() == [1.0 - rank.rank] * 3
    communicator.close()


@pytest.mark.parametrize("kind", ["world", "subgroup", "store", "workers"])
@pytest.mark.parametrize("cell", CELLS)
@processes(2)
def test_cpu(rank: Rank, cell: tuple[str | None, bool], kind: str) -> None:
    coordinator = make_coordinator(rank, kind)
    check_cell(rank, coordinator, cell, "cpu")
    # A rank that is refused at once shall not end, nor let its group go, while the other still
    # makes its own.
    rank.store.set(f"over/{rank.rank}", "yes")
    rank.store.wait(["over/0", "over/1"], timedelta(seconds=20))


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS)
@processes(2)
def test_cuda(rank: Rank, cell: tuple[str | None, bool]) -> None:
    group = rank.make_group(device="cuda")
    check_cell(rank, group, cell, str(group.device))


@pytest.mark.parametrize("device", ["CPU", "CUDA"])
def test_the_documented_table_is_this_one(device: str) -> None:
    text = (Path(__file__).parents[2] / "docs" / "communicators.md").read_text()
    documented = [line for line in text.splitlines() if line.startswith(f"| {device} |")]
    rows = []
    for (backend, with_nixl), (expected, word) in CELLS.items():
        name = expected if isinstance(expected, str) else expected.__name__
        said = word.replace("\\", "").partition(": ")[0]
        has = "yes" if with_nixl else "no"
        rows.append(f"| {device} | any | `{backend}` | {has} | `{name}` | {said} |")
    assert documented == rows


class Borrowed(MemoryEplbCommunicator):
    """A wire of another package."""

    name = "borrowed"

    def __init__(self, group: dist.ProcessGroup, *_: object) -> None:
        self.seat = group.rank(), group.size()


def install_package(folder: Path, **values: str) -> None:
    """Have a package in this process's path that brings these entry points."""
    records = folder / "plug-1.0.dist-info"
    records.mkdir(parents=True)
    (records / "METADATA").write_text("Metadata-Version: 2.1\nName: plug\nVersion: 1.0\n")
    lines = [f"[{registry.GROUP}]", *(f"{name} = {value}" for name, value in values.items())]
    (records / "entry_points.txt").write_text("\n".join(lines))
    sys.path.insert(0, str(folder))


@processes(2)
def test_packages_bring_their_own(rank: Rank) -> None:
    here = Borrowed.__module__
    install_package(
        rank.path / str(rank.rank),
        borrowed=f"{here}:Borrowed",
        lost=f"{here}:Lost",
        text=f"{here}:NOT_YET",
        torch_gloo=f"{here}:Borrowed",
    )
    assert list_communicators() == ("borrowed", "lost", "nixl", "text", "torch_gloo")
    group = rank.make_group()
    made = create_eplb_communicator(group, "borrowed", ())
    assert isinstance(made, Borrowed)
    assert made.seat == (rank.rank, 2)
    with pytest.raises(CommunicatorUnavailable, match=rf"'lost' cannot be loaded from {here}"):
        create_eplb_communicator(group, "lost", ())
    with pytest.raises(ConfigError, match="NOT_YET is not a subclass of EplbCommunicator"):
        create_eplb_communicator(group, "text", ())
    # Ours keep their names.
    assert not isinstance(create_eplb_communicator(group, "torch_gloo", ()), Borrowed)
