"""Hosts of their own on this machine: network namespaces, each with two links that can be dropped.

One link leads to the controller and its store, the other to the other ranks.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import secrets
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal

from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.launch.processes import LocalLauncher, _LocalRank, _run
from tests.faults.storm import FaultyRank

Link = Literal["controller", "peers"]

_CLONE_NEWNET = 0x40000000
_SETNS_FOLDER = Path("/run/netns")


@cache
def find_obstacle() -> str | None:
    """Why this process cannot have network namespaces; None if it can."""
    if shutil.which("ip") is None:
        return "there is no `ip` command"
    name = f"eq{secrets.token_hex(3)}"
    tried = subprocess.run(
        ["ip", "netns", "add", name], capture_output=True, text=True, check=False
    )
    if tried.returncode:
        return f"no network namespaces: {tried.stderr.strip()}"
    done = subprocess.run(
        ["ip", "link", "add", f"{name}a", "type", "veth", "peer", "name", f"{name}b"],
        capture_output=True,
        text=True,
        check=False,
    )
    subprocess.run(["ip", "link", "del", f"{name}a"], capture_output=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=True)
    return f"no virtual links: {done.stderr.strip()}" if done.returncode else None


@dataclass
class Hosts:
    """Some hosts, and how they are linked. Use `open_hosts`.

    Attributes:
        token: sets names of this test's links apart from others'.
        network: third byte of the addresses.
    """

    token: str
    network: int

    @property
    def address(self) -> str:
        """That the controller listens on."""
        return f"10.213.{self.network}.1"

    def name(self, number: int) -> str:
        """Of a host's namespace."""
        return f"eq{self.token}h{number}"

    def set_link(self, number: int, link: Link, state: Literal["up", "down"]) -> None:
        """Have a host's link drop, so that what is sent over it is lost, or restore it."""
        _ip("link", "set", f"eq{self.token}{link[0]}{number}", state)


@contextlib.contextmanager
def open_hosts(count: int) -> Iterator[Hosts]:
    """So many hosts, linked to each other and to this one; nothing of them is left."""
    token = secrets.token_hex(2)
    hosts = Hosts(token, int(token[:2], 16))
    try:
        for link, network in (("controller", 213), ("peers", 214)):
            bridge = f"eq{token}{link[0]}"
            _ip("link", "add", bridge, "type", "bridge")
            _ip("link", "set", bridge, "up")
            if link == "controller":
                _ip("addr", "add", f"{hosts.address}/24", "dev", bridge)
            for number in range(count):
                if link == "controller":
                    _ip("netns", "add", hosts.name(number))
                    _ip("-n", hosts.name(number), "link", "set", "lo", "up")
                outer = f"{bridge}{number}"
                _ip("link", "add", outer, "type", "veth", "peer", "name", f"{outer}x")
                _ip("link", "set", f"{outer}x", "netns", hosts.name(number), "name", link[:8])
                _ip("link", "set", outer, "master", bridge, "up")
                own = f"10.{network}.{hosts.network}.{number + 10}/24"
                _ip("-n", hosts.name(number), "addr", "add", own, "dev", link[:8])
                _ip("-n", hosts.name(number), "link", "set", link[:8], "up")
        yield hosts
    finally:
        for number in range(count):
            subprocess.run(["ip", "netns", "del", hosts.name(number)], check=False)
        for link in ("c", "p"):
            subprocess.run(["ip", "link", "del", f"eq{token}{link}"], check=False)


class HostLauncher(LocalLauncher):
    """Starts rank-N on host N; what cannot be reached there is not ended either."""

    def __init__(self, hosts: Hosts, model: Path) -> None:
        super().__init__("cpu", model)
        self._hosts = hosts
        self.ranks: dict[str, FaultyRank] = {}

    def start(self, seat: RankSeat) -> RankHandle:
        number = int(seat.name.rpartition("-")[2])
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_on, args=(self._hosts.name(number), seat), daemon=True
        )
        process.start()
        self._processes.append(process)
        self.ranks[seat.name] = FaultyRank(_LocalRank(process), None)
        return self.ranks[seat.name]


def _run_on(host: str, seat: RankSeat) -> None:
    """Be a rank on that host."""
    folder = os.open(_SETNS_FOLDER / host, os.O_RDONLY)
    if ctypes.CDLL(None, use_errno=True).setns(folder, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"{host} cannot be entered")
    os.environ["GLOO_SOCKET_IFNAME"] = "peers"
    _run(seat)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)
