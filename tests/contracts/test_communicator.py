"""What every wire promises, run over every wire."""

from __future__ import annotations

import functools
import time

import numpy as np
import pytest
import torch

from equipoise.comm.base import EplbCommunicator, ExpertMoves
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.queued import QueuedCommunicator
from equipoise.errors import PlacementError, TransferError
from tests.contracts.communicators import PATIENCE_S, World, on_ranks
from tests.ranks import SHORT_S

DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.int8,
    torch.uint8,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
)


def same_bytes(got: torch.Tensor, expected: torch.Tensor) -> bool:
    return got.shape == expected.shape and torch.equal(
        view_bytes(got), view_bytes(expected.contiguous())
    )


def no_moves(into: torch.Tensor) -> dict[str, np.ndarray | torch.Tensor]:
    names = ("send_rank", "send_layer", "send_slot", "recv_rank", "recv_layer")
    return {"into": into, **{name: np.zeros(0, dtype=np.int64) for name in names}}


@on_ranks(3)
def test_the_kth_send_meets_the_kth_receive(world: World) -> None:
    communicator = world.make()
    peers = [peer for peer in range(3) if peer != world.rank]
    landed = {}
    for k in range(4):
        for peer in peers:
            communicator.add_send(
                world.noise(k + 1, 5, seed=100 * world.rank + 10 * peer + k), peer
            )
    for peer in reversed(peers):
        for k in range(4):
            landed[peer, k] = world.zeros(k + 1, 5)
            communicator.add_recv(landed[peer, k], peer)
    communicator.execute()
    for (peer, k), got in landed.items():
        assert same_bytes(got, world.noise(k + 1, 5, seed=100 * peer + 10 * world.rank + k))


@on_ranks(2)
def test_every_dtype_and_shape_travels(world: World) -> None:
    communicator = world.make()
    sent, landed = [], []
    for index, dtype in enumerate(DTYPES):
        for shape in ((3, 5), (), (0, 4), (1,)):
            sent.append(world.noise(*shape, dtype=dtype, seed=index))
            landed.append(world.zeros(shape, dtype=dtype))
    for tensor in sent if world.rank == 0 else landed:
        if world.rank == 0:
            communicator.add_send(tensor, 1)
        else:
            communicator.add_recv(tensor, 0)
    communicator.execute()
    if world.rank == 1:
        for expected, got in zip(sent, landed, strict=True):
            assert same_bytes(got, expected), expected.dtype


@pytest.mark.parametrize(
    ("count", "num_bytes"), [(1, 1), (1, 64 << 20), (3, 16 << 20), (2000, 7), (1, 0)]
)
@on_ranks(2)
def test_any_number_and_size(world: World, count: int, num_bytes: int) -> None:
    communicator = world.make()
    other = 1 - world.rank
    sent = [world.noise(num_bytes, dtype=torch.uint8, seed=k) for k in range(count)]
    landed = [world.zeros(num_bytes, dtype=torch.uint8) for _ in range(count)]
    for tensor, into in zip(sent, landed, strict=True):
        communicator.add_send(tensor, other)
        communicator.add_recv(into, other)
    communicator.execute()
    assert all(torch.equal(got, expected) for got, expected in zip(landed, sent, strict=True))


@on_ranks(2)
def test_strided_sends_travel_and_strided_receives_are_refused(world: World) -> None:
    communicator = world.make()
    whole = world.noise(6, 8)
    views = [whole.t(), whole[::2], whole[:, 1:3]]
    landed = [world.zeros(view.shape) for view in views]
    if world.rank == 0:
        for view in views:
            communicator.add_send(view, 1)
    else:
        with pytest.raises(ValueError, match=r"contiguous tensor, got shape \[8, 6\]"):
            communicator.add_recv(world.zeros(6, 8).t(), 0)
        for into in landed:
            communicator.add_recv(into, 0)
    communicator.execute()
    if world.rank == 1:
        for view, got in zip(views, landed, strict=True):
            assert same_bytes(got, view)


