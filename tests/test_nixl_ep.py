"""NIXL-EP's dispatcher and the owner of its buffer, against a fake that keeps its states."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import pytest
import torch
from torch.distributed import HashStore

from equipoise.bundled import model_directory
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
from equipoise.dispatch.nixl_ep.dispatcher import Fp8, NixlEPDispatcher, NixlEPOptions
from equipoise.dispatch.nixl_ep.kernels import HIDDEN_SIZES, load_nixl_ep
from equipoise.dispatch.rows import dequant_fp8, maybe_roundup_layer_hidden_size
from equipoise.errors import (
    CommunicatorUnavailable,
    ConfigError,
    MembershipError,
    TransferError,
)
from equipoise.models.parallel import parallelize
from equipoise.topology import Topology
from tests.fake_nixl_ep import FakeFabric, FakeKernels, quantize
from tests.ranks import SHORT_S

CPU = torch.device("cpu")
SLOTS = 3
HIDDEN = 2000
SHAPE = {
    "max_num_tokens_per_dp_rank": 16,
    "token_hidden_size": HIDDEN,
    "num_experts_per_rank": SLOTS,
}


@dataclass
class Peer:
    """A rank that is a thread: its buffer lives longer than its groups."""

    manager: NixlEPAll2AllManager
    store: HashStore
    group: RankGroup | None = None

    def join(self, rank: int, size: int, generation: int, fp8: Fp8 = "no") -> NixlEPDispatcher:
        self.group = create_rank_group(
            self.store,
            rank,
            size,
            CPU,
            generation=generation,
            timeout=timedelta(seconds=20),
            device_group="gloo",
        )
        options = NixlEPOptions(self.manager, 16, HIDDEN, fp8)
        dispatcher = create_dispatcher(options, self.group, Topology(size, SLOTS))
        assert isinstance(dispatcher, NixlEPDispatcher)
        return dispatcher


class Cluster:
    """Peers that share a store and a fabric."""

    def __init__(self, max_ranks: int = 4, seconds: float = 20.0) -> None:
        self.store = HashStore()
        self.fabric = FakeFabric()
        self.max_ranks = max_ranks
        self.seconds = seconds
        self.generation = 0

    def make_peers(self, number: int) -> list[Peer]:
        return [
            Peer(
                NixlEPAll2AllManager(
                    self.max_ranks,
                    CPU,
                    timedelta(seconds=self.seconds),
                    kernels=FakeKernels(self.fabric),
                ),
                self.store,
            )
            for _ in range(number)
        ]

    def form(self, peers: list[Peer], fp8: Fp8 = "no") -> list[NixlEPDispatcher]:
        """A generation of these ranks, in order."""
        self.generation += 1
        size, number = len(peers), self.generation
        return together(
            [lambda p=p, r=r: p.join(r, size, number, fp8) for r, p in enumerate(peers)]
        )


def together(calls: list[Callable[[], object]]) -> list:
    with ThreadPoolExecutor(len(calls)) as pool:
        futures = [pool.submit(call) for call in calls]
        return [future.result(60) for future in futures]


def exchange(
    dispatchers: list[NixlEPDispatcher], seed: int = 0, num_tokens: int = 7
) -> list[torch.Tensor]:
    """Every rank's tokens to slots everywhere and home: outputs are right on every rank."""
    num_slots = len(dispatchers) * SLOTS

    def run(rank: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(100 * seed + rank)
        hidden = torch.randn(num_tokens, HIDDEN, generator=random).bfloat16()
        scores = torch.rand(num_tokens, num_slots, generator=random)
        slots = scores.topk(min(4, num_slots)).indices
        slots[torch.rand(slots.shape, generator=random) < 0.1] = -1
        weights = torch.rand(slots.shape, generator=random)
        dispatcher = dispatchers[rank]
        dispatched = dispatcher.dispatch(hidden, slots)
        assert torch.equal(dispatched.slot_N, dispatched.slot_N.sort().values)
        factor = (dispatched.slot_N + rank * SLOTS + 1).bfloat16()
        combined = dispatcher.combine(dispatched.hidden_ND * factor[:, None], weights, dispatched)
        outputs = hidden[:, None] * (slots + 1).bfloat16()[..., None]
        expected = (outputs.float() * (weights * (slots >= 0))[..., None]).sum(1)
        torch.testing.assert_close(combined.float(), expected, rtol=2e-2, atol=1e-2)
        dispatcher.check()
        return combined

    return together([lambda rank=rank: run(rank) for rank in range(len(dispatchers))])


def test_ranks_come_and_go_in_one_buffer() -> None:
    cluster = Cluster()
    first = cluster.make_peers(2)
    two = cluster.form(first)
    exchange(two)
    (third,) = cluster.make_peers(1)
    three = cluster.form([*first, third])
    exchange(three)
    assert [d.members for d in three] == [(0, 1, 2)] * 3
    # Rank 0 leaves; ranks are numbered anew, indices stay.
    last = cluster.form([first[1], third])
    exchange(last)
    assert last[0].members == (1, 2)
    for old in (*two, *three):
        old.close()
    assert first[1].manager.connected == {2}
    # Its index is free again, for somebody else.
    (fourth,) = cluster.make_peers(1)
    again = cluster.form([first[1], third, fourth])
    exchange(again)
    assert again[2].members == (1, 2, 0)
    assert len(cluster.fabric.buffers) == 4
    (buffer,) = (buffer for buffer in cluster.fabric.buffers if buffer.rank == 1)
    assert buffer.calls[:2] == ["connect [0] masked", "connect [2] masked"]
    for peer in (*first, third, fourth):
        peer.manager.close()
        peer.manager.close()
    assert all(buffer.is_destroyed for buffer in cluster.fabric.buffers)


def test_several_generations_leave_nothing_behind() -> None:
    cluster = Cluster()
    peers = cluster.make_peers(3)
    for _ in range(3):
        before = cluster.form(peers)
        exchange(before)
        after = cluster.form(peers[:2])
        exchange(after, 1)
        for dispatcher in before[:2]:
            dispatcher.close()
        peers[2].manager.close()
        assert peers[0].manager.connected == {1}
        peers[2] = cluster.make_peers(1)[0]
    assert not cluster.fabric.messages


def test_a_newcomer_tries_the_kernels_alone_before_it_is_connected() -> None:
    cluster = Cluster()
    peers = cluster.make_peers(2)
    cluster.form(peers[:1])[0].enter()
    both = cluster.form(peers)
    alone = both[1].isolate()
    assert isinstance(alone, NixlEPDispatcher)
    assert both[1].isolate() is not None, "once for each set of layers"
    assert both[1].max_tokens == 16
    hidden = torch.randn(5, HIDDEN).bfloat16()
    slots = torch.tensor([2, 0, -1]).expand(5, 3).contiguous()
    dispatched = alone.dispatch(hidden, slots)
    assert dispatched.count_S.tolist() == [5, 0, 5]
    combined = alone.combine(dispatched.hidden_SCH, torch.full((5, 3), 0.5), dispatched)
    assert torch.equal(combined, hidden)
    # What it tried stands in nobody's way, and nobody else may try what serves.
    exchange(both)
    with pytest.raises(MembershipError, match=r"serves the indices \(0, 1\): .* alone"):
        both[0].isolate()


def test_buffers_one_after_the_other_in_one_generation_do_not_meet() -> None:
    """Keys that a closed buffer left in the store are nobody's metadata."""
    cluster = Cluster()
    peers = cluster.make_peers(2)
    cluster.form(peers)

    def run(rank: int) -> None:
        group = peers[rank].group
        assert group is not None
        keys = []
        for _ in range(3):
            kernels = FakeKernels(FakeFabric())
            manager = NixlEPAll2AllManager(2, CPU, timedelta(seconds=20), kernels=kernels)
            manager.join(group)
            manager.get_handle(**SHAPE)
            manager.stage(group, (0, 1))
            keys.append(kernels.fabric.buffers[0].prefix)
            group.barrier()
            manager.close()
        assert len(set(keys)) == 3

    together([lambda: run(0), lambda: run(1)])


def test_a_generation_that_is_over_is_refused() -> None:
    cluster = Cluster()
    peers = cluster.make_peers(2)
    old = cluster.form(peers)
    exchange(old)
    exchange(cluster.form(peers[:1]))
    with pytest.raises(MembershipError, match=r"serves the indices \(0,\), not \(0, 1\)"):
        old[0].dispatch(torch.zeros(1, HIDDEN).bfloat16(), torch.zeros(1, 1, dtype=torch.int64))


def test_a_full_buffer_is_refused_by_name() -> None:
    cluster = Cluster(max_ranks=2)
    peers = cluster.make_peers(3)
    with pytest.raises(MembershipError, match=r"2 ranks has 2 places for 3 new ones: .* least 3"):
        cluster.form(peers)


def test_a_rank_that_does_not_answer_is_named_after_the_step() -> None:
    cluster = Cluster(seconds=SHORT_S)
    peers = cluster.make_peers(3)
    dispatchers = cluster.form(peers)
    exchange(dispatchers)

    def run(rank: int) -> None:
        hidden, slots = torch.ones(2, HIDDEN).bfloat16(), torch.tensor([[0], [4]])
        dispatched = dispatchers[rank].dispatch(hidden, slots)
        dispatchers[rank].combine(dispatched.hidden_ND, torch.ones(2, 1), dispatched)
        told = f"rank 1 did not answer within {SHORT_S:.1f} s"
        with pytest.raises(TransferError, match=told) as error:
            dispatchers[rank].check()
        assert (error.value.rank, error.value.peer) == (rank, 1)

    together([lambda: run(0), lambda: run(2)])
    # The others go on without it.
    exchange(cluster.form([peers[0], peers[2]]))


def test_a_newcomer_that_does_not_come_is_named_and_the_others_go_on() -> None:
    cluster = Cluster(seconds=SHORT_S)
    peers = cluster.make_peers(2)
    exchange(cluster.form(peers))

    def wait_for_a_third(peer: Peer) -> None:
        assert peer.group is not None
        told = f"waited {SHORT_S:.1f} s for a peer .*NIXL_EP/3"
        with pytest.raises(MembershipError, match=told):
            peer.manager.stage(peer.group, (0, 1, 3))

    together([partial(wait_for_a_third, peer) for peer in peers])
    assert [peer.manager.connected for peer in peers] == [{1}, {0}]
    exchange(cluster.form(peers), 1)


def test_a_rank_that_cannot_be_connected_is_named_and_tried_again() -> None:
    """As when it dies once its metadata were read."""
    cluster = Cluster()
    peers = cluster.make_peers(2)
    dispatchers = cluster.form(peers)
    (buffer,) = (buffer for buffer in cluster.fabric.buffers if buffer.rank == 0)
    buffer.refuses = "Failed to get metadata for remote agent 1, status: -3"

    def run(rank: int) -> None:
        group = peers[rank].group
        assert group is not None
        if rank == 0:
            with pytest.raises(MembershipError, match=r"0 .* connected to \[1\]: Failed to get"):
                peers[0].manager.stage(group, (0, 1))
            assert peers[0].manager.connected == frozenset()
            assert not buffer.connected
        else:
            peers[1].manager.stage(group, (0, 1))
            peers[1].manager.disconnect((0,))

    together([lambda: run(0), lambda: run(1)])
    exchange(dispatchers)


_HANG = """
import ctypes
from equipoise.dispatch.nixl_ep.watchdog import end_process_after
with end_process_after(60, "too early"):
    pass
print("alive", flush=True)
with end_process_after(0.5, "nobody came"):
    ctypes.PyDLL(None).pause()  # keeps Python's lock, as NIXL-EP does
"""


def test_a_native_call_that_never_returns_ends_its_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _HANG], capture_output=True, text=True, timeout=100, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (
        -signal.SIGKILL,
        "alive\n",
        "nobody came\n",
    )


