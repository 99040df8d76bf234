"""A communicator is the one that was asked for."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from equipoise.comm import create_eplb_communicator, list_communicators
from equipoise.errors import CommunicatorUnavailable, ConfigError
from tests.contracts.communicators import BACKENDS
from tests.ranks import Rank, hide_nixl, processes


def test_every_registered_wire_is_held_to_the_contract() -> None:
    held = {each if isinstance(each, str) else str(each.values[0]) for each in BACKENDS}
    assert set(list_communicators()) == {name.partition(" on ")[0] for name in held} - {"memory"}


@processes(2)
def test_a_name_means_it_and_one_rank_of_a_host_says_which_and_why(rank: Rank) -> None:
    group = rank.make_group()
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.comm.registry")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    wanted = {
        "torch_gloo": ("torch_gloo", "communicator torch_gloo: as asked for"),
        "nixl": ("nixl", "communicator nixl: as asked for"),
        "auto": ("nixl", "communicator nixl: auto; every rank has NIXL"),
        None: ("nixl", "communicator nixl: auto; every rank has NIXL"),
    }
    for backend, (name, word) in wanted.items():
        chosen = create_eplb_communicator(group, backend, ())
        assert chosen.name == name
        assert chosen.needs_profile_buffer_reservation is (name != "nixl")
        assert records == ([word] if rank.rank == 0 else [])
        records.clear()
        chosen.execute()
        # What the other was told last may be lost with a wire that is closed.
        group.barrier()
        chosen.close()
    with pytest.raises(ConfigError, match=r"'torch_glo': did you mean 'torch_gloo'\? there are"):
        create_eplb_communicator(group, "torch_glo", ())


@processes(2)
def test_ranks_that_ask_for_different_wires_are_told_so(rank: Rank) -> None:
    group = rank.make_group()
    message = "rank 0 asks for communicator auto, rank 1 for torch_gloo: all ranks need the same"
    with pytest.raises(ConfigError, match=message):
        create_eplb_communicator(group, "auto" if rank.rank == 0 else "torch_gloo", ())


@processes(3)
def test_where_one_rank_has_no_nixl_auto_takes_gloo_and_nixl_is_refused_by_all(rank: Rank) -> None:
    if rank.rank == 1:
        hide_nixl()
    group = rank.make_group()
    message = r"NIXL, which rank 1 cannot import: pip install 'equipoise\[nixl\]'"
    with pytest.raises(CommunicatorUnavailable, match=message):
        create_eplb_communicator(group, "nixl", ())
    assert create_eplb_communicator(group, "auto", ()).name == "torch_gloo"


@processes(1)
def test_a_single_rank_needs_no_nixl(rank: Rank) -> None:
    assert create_eplb_communicator(rank.make_group(), "auto", ()).name == "torch_gloo"


@processes(2)
def test_groups_of_an_engine_serve_as_well(rank: Rank) -> None:
    dist.init_process_group("gloo", store=rank.store, rank=rank.rank, world_size=2)

    class Coordinator:
        cpu_group = dist.group.WORLD
        device_group = dist.group.WORLD

    communicator = create_eplb_communicator(Coordinator(), "torch_gloo", ())  # type: ignore[arg-type]
    into = torch.zeros(3)
    communicator.add_send(torch.full((3,), float(rank.rank)), 1 - rank.rank)
    communicator.add_recv(into, 1 - rank.rank)
    communicator.execute()
    assert into.tolist() == [1.0 - rank.rank] * 3


def test_wires_are_imported_on_use() -> None:
    code = "import sys, equipoise.comm; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    imported = set(done.stdout.split())
    assert imported.isdisjoint({"equipoise.comm.torch_gloo", "nixl", "nixl_cu13", "nixl_cu12"})