@on_ranks(3)
def test_empty_and_one_sided_exchanges_and_many_rounds(world: World) -> None:
    communicator = world.make()
    into = world.zeros(33)
    for step in range(40):
        # In every third round only ranks 0 and 1 have something, one way.
        if step % 3 and world.rank == 0:
            communicator.add_send(world.noise(33, seed=step), 1)
        if step % 3 and world.rank == 1:
            communicator.add_recv(into, 0)
        communicator.execute()
        if step % 3 and world.rank == 1:
            assert same_bytes(into, world.noise(33, seed=step))


@on_ranks(2)
def test_a_sent_tensor_is_free_and_a_received_one_complete_on_return(world: World) -> None:
    communicator = world.make()
    buffer = world.zeros(100_000, dtype=torch.int64)
    for step in range(5):
        if world.rank == 0:
            buffer.fill_(step)
            communicator.add_send(buffer, 1)
        else:
            buffer.fill_(-1)
            communicator.add_recv(buffer, 0)
        communicator.execute()
        assert bool((buffer == step).all())
        buffer.fill_(-2)


def weights_of(world: World, rank: int) -> list[list[torch.Tensor]]:
    return [
        [
            world.noise(4, 3, 5, seed=10 * rank),
            world.noise(4, 2, dtype=torch.float8_e4m3fn, seed=10 * rank + 1),
        ],
        [world.noise(4, 7, dtype=torch.bool, seed=10 * rank + 2)],
        [world.noise(4, 0), world.noise(4, dtype=torch.int8, seed=10 * rank + 3)],
    ]


def find_ring(world: World) -> ExpertMoves:
    """Each rank sends the next (0: 3, 1), (1: 2), (2: 0, 2, 3), and the one after it (1: 0)."""
    after, second = (world.rank + 1) % 3, (world.rank + 2) % 3
    to_next = [(0, 3), (0, 1), (1, 2), (2, 0), (2, 2), (2, 3)]
    sends = [(after, *send) for send in to_next] + [(second, 1, 0)]
    sends.sort(key=lambda send: send[:2])
    receives = sorted([(second, 0)] * 2 + [(second, 1)] + [(second, 2)] * 3 + [(after, 1)])
    into = world.zeros(2 * 62 + 7 + 3 + 7 + 5, dtype=torch.uint8)
    send = np.array(sends)
    recv = np.array(receives)
    return ExpertMoves(send[:, 0], send[:, 1], send[:, 2], recv[:, 0], recv[:, 1], into)


def queue_ring(communicator: EplbCommunicator, world: World) -> torch.Tensor:
    moves = find_ring(world)
    communicator.add_moves(moves)
    return moves.into


def expect_ring(world: World) -> torch.Tensor:
    parts = {}
    for peer in range(3):
        weights = weights_of(world, peer)
        if (peer + 1) % 3 == world.rank:
            rows = [weights[0][0][[3, 1]], weights[0][1].view(torch.uint8)[[3, 1]]]
            rows += [weights[1][0][[2]], weights[2][1][[0, 2, 3]]]
            parts[peer] = rows
        elif peer != world.rank:
            parts[peer] = [weights[1][0][[0]]]
    return torch.cat([view_bytes(row.contiguous()) for p in sorted(parts) for row in parts[p]])


@on_ranks(3)
def test_moves_land_by_rank_layer_tensor_and_row(world: World) -> None:
    communicator = world.make(weights_of(world, world.rank))
    for _ in range(3):
        into = queue_ring(communicator, world)
        communicator.execute()
        expected = expect_ring(world)
        assert torch.equal(into[: len(expected)], expected)
        assert not into[len(expected) :].any()