def test_a_micro_batch_travels_while_another_is_computed() -> None:
    cluster = Cluster()
    dispatchers = cluster.form(cluster.make_peers(2))

    def run(rank: int) -> None:
        dispatcher = dispatchers[rank]
        ones, slots = torch.ones(2, 1), torch.tensor([[0], [SLOTS]])
        hidden = [torch.full((2, HIDDEN), 1.0 + batch).bfloat16() for batch in range(2)]
        first = dispatcher.send(hidden[0], slots)
        with pytest.raises(TransferError, match="what was sent before has not been received"):
            dispatcher.send(hidden[1], slots)
        first.receive()
        second = dispatcher.send(hidden[1], slots)
        outputs = first.blocks.hidden_SCH * 2
        with pytest.raises(TransferError, match="what was sent before has not been received"):
            dispatcher.send_home(outputs, ones, first.blocks)
        second.receive()
        with pytest.raises(TransferError, match="2 micro-batches are in flight already"):
            dispatcher.send(hidden[0], slots)
        assert first.blocks.count_S.tolist() == second.blocks.count_S.tolist() == [2, 0, 0]
        home = dispatcher.send_home(outputs, ones, first.blocks)
        outputs = second.blocks.hidden_SCH * 2
        home.receive()
        later = dispatcher.send_home(outputs, ones, second.blocks)
        later.receive()
        assert torch.equal(home.combined_TD, 2 * hidden[0])
        assert torch.equal(later.combined_TD, 2 * hidden[1])
        dispatcher.check()

    together([lambda: run(0), lambda: run(1)])


