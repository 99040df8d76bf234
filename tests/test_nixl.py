"""The wire nixl beyond the contract of all wires."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from equipoise.comm import has_nixl
from equipoise.comm.announcement import Announcement, Sizes
from equipoise.comm.base import ExpertMoves
from equipoise.comm.nixl import NixlEplbCommunicator
from equipoise.comm.nixl.agent import Agent, Read
from equipoise.comm.nixl.messages import Done, Failed, Message, Offer, Ping, decode, encode
from equipoise.comm.nixl.pool import SendPool, plan_offers
from equipoise.comm.parcels import ExpertRows, WholeTensor
from equipoise.comm.spans import Regions, Spans, align, span_of
from equipoise.comm.weight_table import WeightTable
from equipoise.errors import TransferError
from tests.ranks import Rank, processes

CPU = torch.device("cpu")


def noise(num_bytes: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num_bytes,), dtype=torch.uint8, generator=generator)


def addresses(spans: Spans) -> list[int]:
    """Every byte's address, in order."""
    runs = zip(spans.address.tolist(), spans.num_bytes.tolist(), strict=True)
    return [a + k for a, n in runs for k in range(n)]


SIZES = st.lists(st.integers(1, 9), min_size=1, max_size=12)


@given(SIZES, SIZES)
def test_aligned_spans_are_the_same_bytes_cut_alike(first: list[int], second: list[int]) -> None:
    more, less = (first, second) if sum(first) > sum(second) else (second, first)
    if sum(more) > sum(less):
        less = [*less, sum(more) - sum(less)]
    one = Spans.of((100 * k, n) for k, n in enumerate(more))
    other = Spans.of((7000 - 100 * k, n) for k, n in enumerate(less))
    cut_one, cut_other = align(one, other)
    assert cut_one.num_bytes.tolist() == cut_other.num_bytes.tolist()
    assert addresses(cut_one) == addresses(one)
    assert addresses(cut_other) == addresses(other)


@given(SIZES, st.data())
def test_a_part_of_spans_is_that_part_of_their_bytes(sizes: list[int], data: st.DataObject) -> None:
    spans = Spans.of((50 * k, n) for k, n in enumerate(sizes))
    start = data.draw(st.integers(0, sum(sizes) - 1))
    stop = data.draw(st.integers(start + 1, sum(sizes)))
    assert addresses(spans.between(start, stop)) == addresses(spans)[start:stop]


def test_a_region_contains_what_lies_in_it_whole() -> None:
    regions = Regions(Spans.of([(100, 10), (50, 10), (110, 5)]))
    assert regions.contain(50, 10)
    assert regions.contain(104, 6)
    assert regions.contain(110, 5)
    for address, num_bytes in ((49, 2), (59, 2), (60, 1), (108, 4), (115, 1)):
        assert not regions.contain(address, num_bytes)