@on_ranks(3)
def test_moves_that_were_foreseen_land_each_in_its_own_exchange(world: World) -> None:
    communicator = world.make(weights_of(world, world.rank))
    nothing = ExpertMoves(**no_moves(world.zeros(0, dtype=torch.uint8)))  # type: ignore[arg-type]
    several = [find_ring(world), nothing, find_ring(world)]
    communicator.foresee(several)
    expected = expect_ring(world)
    for number, moves in enumerate(several):
        communicator.add_moves(moves)
        # What was not foreseen is queued as ever, and travels in the same exchange.
        beside = queue_ring(communicator, world) if number == 1 else None
        communicator.execute()
        landed = [each.into[: len(expected)].any().item() for each in several]
        assert landed == [True, False, number == 2]
        if beside is not None:
            assert torch.equal(beside[: len(expected)], expected)
    for moves in (several[0], several[2]):
        assert torch.equal(moves.into[: len(expected)], expected)


@on_ranks(3)
def test_moves_and_tensors_mix_in_one_exchange(world: World) -> None:
    communicator = world.make(weights_of(world, world.rank))
    after, before = (world.rank + 1) % 3, (world.rank + 2) % 3
    first, last = world.zeros(9), world.zeros(11)
    communicator.add_send(world.noise(9, seed=world.rank), after)
    communicator.add_recv(first, before)
    into = queue_ring(communicator, world)
    communicator.add_send(world.noise(11, seed=50 + world.rank), after)
    communicator.add_recv(last, before)
    communicator.execute()
    expected = expect_ring(world)
    assert torch.equal(into[: len(expected)], expected)
    assert same_bytes(first, world.noise(9, seed=before))
    assert same_bytes(last, world.noise(11, seed=50 + before))


@on_ranks(2)
def test_what_cannot_be_is_refused_and_changes_nothing(world: World) -> None:
    communicator = world.make(weights_of(world, world.rank))
    other = 1 - world.rank
    tensor = world.zeros(2)
    for add in (communicator.add_send, communicator.add_recv):
        with pytest.raises(ValueError, match=f"rank {world.rank} cannot .* itself"):
            add(tensor, world.rank)
        for outside in (-1, 2):
            with pytest.raises(ValueError, match=f"rank {outside}: ranks are 0 to 1"):
                add(tensor, outside)
        with pytest.raises(ValueError, match=f"works on {world.device}, got a tensor on meta"):
            add(world.zeros(2, device="meta"), other)
    one = np.ones(1, dtype=np.int64)
    room = world.zeros(62, dtype=torch.uint8)
    for fields, complaint in (
        ({"send_rank": one * world.rank, "send_layer": one, "send_slot": one}, "itself"),
        ({"send_rank": one * other, "send_layer": one * 3, "send_slot": one}, "no layer 3"),
        ({"send_rank": one * other, "send_layer": one, "send_slot": one * 4}, "no local slot 4"),
        (
            {"recv_rank": np.array([other] * 2), "recv_layer": np.array([1, 0])},
            "in order of ranks, and of layers",
        ),
        ({"recv_rank": one * other, "recv_layer": one * 0, "into": room[:61]}, "tensor of 62 b"),
        ({"recv_rank": one * other, "recv_layer": one * 0, "into": room.float()}, "uint8"),
    ):
        with pytest.raises(ValueError, match=complaint):
            communicator.add_moves(ExpertMoves(**{**no_moves(room), **fields}))  # type: ignore[arg-type]
        with pytest.raises(ValueError, match=complaint):
            communicator.foresee([ExpertMoves(**{**no_moves(room), **fields})])  # type: ignore[arg-type]
    communicator.execute()
    assert not room.any()
    bare = world.make(generation=1)
    with pytest.raises(TransferError, match="created with none"):
        bare.add_moves(ExpertMoves(**no_moves(room)))  # type: ignore[arg-type]