def test_top_1_weighs_the_input_and_others_may_not() -> None:
    (dispatcher,) = Cluster().form(Cluster().make_peers(1))
    hidden = torch.ones(1, HIDDEN).bfloat16()
    sent = dispatcher.send(hidden, torch.tensor([[1]]), torch.tensor([[0.5]]))
    sent.receive()
    assert sent.blocks.hidden_SCH[1, 0, 0] == 0.5
    with pytest.raises(ConfigError, match="for top-1 alone, not for top-2"):
        dispatcher.send(hidden, torch.tensor([[1, 2]]), torch.tensor([[0.5]]))


@pytest.mark.parametrize("fp8", ["float32", "ue8m0"])
def test_fp8_is_dequantised_for_experts_in_bfloat16(fp8: Fp8) -> None:
    cluster = Cluster()
    dispatchers = cluster.form(cluster.make_peers(2), fp8)

    def run(rank: int) -> None:
        hidden = torch.randn(16, HIDDEN, generator=torch.Generator().manual_seed(rank)).bfloat16()
        slots = torch.arange(16)[:, None] % (2 * SLOTS)
        dispatched = dispatchers[rank].dispatch(hidden, slots)
        assert dispatched.hidden_ND.dtype == torch.bfloat16
        combined = dispatchers[rank].combine(dispatched.hidden_ND, torch.ones(16, 1), dispatched)
        error = (combined - hidden).float().norm() / hidden.float().norm()
        assert 0 < error < 0.04

    together([lambda: run(0), lambda: run(1)])


