"""Frames of JSON over a socket: how a controller and its ranks, or a command, talk.

A frame is its length (4 bytes, big-endian) and as many bytes of JSON, an object. Nothing is ever
unpickled. Whoever connects says a secret token first; who does not is hung up on.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import logging
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equipoise.errors import MembershipError

logger = logging.getLogger(__name__)

Message = dict[str, Any]

LARGEST_FRAME_BYTES = 64 * 2**20
LOOPBACK = "127.0.0.1"
HELLO_S = 10.0
"""How long who connects has for the first frame, and who is called for the answer."""
SEND_S = 10.0
"""How long a peer may leave what is sent to it unread."""

_LENGTH = struct.Struct(">I")


class ChannelClosed(MembershipError):  # noqa: N818 - says what happened
    """The other side has gone, or was hung up on."""


class Channel:
    """One connection. Any thread sends; one thread receives.

    Args:
        connected: a stream socket, which is the channel's from here on.
        peer: who is at the other side, for messages.
    """

    def __init__(self, connected: socket.socket, peer: str = "peer") -> None:
        self.peer = peer
        self._socket = connected
        self._send_lock = threading.Lock()
        self._is_closed = False
        if connected.family in (socket.AF_INET, socket.AF_INET6):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send(self, message: Message, *, timeout_s: float = SEND_S) -> None:
        """Send one message, whole.

        Args:
            message: of JSON's types.
            timeout_s: how long the peer may leave things unread.
        Raises: ChannelClosed if the peer has gone or does not read; the channel is closed then.
        """
        body = json.dumps(message, separators=(",", ":"), allow_nan=False).encode()
        if len(body) > LARGEST_FRAME_BYTES:
            raise ValueError(f"a frame of {len(body)} bytes: at most {LARGEST_FRAME_BYTES} travel")
        left = memoryview(_LENGTH.pack(len(body)) + body)
        deadline = time.monotonic() + timeout_s
        with self._send_lock:
            try:
                while left:
                    if not self._wait(select.POLLOUT, deadline):
                        raise TimeoutError(f"nothing was read for {timeout_s:g} s")
                    with contextlib.suppress(BlockingIOError):
                        flags = socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT
                        left = left[self._socket.send(left, flags) :]
            except OSError as error:
                self.close()
                raise ChannelClosed(f"{self.peer} is gone: {error}") from error

    def receive(self, timeout_s: float | None = None) -> Message:
        """Wait for the next message.

        Args:
            timeout_s: longest wait; None where the channel's owner closes it to end the wait.
        Raises: ChannelClosed if the peer has gone, sends what is no message, or the wait is over;
            the channel is closed then.
        """
        deadline = None if timeout_s is None else time.monotonic() + timeout_s
        try:
            (size,) = _LENGTH.unpack(self._read(_LENGTH.size, deadline))
            if size > LARGEST_FRAME_BYTES:
                raise ValueError(f"a frame of {size} bytes: at most {LARGEST_FRAME_BYTES} travel")
            message = json.loads(self._read(size, deadline))
            if not isinstance(message, dict):
                raise ValueError("a frame is an object")
        except (OSError, ValueError, EOFError) as error:
            self.close()
            raise ChannelClosed(f"{self.peer} is gone: {error}") from error
        return message

    def close(self) -> None:
        """Hang up; whoever receives is woken. Twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    @property
    def local_address(self) -> str:
        """Of this side of a TCP connection."""
        return str(self._socket.getsockname()[0])

    @property
    def is_closed(self) -> bool:
        """Whether it was closed at this side."""
        return self._is_closed

    def _read(self, size: int, deadline: float | None) -> bytes:
        parts = bytearray()
        while len(parts) < size:
            if deadline is not None and not self._wait(select.POLLIN, deadline):
                raise TimeoutError("no answer in time")
            part = self._socket.recv(min(size - len(parts), 1 << 20))
            if not part:
                raise EOFError("it hung up")
            parts += part
        return bytes(parts)

    def _wait(self, event: int, deadline: float) -> bool:
        """Whether the socket was ready in time; not by its timeout, which both directions share."""
        if self._is_closed:
            raise OSError("it was hung up on")
        waiting = select.poll()
        waiting.register(self._socket, event)
        return bool(waiting.poll(max(0.0, deadline - time.monotonic()) * 1000))


