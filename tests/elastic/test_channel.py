"""Frames over sockets: what arrives, who is hung up on, and that nobody waits without end."""

from __future__ import annotations

import queue
import socket
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipoise.elastic.channel import (
    LARGEST_FRAME_BYTES,
    LOOPBACK,
    Channel,
    ChannelClosed,
    Listener,
    Message,
    connect,
)

WAIT_S = 20.0


@pytest.fixture
def pair() -> Iterator[tuple[Channel, Channel]]:
    left, right = map(Channel, socket.socketpair())
    yield left, right
    left.close()
    right.close()


def test_what_is_said_arrives_in_order_and_whole(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    long = {"tokens": list(range(200_000)), "text": "ä" * 1000}
    sender = threading.Thread(target=lambda: [left.send({"n": 1}), left.send(long)])
    sender.start()
    assert right.receive(WAIT_S) == {"n": 1}
    assert right.receive(WAIT_S) == long
    sender.join(WAIT_S)


def test_threads_do_not_mix_their_frames(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    senders = [
        threading.Thread(
            target=lambda who=who: [
                left.send({"who": who, "n": n, "pad": "x" * 5000 * who}) for n in range(50)
            ]
        )
        for who in range(4)
    ]
    for sender in senders:
        sender.start()
    heard = [right.receive(WAIT_S) for _ in range(200)]
    for sender in senders:
        sender.join(WAIT_S)
    for who in range(4):
        assert [one["n"] for one in heard if one["who"] == who] == list(range(50))


def test_a_peer_that_has_gone_is_told_apart_from_silence(pair: tuple[Channel, Channel]) -> None:
    left, right = pair
    with pytest.raises(ChannelClosed, match="no answer in time"):
        right.receive(0.05)
    assert right.is_closed
    with pytest.raises(ChannelClosed):
        left.receive(WAIT_S)
    with pytest.raises(ChannelClosed):
        left.send({"n": 1})


def test_a_peer_that_does_not_read_is_given_up(pair: tuple[Channel, Channel]) -> None:
    left, _ = pair
    with pytest.raises(ChannelClosed, match="nothing was read for"):
        left.send({"pad": "x" * 10_000_000}, timeout_s=0.1)


@pytest.mark.parametrize(
    ("frame", "said"),
    [
        (struct.pack(">I", LARGEST_FRAME_BYTES + 1), "at most"),
        (struct.pack(">I", 4) + b"[12]", "an object"),
        (struct.pack(">I", 4) + b"\x80\x04N.", "codec|decode|Expecting"),
        (struct.pack(">I", 100) + b"{}", "hung up"),
    ],
)
def test_what_is_no_message_ends_the_channel(frame: bytes, said: str) -> None:
    sender, receiver = socket.socketpair()
    channel = Channel(receiver)
    sender.sendall(frame)
    sender.close()
    with pytest.raises(ChannelClosed, match=said):
        channel.receive(WAIT_S)
    assert channel.is_closed


class Greeted:
    """Answers whoever is let in."""

    def __init__(self) -> None:
        self.hellos: queue.Queue[Message] = queue.Queue()

    def __call__(self, channel: Channel, hello: Message) -> None:
        self.hellos.put(hello)
        channel.send({"echo": hello})


def test_who_does_not_know_the_token_is_hung_up_on() -> None:
    greeted = Greeted()
    listener = Listener((LOOPBACK, 0), "secret", greeted, name="test")
    try:
        address = (LOOPBACK, listener.port)
        for hello in ({}, {"token": "Secret"}, {"token": ""}, {"token": ["secret"]}):
            stranger = connect(address, hello, peer="the listener")
            with pytest.raises(ChannelClosed, match=r"hung up|reset"):
                stranger.receive(WAIT_S)
        assert greeted.hellos.empty()
        friend = connect(address, {"token": "secret", "name": "rank-0"}, peer="the listener")
        assert friend.receive(WAIT_S) == {"echo": {"name": "rank-0"}}
        friend.close()
    finally:
        listener.close()
    with pytest.raises(ChannelClosed, match="the listener does not answer"):
        connect(address, {}, peer="the listener")


def test_a_local_socket_is_its_owners_alone_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "service.sock"
    listener = Listener(path, None, Greeted(), name="test")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    caller = connect(path, {"ask": "status"}, peer="the service")
    assert caller.receive(WAIT_S) == {"echo": {"ask": "status"}}
    listener.close()
    assert not path.exists()
    with pytest.raises(ChannelClosed):
        caller.receive(WAIT_S)


def test_only_the_interface_that_was_named_is_listened_on() -> None:
    listener = Listener((LOOPBACK, 0), "secret", Greeted(), name="test")
    try:
        assert listener._socket.getsockname()[0] == LOOPBACK
    finally:
        listener.close()