def test_no_tokens_and_padding_alone_travel() -> None:
    cluster = Cluster()
    dispatchers = cluster.form(cluster.make_peers(2))
    assert exchange(dispatchers, num_tokens=0)[0].shape == (0, HIDDEN)
    hidden, nowhere = torch.ones(3, HIDDEN).bfloat16(), torch.full((3, 2), -1)

    def run(rank: int) -> None:
        dispatched = dispatchers[rank].dispatch(hidden, nowhere)
        assert not len(dispatched.slot_N)
        home = dispatchers[rank].combine(dispatched.hidden_ND, torch.ones(3, 2), dispatched)
        assert not home.any()

    together([lambda: run(0), lambda: run(1)])


def test_what_the_kernels_cannot_take_is_refused() -> None:
    (dispatcher,) = Cluster().form(Cluster().make_peers(1))
    slots = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"carries bfloat16, not torch.float32"):
        dispatcher.dispatch(torch.zeros(1, HIDDEN), slots)
    with pytest.raises(ConfigError, match=r"17 tokens x 2000 do not fit .* up to 16 x 2000"):
        dispatcher.dispatch(torch.zeros(17, HIDDEN).bfloat16(), slots.expand(17, 1))
    with pytest.raises(ConfigError, match="at most 11 slots per token, not 12"):
        dispatcher.dispatch(torch.zeros(1, HIDDEN).bfloat16(), slots.expand(1, 12))
    assert dispatcher.dispatch(torch.zeros(1, HIDDEN).bfloat16(), slots).slot_N.tolist() == [0]