class Listener:
    """Takes connections, and gives each that knows the token to its own thread.

    Args:
        address: (host, port), port 0 for a free one; or the path of a local socket that its owner
            alone may use.
        token: that the first frame must carry; None where the path's permissions say enough.
        greet: called in a thread per connection with the channel and its first frame; the channel
            is closed when it returns.
        name: for threads.
    Raises: OSError if the address cannot be taken.
    """

    def __init__(
        self,
        address: tuple[str, int] | Path,
        token: str | None,
        greet: Callable[[Channel, Message], None],
        *,
        name: str,
    ) -> None:
        self._token, self._greet, self._name = token, greet, name
        self._path = address if isinstance(address, Path) else None
        self._socket = _listen(address)
        self._is_closed = False
        self._channels: set[Channel] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, name=f"{name}-accept", daemon=True)
        self._thread.start()

    @property
    def port(self) -> int:
        """Of a TCP address."""
        port: int = self._socket.getsockname()[1]
        return port

    def close(self) -> None:
        """Take no more, and hang up on everybody. Twice is fine."""
        if self._is_closed:
            return
        self._is_closed = True
        # A shutdown wakes the thread in accept; closing alone does not.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join(HELLO_S)
        with self._lock:
            channels = list(self._channels)
        for channel in channels:
            channel.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                connected, _ = self._socket.accept()
            except OSError:
                return
            channel = Channel(connected, "whoever connected")
            threading.Thread(
                target=self._serve, args=(channel,), name=f"{self._name}-channel", daemon=True
            ).start()

    def _serve(self, channel: Channel) -> None:
        with self._lock:
            self._channels.add(channel)
        try:
            hello = channel.receive(HELLO_S)
            told = str(hello.pop("token", ""))
            if self._token is not None and not hmac.compare_digest(
                told.encode(), self._token.encode()
            ):
                logger.warning("%s: a connection without the token was hung up on", self._name)
                return
            self._greet(channel, hello)
        except ChannelClosed as error:
            logger.debug("%s: %s", self._name, error)
        finally:
            channel.close()
            with self._lock:
                self._channels.discard(channel)


def connect(
    address: tuple[str, int] | Path, hello: Message, *, timeout_s: float = HELLO_S, peer: str
) -> Channel:
    """Connect, and say who this is.

    Args:
        address: as a Listener's.
        hello: the first frame; `token` in it where one is asked for.
        timeout_s: longest wait.
        peer: who is called, for messages.
    Collective: none.
    Raises: ChannelClosed if nobody takes the call.
    """
    is_local = isinstance(address, Path)
    connected = socket.socket(socket.AF_UNIX if is_local else socket.AF_INET, socket.SOCK_STREAM)
    try:
        connected.settimeout(timeout_s)
        connected.connect(str(address) if isinstance(address, Path) else address)
        connected.settimeout(None)
    except OSError as error:
        connected.close()
        raise ChannelClosed(f"{peer} does not answer at {_say(address)}: {error}") from error
    channel = Channel(connected, peer)
    channel.send(hello)
    return channel


def _listen(address: tuple[str, int] | Path) -> socket.socket:
    if not isinstance(address, Path):
        return socket.create_server(address)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    # Between bind and chmod nobody else can connect: the mask is there from the first.
    before = os.umask(0o177)
    try:
        listening.bind(str(address))
    except OSError:
        listening.close()
        raise
    finally:
        os.umask(before)
    listening.listen()
    return listening


def _say(address: tuple[str, int] | Path) -> str:
    return str(address) if isinstance(address, Path) else f"{address[0]}:{address[1]}"