@on_ranks(2)
def test_what_is_held_lands_only_when_it_may(world: World) -> None:
    communicator = world.make()
    if not communicator.can_hold:
        with pytest.raises(ValueError, match="cannot wait for what is to be filled"):
            communicator.start(lambda: True)
        return
    other, answers = 1 - world.rank, [True, False]
    landed = [world.zeros(100), world.zeros(100)]
    for number, into in enumerate(landed):
        communicator.add_send(world.noise(100, seed=number), other)
        communicator.add_recv(into, other)
        # The second may land once the first has been seen.
        communicator.start(functools.partial(answers.__getitem__, number))
    communicator.finish()
    assert same_bytes(landed[0], world.noise(100, seed=0))
    assert not landed[1].any()
    answers[1] = True
    communicator.finish()
    assert same_bytes(landed[1], world.noise(100, seed=1))


@on_ranks(2)
def test_an_exchange_in_which_nothing_lands_is_over_once_it_may(world: World) -> None:
    communicator = world.make()
    if not communicator.can_hold:
        # Which then refuses to, as the test before says.
        return
    answers = iter([False] * 5 + [True])
    asked: list[bool] = []

    def may_land() -> bool:
        asked.append(next(answers))
        return asked[-1]

    communicator.start(may_land)
    communicator.finish()
    assert asked == [False] * 5 + [True]


@on_ranks(3)
def test_what_was_sent_may_change_once_all_have_received_it(world: World) -> None:
    weights = weights_of(world, world.rank)
    communicator, expected = world.make(weights), expect_ring(world)
    rows = [view_bytes(tensor) for layer in weights for tensor in layer]
    kept = [each.clone() for each in rows]
    after, before = (world.rank + 1) % 3, (world.rank + 2) % 3
    large, landed = (world.zeros(1 << 20, dtype=torch.int64) for _ in range(2))
    for number in range(12):
        for each, bytes_kept in zip(rows, kept, strict=True):
            each.copy_(bytes_kept)
        into = queue_ring(communicator, world)
        # Some wires send it through memory of their own, of which there is not enough for all.
        communicator.add_send(large.fill_(10 * number + world.rank), after)
        communicator.add_recv(landed, before)
        communicator.start()
        communicator.finish(may_be_read=True)
        assert torch.equal(into[: len(expected)], expected)
        assert bool((landed == 10 * number + before).all())
        world.say(f"received {number}")
        world.hear(f"received {number}")
        for each in rows:
            each.fill_(77)


@on_ranks(1)
def test_a_single_rank_has_nobody_to_talk_to(world: World) -> None:
    communicator = world.make()
    communicator.execute()
    with pytest.raises(ValueError, match="itself"):
        communicator.add_send(world.zeros(1), 0)


@on_ranks(1)
def test_weights_that_cannot_be_moved_are_refused(world: World) -> None:
    whole = world.zeros(4, 6)
    for weights, complaint in (
        ([[world.zeros(2, 2)], []], "empty expert weights: layer 1 has no tensors"),
        ([[world.zeros(2, 2)], [world.zeros(3, 2)]], "layer 1, tensor 0 has 3 slots"),
        ([[world.zeros(2, 2).t()]], "layer 0, tensor 0 is not contiguous"),
        ([[world.zeros(())]], "layer 0, tensor 0 is a scalar"),
        ([[world.zeros(2, 2), world.zeros(2, 2, device="meta")]], "tensor 1 is on meta"),
        ([[whole[:2], whole[1:3]]], "layer 0, tensor 0 and layer 0, tensor 1 use the same memory"),
    ):
        with pytest.raises(PlacementError, match=complaint):
            world.make(weights)


MISMATCHES = {
    "count": ([3, 5], [3, 5, 2], r"sends rank 1 2 tensors of 8 bytes, but rank 1 expects 3"),
    "nothing sent": ([], [4], r"sends rank 1 0 tensors of 0 bytes, but rank 1 expects 1 tensor"),
    "nothing expected": ([4], [], r"sends rank 1 1 tensor of 4 bytes, but rank 1 expects 0"),
    "size": (
        [3, 5],
        [3, 6],
        r"sends rank 1 2 tensors of 8 bytes, but rank 1 expects 2 tensors of 9",
    ),
    "order": (
        [3, 5],
        [5, 3],
        r"sends rank 1 2 tensors of 8 bytes, as expected, but their sizes differ",
    ),
}