ANNOUNCEMENT = Announcement(3, Sizes.of([4, 5]), Sizes.of([]), 9)
MESSAGES: list[Message] = [
    Offer(3, 2, True, ANNOUNCEMENT, Spans.of([(1 << 46, 4), (77, 5)])),
    Offer(3, 0, False, ANNOUNCEMENT, Spans.of([])),
    Done(1 << 40, 7),
    Failed(4, "rank 1 gave up: größer"),
    Ping(9),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_arrives_as_it_was_sent_and_only_where_it_was_meant(message: Message) -> None:
    data = encode(b"8 bytes.", message)
    heard = decode(b"8 bytes.", data)
    if isinstance(message, Offer):
        assert isinstance(heard, Offer)
        assert addresses(heard.spans) == addresses(message.spans)
        heard = replace(heard, spans=message.spans)
    assert heard == message
    assert decode(b"8 others", data) is None
    assert decode(b"8 bytes.", b"short") is None


def test_offers_stage_only_what_is_not_registered_and_at_most_a_piece_each() -> None:
    weights = torch.arange(40, dtype=torch.uint8).view(5, 8)
    loose = [noise(13, 1), noise(3, 2), noise(30, 3).view(5, 6).t()]
    pool = SendPool(num_bytes=40, num_pieces=4, device=CPU)
    outgoing = [
        WholeTensor(loose[0]),
        ExpertRows.of(WeightTable([[weights]]), np.array([0, 0]), np.array([4, 0])),
        WholeTensor(loose[1]),
        WholeTensor(weights[2]),
        WholeTensor(loose[2]),
    ]
    offers = plan_offers(outgoing, Regions(Spans.of([span_of(weights)])), pool.piece_bytes)
    assert [offer.staged_bytes for offer in offers] == [10, 10, 10, 10, 6]
    got = b""
    for offer in offers:
        piece = pool.take()
        assert piece is not None
        for address, count in zip(*vars(pool.fill(piece, offer)).values(), strict=True):
            got += bytes((ctypes.c_uint8 * int(count)).from_address(int(address)))
        pool.give(piece)
    wanted = [loose[0], weights[4], weights[0], loose[1], weights[2], loose[2].contiguous()]
    assert got == b"".join(tensor.numpy().tobytes() for tensor in wanted)


def make(rank: Rank, **options: int) -> NixlEplbCommunicator:
    group = rank.make_group(generation=options.pop("generation", 0), timeout_s=20)
    return NixlEplbCommunicator(group, (), 20.0, **options)


def swap(communicator: NixlEplbCommunicator, rank: Rank, sizes: list[int], seed: int) -> bool:
    """Send the other of two ranks tensors of these bytes, and say whether its own came."""
    other = 1 - rank.rank
    landed = [torch.zeros(size, dtype=torch.uint8) for size in sizes]
    for k, (size, into) in enumerate(zip(sizes, landed, strict=True)):
        communicator.add_send(noise(size, 1000 * rank.rank + seed + k), other)
        communicator.add_recv(into, other)
    communicator.execute()
    return all(
        torch.equal(into, noise(size, 1000 * other + seed + k))
        for k, (size, into) in enumerate(zip(sizes, landed, strict=True))
    )


@processes(2)
def test_what_does_not_fit_into_the_pool_takes_turns(rank: Rank) -> None:
    communicator = make(rank, pool_bytes=8 * 64)
    assert swap(communicator, rank, [5000, 1, 64, 63, 65, 0, 777], seed=1)
    assert swap(communicator, rank, [3], seed=2)


@processes(2)
def test_every_handle_is_counted_and_none_is_left(rank: Rank) -> None:
    communicator = make(rank)
    # The agent, its peer, the registration of the pool.
    assert communicator.num_open_handles == 3
    for step in range(30):
        assert swap(communicator, rank, [10, 2000 + step], seed=step)
        assert communicator.num_open_handles == 3
    communicator.close()
    assert communicator.num_open_handles == 0


@processes(2)
def test_many_generations_leave_no_thread_and_no_file_open(rank: Rank) -> None:
    def count() -> tuple[int, int]:
        own = Path("/proc/self")
        return len(list((own / "task").iterdir())), len(list((own / "fd").iterdir()))

    group = rank.make_group(timeout_s=20)
    after_first = None
    for step in range(6):
        communicator = NixlEplbCommunicator(group, (), 20.0)
        assert swap(communicator, rank, [100], seed=step)
        communicator.close()
        group.barrier()
        after_first = after_first or count()
    assert after_first is not None
    # A socket that the other rank closes last may still be on its way out.
    assert all(now <= then + 2 for now, then in zip(count(), after_first, strict=True))


@processes(3)
def test_a_communicator_may_be_closed_as_soon_as_it_is_made(rank: Rank) -> None:
    group = rank.make_group(timeout_s=20)
    for _ in range(20):
        NixlEplbCommunicator(group, (), 20.0).close()
    group.barrier()


@processes(2)
def test_an_agent_that_is_gone_already_is_named(rank: Rank) -> None:
    if rank.rank == 1:
        gone = Agent(CPU)
        metadata = gone.describe()
        gone.close()
        describe = Agent.describe
        Agent.describe = lambda self: metadata
        with pytest.raises(TransferError):
            make(rank)
        Agent.describe = describe
    else:
        with pytest.raises(TransferError, match="rank 0 cannot connect to rank 1") as caught:
            make(rank)
        assert caught.value.peer == 1


@processes(2)
def test_weights_are_read_in_place_and_landed_in_registered_memory(rank: Rank) -> None:
    weights = [[noise(4 * 6, rank.rank).view(4, 6)], [noise(4 * 8, 2 + rank.rank).view(4, 8)]]
    group = rank.make_group(timeout_s=20)
    communicator = NixlEplbCommunicator(group, weights, 20.0)
    assert communicator._wire is not None
    pool = communicator._wire.pool.data.fill_(7)
    other = 1 - rank.rank
    one = np.array([other, other])
    into = torch.zeros(14, dtype=torch.uint8)
    moves = ExpertMoves(one, np.array([0, 1]), np.array([3, 1]), one, np.array([0, 1]), into)
    communicator.add_moves(moves)
    communicator.add_send(weights[0][0][0], other)
    communicator.add_recv(weights[0][0][2], other)
    communicator.execute()
    theirs = [noise(4 * 6, other).view(4, 6), noise(4 * 8, 2 + other).view(4, 8)]
    assert torch.equal(into, torch.cat([theirs[0][3], theirs[1][1]]))
    assert torch.equal(weights[0][0][2], theirs[0][0])
    assert bool((pool == 7).all())
    # The agent, its peer, weights and pool in one registration.
    assert communicator.num_open_handles == 3


@processes(8)
def test_jobs_and_stages_of_one_host_do_not_hear_each_other(rank: Rank) -> None:
    # Two jobs of two pipeline stages of two ranks: everywhere ranks 0 and 1, and generation 0.
    island, number = divmod(rank.rank, 2)
    store = dist.PrefixStore(f"island{island}/", rank.store)
    inner = replace(rank, rank=number, size=2, store=store)
    communicator = make(inner)
    for step in range(10):
        assert swap(communicator, inner, [50, 3000], seed=100 * island + step), island


@processes(2)
def test_communicators_of_one_process_run_side_by_side(rank: Rank) -> None:
    communicators = [make(rank, generation=generation) for generation in range(3)]
    fine = [False] * 3

    def work(index: int) -> None:
        fine[index] = all(
            swap(communicators[index], rank, [64, 100_000], seed=100 * index + step)
            for step in range(15)
        )

    threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(40)
    assert fine == [True] * 3


@processes(2)
def test_what_is_said_to_a_retired_generation_is_dropped(rank: Rank) -> None:
    retired, standing = make(rank, generation=0), make(rank, generation=1)
    assert retired._wire is not None
    assert standing._wire is not None
    # As if the retired generation's word came late, to an agent that serves the next one.
    old = retired._wire.remotes[1 - rank.rank]
    new = standing._wire.remotes[1 - rank.rank]
    standing._agent.notify(new.name, encode(old.token, Failed(1, "a ghost")))
    assert swap(standing, rank, [10], seed=5)


def run_fresh(code: str, **environment: str) -> None:
    """Run code in a process that has no settings of NIXL, nor is forked from one that has."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("UCX_")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=kept | environment,
        capture_output=True,
        timeout=100,
        check=False,
    )
    assert (done.returncode, done.stdout.decode(), done.stderr.decode()) == (0, "", "")


def test_settings_are_made_before_nixl_is_loaded_and_the_users_win() -> None:
    code = """
import os
from equipoise.comm import has_nixl

assert "UCX_RCACHE_MAX_UNRELEASED" not in os.environ
assert has_nixl()
assert os.environ["UCX_RCACHE_MAX_UNRELEASED"] == "1024"
assert os.environ["UCX_USE_MT_MUTEX"] == "n"
"""
    run_fresh(code, UCX_USE_MT_MUTEX="n")


def test_nixl_that_came_first_is_warned_of() -> None:
    code = """
import logging
import nixl_cu13._bindings
from equipoise.comm import has_nixl

records = []
handler = logging.Handler(logging.WARNING)
handler.emit = lambda record: records.append(record.getMessage())
logger = logging.getLogger("equipoise.comm.nixl.agent")
logger.addHandler(handler)
logger.propagate = False
assert has_nixl()
assert has_nixl()
assert len(records) == 1
assert "nixl_cu13 was imported before" in records[0]
assert "UCX_RCACHE_MAX_UNRELEASED" in records[0]
"""
    run_fresh(code)


def test_what_ranks_are_forked_from_loads_ucx_and_starts_no_thread() -> None:
    code = """
import os
from pathlib import Path
from equipoise.comm.nixl.agent import warm_up

before = len(os.listdir("/proc/self/task"))
warm_up()
assert len(os.listdir("/proc/self/task")) == before
assert "libplugin_UCX" in Path("/proc/self/maps").read_text()
assert os.environ["UCX_RCACHE_MAX_UNRELEASED"] == "1024"
"""
    run_fresh(code)


def test_a_process_that_used_nixl_ends_cleanly_says_nothing_and_idles_cheaply() -> None:
    code = """
import time, torch
from equipoise.comm.nixl.agent import Agent
agent = Agent(torch.device("cpu"))
began = time.process_time()
deadline = time.monotonic() + 0.5
while time.monotonic() < deadline:
    time.sleep(0.1)
assert time.process_time() - began < 0.25, "an idle agent takes a core"
"""
    run_fresh(code)


def test_rixl_serves_where_nixl_is_not_there(tmp_path: Path) -> None:
    package = tmp_path / "rixl"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "_bindings.py").touch()
    code = """
import os
import sys
from equipoise.comm import has_nixl

for name in ("nixl", "nixl_cu13", "nixl_cu12"):
    sys.modules[name] = None
assert not has_nixl()
sys.path.insert(0, os.environ["RIXL_IS_AT"])
assert has_nixl()
assert "rixl._bindings" in sys.modules
"""
    run_fresh(code, RIXL_IS_AT=str(tmp_path))


@processes(2)
def test_no_telemetry_is_taken(rank: Rank) -> None:
    communicator = make(rank)
    agent = communicator._agent
    release, num_asked = agent.release, 0

    def ask_and_release(read: Read) -> None:
        nonlocal num_asked
        num_asked += 1
        with pytest.raises(agent._nixl.nixlNoTelemetryError):
            agent._agent.getXferTelemetry(read.handle)
        release(read)

    agent.release = ask_and_release  # type: ignore[method-assign]
    assert swap(communicator, rank, [1000], seed=1)
    assert num_asked == 1


@pytest.mark.parametrize("transports", [None, "tcp"])
@processes(1)
def test_steps_of_copies_are_set_only_where_they_are_used(
    rank: Rank, transports: str | None
) -> None:
    os.environ.pop("UCX_CMA_SEG_SIZE", None)
    if transports is not None:
        os.environ["UCX_TLS"] = transports
    assert has_nixl()
    assert os.environ.get("UCX_CMA_SEG_SIZE") == (None if transports else "4m")