def compare_models(group: RankGroup, manager: NixlEPAll2AllManager) -> None:
    """The bundled model in bfloat16 says the same over NIXL-EP as over torch."""
    options = NixlEPOptions(manager, 64, 128)
    config = EPLBConfig(use_async=False, communicator="torch_gloo")
    inputs = torch.arange(60, device=group.device).view(2, 30) * (3 + group.rank) % 256
    valid = torch.ones(60, dtype=torch.bool, device=group.device)
    valid[20:30] = False
    logits = []
    for choice in ("torch", options):
        parallel = parallelize(
            model_directory(),
            group,
            config,
            dtype=torch.bfloat16,
            attention="sdpa",
            dispatcher=partial(create_dispatcher, choice),
        )
        with torch.no_grad(), parallel.route(valid, 0) as model:
            logits.append(model(inputs).logits.flatten(0, 1)[valid].float())
        assert parallel.spread.recorder.counts.sum() == 4 * 4 * 50
        parallel.dispatchers[0].check()
        parallel.close()
    # Outputs are summed in float32 and rounded once, and a route that is close may turn out so.
    error = (logits[0] - logits[1]).norm() / logits[0].norm()
    assert error < 0.06, error


def test_a_model_says_the_same_over_blocks() -> None:
    (peer,) = Cluster().make_peers(1)
    peer.join(0, 1, 1)
    assert peer.group is not None
    manager = NixlEPAll2AllManager(
        1, CPU, timedelta(seconds=20), index=0, kernels=FakeKernels(FakeFabric())
    )
    compare_models(peer.group, manager)
    manager.close()


def test_hidden_sizes_round_up() -> None:
    assert [maybe_roundup_layer_hidden_size(d, HIDDEN_SIZES) for d in (1, 2048, 2049, 8192)] == [
        2048,
        2048,
        2560,
        8192,
    ]


def test_dequantising_undoes_quantising() -> None:
    row = torch.randn(1024, generator=torch.Generator().manual_seed(0)).bfloat16()
    row[:128] = 0
    for round_scale in (False, True):
        quantized, scale = quantize(row, round_scale)
        exact = dequant_fp8(quantized[None], scale[None], torch.float32)[0]
        assert torch.equal(exact, (quantized.float().view(-1, 128) * scale[:, None]).flatten())
    packed = (scale.view(torch.int32) >> 23).to(torch.uint8).view(torch.int32)
    assert torch.equal(dequant_fp8(quantized[None], packed[None], torch.float32)[0], exact)
    least = dequant_fp8(torch.ones(1, 512).to(torch.float8_e4m3fn), torch.zeros(1, 1).int())
    assert (least.float() == 2.0**-127).all()
    with pytest.raises(ConfigError, match="must be one for each 128 elements"):
        dequant_fp8(quantized[None], scale[None, 1:])


def test_without_a_gpu_it_says_so() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(CommunicatorUnavailable, match="needs a CUDA device"):
        load_nixl_ep()
