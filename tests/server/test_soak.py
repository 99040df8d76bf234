"""Ranks come, go and die under load for as long as is asked for, and nothing grows."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from equipoise.server.client import ServerClient, ServerRefused
from tests.server.load import Load
from tests.server.ray_cluster import ray_cluster
from tests.server.serving import wait_until
from tests.server.test_completions import MAX_TOKENS, plain
from tests.server.test_serve import serve

__all__ = ["plain"]

SOAK_S = float(os.environ.get("SERVER_SOAK", "0"))
SIZES = (4, 3, 5, 2)
PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")
MOST_GROWTH_BYTES = 32 << 20


class Held(NamedTuple):
    """What a process holds."""

    num_bytes: int
    descriptors: int
    threads: int


def measure(pid: int) -> Held:
    process = Path(f"/proc/{pid}")
    pages = int((process / "statm").read_text().split()[1])
    threads = len(list((process / "task").iterdir()))
    return Held(pages * PAGE_BYTES, len(list((process / "fd").iterdir())), threads)


@pytest.mark.slow
@pytest.mark.skipif(not SOAK_S, reason="SERVER_SOAK says for how many seconds")
@pytest.mark.timeout(SOAK_S + 600)
@pytest.mark.parametrize("launcher", ["local", "ray"])
def test_nothing_fails_and_nothing_grows(
    tmp_path: Path, plain: dict[str, str], launcher: str
) -> None:
    with starting(launcher) as words:
        _soak(tmp_path, plain, words)


@contextlib.contextmanager
def starting(launcher: str) -> Iterator[tuple[str, ...]]:
    """Options for ranks of this machine, or of a cluster's nodes."""
    if launcher == "local":
        yield ()
        return
    if not os.environ.get("SERVER_RAY"):
        pytest.skip("SERVER_RAY asks for it, and needs Ray")
    with ray_cluster(num_nodes=3, num_cpus=2) as (cluster, _):
        yield ("--launcher=ray", f"--ray-address={cluster.address}")


def _soak(tmp_path: Path, plain: dict[str, str], words: tuple[str, ...]) -> None:
    draw = random.Random(7)
    with serve(tmp_path, "--ranks=2", "--step-interval=32", *words) as (process, url):
        client = ServerClient(url, {})
        held: list[Held] = []
        ends_s = time.monotonic() + SOAK_S
        with Load(url, plain, MAX_TOKENS, num_clients=4) as load:
            while time.monotonic() < ends_s or len(held) < 4:
                for size in SIZES:
                    assert client.scale(to=size)["done"]
                    load.wait_for_more(1)
                client.rebalance()
                load.wait_for_more(1)
                _kill_one(client, draw)
                load.wait_for_more(1)
                assert client.scale(to=2)["done"]
                load.wait_for_more(1)
                assert load.wrong == []
                held.append(measure(process.pid))
        status = client.status()
        process.send_signal(signal.SIGTERM)
        assert process.wait(120) == 0
    print(load.num_right, status["totals"], held)
    assert status["totals"]["failed"] == 0
    # By the least of each half: connections of ranks that were killed take a while to go.
    half = len(held) // 2
    first, last = _find_least(held[:half]), _find_least(held[half:])
    assert last.num_bytes - first.num_bytes < MOST_GROWTH_BYTES
    assert last.descriptors - first.descriptors <= 4
    assert last.threads - first.threads <= 4


def _find_least(held: list[Held]) -> Held:
    return Held(*(min(values) for values in zip(*held, strict=True)))


def _kill_one(client: ServerClient, draw: random.Random) -> None:
    def serving() -> list[dict[str, Any]]:
        try:
            ranks = client.status()["ranks"]
        except ServerRefused:
            return []
        return [rank for rank in ranks if rank["state"] == "serving"]

    recoveries = client.status()["totals"]["recoveries"]
    os.kill(draw.choice(serving())["pid"], signal.SIGKILL)
    wait_until(lambda: client.status()["totals"]["recoveries"] == recoveries + 1)
