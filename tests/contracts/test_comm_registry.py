"""A communicator is the one that was asked for."""

from __future__ import annotations

import logging
import subprocess
import sys

import pytest
import torch
import torch.distributed as dist

from equipoise.comm import create_eplb_communicator, list_communicators
from equipoise.errors import ConfigError
from tests.contracts.communicators import BACKENDS
from tests.ranks import Rank, processes


def test_every_registered_wire_is_held_to_the_contract() -> None:
    assert set(list_communicators()) == set(BACKENDS) - {"memory"}


@processes(2)
def test_a_name_means_it_and_auto_says_what_it_chose(rank: Rank) -> None:
    group = rank.make_group(timeout_s=7)
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("equipoise.comm.registry")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    assert create_eplb_communicator(group, "torch_gloo", ()).name == "torch_gloo"
    assert records == []
    for backend in (None, "auto"):
        chosen = create_eplb_communicator(group, backend, ())
        assert chosen.name == "torch_gloo"
        assert records.pop().startswith("communicator auto: torch_gloo, which")
        chosen.execute()
    with pytest.raises(ConfigError, match=r"'torch_glo': did you mean 'torch_gloo'\? there are"):
        create_eplb_communicator(group, "torch_glo", ())


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
    code = "import sys, equipoise.comm; print('equipoise.comm.torch_gloo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
