"""The table of docs/communicators.md, cell by cell."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.comm import create_eplb_communicator, list_communicators, registry
from equipoise.comm.base import GroupCoordinator
from equipoise.comm.choice import Greeting, choose
from equipoise.comm.groups import create_rank_group
from equipoise.comm.memory import MemoryEplbCommunicator
from equipoise.errors import CommunicatorUnavailable, ConfigError, EquipoiseError
from tests.ranks import Rank, hide_nixl, processes

NO_NIXL = (
    "the communicator nixl needs NIXL, which ranks 0, 1 cannot import: "
    r"pip install 'equipoise\[nixl\]'"
)
THERE_ARE = "there are auto, nixl, pynccl, torch_gloo, torch_nccl"
UNKNOWN = f"unknown communicator 'memory': {THERE_ARE}"
ON_CPU = (
    "moves weights between GPUs, and those of ranks 0, 1 are on the CPU: take nixl or torch_gloo"
)
SHARED = "needs a GPU for each rank, as NCCL does, and ranks 0, 1 share one: take nixl or torch"
NO_GROUP = "needs a device_group with NCCL, which ranks 0, 1 do not have: take pynccl, which makes"
BESIDE = (
    "cannot work in the background while tokens travel over NCCL, whose operations of two "
    "threads may wait for each other forever: take nixl, or balance in the foreground"
)

Verdict = tuple[str, str] | tuple[type[EquipoiseError], str]

# Asked for, whether NIXL is installed -> what it is and why, or the error.
EVERYWHERE: dict[tuple[str | None, bool], Verdict] = {
    (None, True): ("nixl", "auto; every rank has NIXL"),
    ("auto", True): ("nixl", "auto; every rank has NIXL"),
    ("nixl", True): ("nixl", "as asked for"),
    ("nixl", False): (CommunicatorUnavailable, NO_NIXL),
    ("torch_gloo", True): ("torch_gloo", "as asked for"),
    ("torch_gloo", False): ("torch_gloo", "as asked for"),
    ("memory", True): (ConfigError, UNKNOWN),
}
WITHOUT = "auto; ranks 0, 1 cannot import NIXL"


def refuse(name: str, reason: str) -> Verdict:
    return CommunicatorUnavailable, f"the communicator {name} {reason}"


def without_nccl(reason: str) -> dict[tuple[str | None, bool], Verdict]:
    return {
        (None, False): ("torch_gloo", WITHOUT),
        ("auto", False): ("torch_gloo", WITHOUT),
        ("torch_nccl", True): refuse("torch_nccl", reason),
        ("pynccl", True): refuse("pynccl", reason),
    }


AS_ASKED = ("pynccl", "as asked for")
# Of each kind of seat.
CELLS = {
    "CPU": EVERYWHERE | without_nccl(ON_CPU),
    "a GPU for two ranks": EVERYWHERE | without_nccl(SHARED),
    "a GPU each, tokens by gloo": EVERYWHERE
    | {
        (None, False): ("pynccl", WITHOUT),
        ("auto", False): ("pynccl", WITHOUT),
        ("torch_nccl", True): refuse("torch_nccl", NO_GROUP),
        ("pynccl", True): AS_ASKED,
    },
    "a GPU each, tokens by NCCL": EVERYWHERE
    | {
        (None, False): ("torch_nccl", WITHOUT),
        ("auto", False): ("torch_nccl", WITHOUT),
        ("torch_nccl", True): ("torch_nccl", "as asked for"),
        ("pynccl", True): AS_ASKED,
    },
    "a GPU each, in the background, tokens by NCCL": EVERYWHERE | without_nccl(BESIDE),
}
ROWS = [(seat, *cell) for seat, cells in CELLS.items() for cell in cells]


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


def check_cell(
    rank: Rank, coordinator: Any, backend: str | None, with_nixl: bool, verdict: Verdict
) -> None:
    if not with_nixl:
        hide_nixl()
    lines = listen()
    expected, word = verdict
    device = getattr(coordinator, "device", torch.device("cpu"))
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
    # What the other was told last may be lost with a wire that is closed.
    wait_for_both(rank, "swapped")
    communicator.close()


def wait_for_both(rank: Rank, word: str = "over") -> None:
    """A rank that is refused shall not end, nor let its group go, while the other makes its own."""
    rank.store.set(f"{word}/{rank.rank}", "yes")
    rank.store.wait([f"{word}/0", f"{word}/1"], timedelta(seconds=20))


@pytest.mark.parametrize("kind", ["world", "subgroup", "store", "workers"])
@pytest.mark.parametrize("cell", CELLS["CPU"])
@processes(2)
def test_cpu(rank: Rank, cell: tuple[str | None, bool], kind: str) -> None:
    check_cell(rank, make_coordinator(rank, kind), *cell, CELLS["CPU"][cell])
    wait_for_both(rank)


@pytest.mark.gpu
@pytest.mark.parametrize("cell", CELLS["a GPU for two ranks"])
@processes(2)
def test_a_shared_gpu(rank: Rank, cell: tuple[str | None, bool]) -> None:
    torch.cuda.set_device(0)
    group = create_rank_group(
        rank.store,
        rank.rank,
        2,
        torch.device("cuda", 0),
        timeout=timedelta(seconds=20),
        device_group="gloo",
    )
    check_cell(rank, group, *cell, CELLS["a GPU for two ranks"][cell])
    wait_for_both(rank)


@pytest.mark.multi_gpu
@pytest.mark.parametrize(
    ("seat", "backend", "with_nixl"), [row for row in ROWS if row[0].startswith("a GPU each")]
)
@processes(2)
def test_a_gpu_each(rank: Rank, seat: str, backend: str | None, with_nixl: bool) -> None:
    group = rank.make_group(device="cuda", device_group="nccl" if "NCCL" in seat else "gloo")
    if "background" in seat:
        group = group.fork("balancer")
    check_cell(rank, group, backend, with_nixl, CELLS[seat][backend, with_nixl])
    wait_for_both(rank)


def test_the_documented_table_is_this_one() -> None:
    text = (Path(__file__).parents[2] / "docs" / "communicators.md").read_text()
    seats = tuple(f"| {seat} |" for seat in CELLS)
    documented = [line for line in text.splitlines() if line.startswith(seats)]
    rows = []
    for seat, cells in CELLS.items():
        for (backend, with_nixl), (expected, word) in cells.items():
            name = expected if isinstance(expected, str) else expected.__name__
            said = word.replace("\\", "").partition(": ")[0]
            has = "yes" if with_nixl else "no"
            rows.append(f"| {seat} | `{backend}` | {has} | `{name}` | {said} |")
    assert documented == rows


SEAT = Greeting("auto", True, True, True, False, b"host", b"gpu", 4)


@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({}, ("nixl", "auto; every rank has NIXL; nccl_max_ctas has no say there")),
        # The engine's own group would not keep to the bound.
        ({"has_nixl": False}, ("pynccl", WITHOUT)),
        ({"has_nixl": False, "max_ctas": 0}, ("torch_nccl", WITHOUT)),
        (
            {"has_nixl": False, "has_nccl4py": False},
            ("torch_gloo", f"{WITHOUT}; nccl_max_ctas has no say there"),
        ),
    ],
)
def test_a_bound_on_thread_blocks_has_a_say_in_what_auto_takes(
    change: dict[str, Any], verdict: tuple[str, str]
) -> None:
    seats = [replace(SEAT, gpu=bytes([number]) * 8, **change) for number in (1, 2)]
    assert choose(seats) == verdict
    assert [Greeting.from_tensor(seat.to_tensor()).max_ctas for seat in seats] == [
        seat.max_ctas for seat in seats
    ]


def test_ranks_ask_for_the_same_number_of_thread_blocks() -> None:
    with pytest.raises(ConfigError, match=r"rank 0 asks for 4 thread blocks.*rank 1 for 8"):
        choose([SEAT, replace(SEAT, max_ctas=8)])


@pytest.mark.parametrize(
    ("backend", "word"),
    [
        ("torch_nccl", "works on the engine's own NCCL group: take pynccl, or set NCCL_MAX_CTAS"),
        ("nixl", "nccl_max_ctas is an option of pynccl, and nixl is asked for"),
        ("torch_gloo", "nccl_max_ctas is an option of pynccl, and torch_gloo is asked for"),
    ],
)
@processes(1)
def test_who_cannot_keep_a_bound_on_thread_blocks_refuses_it(
    rank: Rank, backend: str, word: str
) -> None:
    with pytest.raises(ConfigError, match=word):
        create_eplb_communicator(rank.make_group(), backend, (), nccl_max_ctas=4)


@pytest.mark.multi_gpu
@processes(2)
def test_pynccl_keeps_its_bound_on_thread_blocks(rank: Rank) -> None:
    group = rank.make_group(device="cuda")
    weights = [[torch.zeros(2, 3, device=group.device)]]
    communicator = create_eplb_communicator(group, "pynccl", weights, nccl_max_ctas=2)
    sent = torch.full((1 << 24,), rank.rank, dtype=torch.uint8, device=group.device)
    into = torch.empty_like(sent)
    communicator.add_send(sent, 1 - rank.rank)
    communicator.add_recv(into, 1 - rank.rank)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        communicator.execute()
        torch.cuda.synchronize()
    assert bool((into == 1 - rank.rank).all())
    trace = rank.path / f"trace{rank.rank}.json"
    profile.export_chrome_trace(str(trace))
    grids = [
        event["args"]["grid"][0]
        for event in json.loads(trace.read_text())["traceEvents"]
        if event["name"].startswith("ncclDevKernel")
    ]
    assert grids
    assert max(grids) <= 2
    communicator.close()
    wait_for_both(rank)


class Borrowed(MemoryEplbCommunicator):
    """A wire of another package."""

    name = "borrowed"

    def __init__(self, coordinator: GroupCoordinator, *_: object) -> None:
        self.seat = coordinator.cpu_group.rank(), coordinator.cpu_group.size()


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
        text=f"{here}:WITHOUT",
        torch_gloo=f"{here}:Borrowed",
    )
    names = ("borrowed", "lost", "nixl", "pynccl", "text", "torch_gloo", "torch_nccl")
    assert list_communicators() == names
    group = rank.make_group()
    made = create_eplb_communicator(group, "borrowed", ())
    assert isinstance(made, Borrowed)
    assert made.seat == (rank.rank, 2)
    with pytest.raises(CommunicatorUnavailable, match=rf"'lost' cannot be loaded from {here}"):
        create_eplb_communicator(group, "lost", ())
    with pytest.raises(ConfigError, match="WITHOUT is not a subclass of EplbCommunicator"):
        create_eplb_communicator(group, "text", ())
    # Ours keep their names.
    assert not isinstance(create_eplb_communicator(group, "torch_gloo", ()), Borrowed)