@pytest.mark.parametrize("case", MISMATCHES)
@on_ranks(3)
def test_a_mismatch_is_named_on_both_sides_and_concerns_nobody_else(
    world: World, case: str
) -> None:
    sent, expected, complaint = MISMATCHES[case]
    communicator = world.make()
    landed = [world.zeros(size, dtype=torch.uint8) for size in expected]
    bystander = world.zeros(5)
    if world.rank == 0:
        for size in sent:
            communicator.add_send(world.noise(size, dtype=torch.uint8), 1)
    if world.rank == 1:
        for into in landed:
            communicator.add_recv(into, 0)
        communicator.add_send(world.noise(5), 2)
    if world.rank == 2:
        communicator.add_recv(bystander, 1)
        communicator.execute()
        assert same_bytes(bystander, world.noise(5))
        return
    with pytest.raises(TransferError, match=rf"rank 0 {complaint}") as caught:
        communicator.execute()
    assert (caught.value.rank, caught.value.peer) == (world.rank, 1 - world.rank)
    assert not any(into.any() for into in landed)


@on_ranks(3, dies=(1,))
def test_a_dead_peer_is_named_at_once(world: World) -> None:
    communicator = world.make()
    communicator.execute()
    world.say("met")
    if world.rank == 1:
        # What it told the others last is still on its way when it returns.
        world.hear("met")
        world.die()
    started = time.monotonic()
    communicator.add_recv(world.zeros(10), 1)
    with pytest.raises(TransferError, match="rank 1 closed the connection") as caught:
        communicator.execute()
    assert caught.value.peer == 1
    assert time.monotonic() - started < 0.75 * PATIENCE_S


@on_ranks(3)
def test_a_hung_peer_is_named_when_the_deadline_has_passed(world: World) -> None:
    communicator = world.make()
    communicator.execute()
    world.say("met")
    world.hear("met")
    if world.rank == 1:
        world.hear("over", among=(0, 2))
        return
    assert isinstance(communicator, QueuedCommunicator)
    communicator.timeout_s = SHORT_S
    other = 2 - world.rank
    communicator.add_send(world.noise(10), other)
    communicator.add_recv(world.zeros(10), other)
    communicator.add_send(world.zeros(10), 1)
    started = time.monotonic()
    with pytest.raises(
        TransferError, match=f"rank 1 did not answer within {SHORT_S:.1f} s"
    ) as caught:
        communicator.execute()
    assert caught.value.peer == 1
    assert 0.9 * SHORT_S < time.monotonic() - started < 3 * SHORT_S
    world.say("over")


@on_ranks(2)
def test_after_a_failure_it_can_only_be_closed_and_built_anew(world: World) -> None:
    communicator = world.make()
    other = 1 - world.rank
    communicator.add_send(world.zeros(1), other)
    with pytest.raises(TransferError, match=r"but rank \d expects 0 tensors"):
        communicator.execute()
    for use in (
        lambda: communicator.add_send(world.zeros(1), other),
        lambda: communicator.add_recv(world.zeros(1), other),
        lambda: communicator.add_moves(ExpertMoves(**no_moves(world.zeros(0)))),  # type: ignore[arg-type]
        communicator.execute,
    ):
        with pytest.raises(TransferError, match="has failed and can only be closed"):
            use()
    # The other may not have heard yet why.
    world.say("failed")
    world.hear("failed")
    communicator.close()
    communicator.close()
    with pytest.raises(TransferError, match="is closed"):
        communicator.execute()
    again = world.make(generation=1)
    into = world.zeros(6)
    again.add_send(world.noise(6, seed=world.rank), other)
    again.add_recv(into, other)
    again.execute()
    assert same_bytes(into, world.noise(6, seed=other))
