"""What stands between a rank and its controller: it can cut, block and delay both of its lines."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections.abc import Callable

LOOPBACK = "127.0.0.1"
_LENGTH = struct.Struct(">I")

Edit = Callable[[bytes], tuple[bytes, bytes]]
"""Gets what has come and was not passed on; gives what to pass on now, and what to keep."""


class Line:
    """Passes connections on to a port of this machine. Owner: whoever makes it.

    Args:
        port: to pass on to.
        edit: may change what the far side says; None to leave it.
    """

    def __init__(self, port: int, edit: Edit | None = None) -> None:
        self._port, self._edit = port, edit
        self._lock = threading.Lock()
        self._open: set[socket.socket] = set()
        self._blocked_until = self._delay_until = 0.0
        self._delay_s = 0.0
        self._listening = socket.create_server((LOOPBACK, 0))
        self.port: int = self._listening.getsockname()[1]
        self._is_closed = False
        threading.Thread(target=self._accept, name="relay", daemon=True).start()

    def cut(self) -> None:
        """End all connections."""
        with self._lock:
            taken, self._open = self._open, set()
        for one in taken:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def block(self, seconds: float) -> None:
        """Let nothing through for so long; connections stay, and new ones wait."""
        self._blocked_until = time.monotonic() + seconds

    def delay(self, delay_s: float, seconds: float) -> None:
        """Hold back for so long whatever comes within the next seconds."""
        self._delay_s, self._delay_until = delay_s, time.monotonic() + seconds

    def close(self) -> None:
        """Let go of everything."""
        self._is_closed = True
        with contextlib.suppress(OSError):
            self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self.cut()

    def _accept(self) -> None:
        while not self._is_closed:
            try:
                near, _ = self._listening.accept()
            except OSError:
                return
            threading.Thread(target=self._join, args=(near,), name="relay", daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        self._hold()
        try:
            far = socket.create_connection((LOOPBACK, self._port))
        except OSError:
            near.close()
            return
        with self._lock:
            self._open |= {near, far}
        back = threading.Thread(
            target=self._pump, args=(near, far, None), name="relay", daemon=True
        )
        back.start()
        self._pump(far, near, self._edit)
        back.join()
        with self._lock:
            self._open -= {near, far}
        near.close()
        far.close()

    def _pump(self, source: socket.socket, sink: socket.socket, edit: Edit | None) -> None:
        kept = b""
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if edit is not None:
                    data, kept = edit(kept + data)
                if time.monotonic() < self._delay_until:
                    time.sleep(self._delay_s)
                self._hold()
                sink.sendall(data)
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)

    def _hold(self) -> None:
        while (left := self._blocked_until - time.monotonic()) > 0 and not self._is_closed:
            time.sleep(min(left, 0.05))


class Relay:
    """Both lines of one rank.

    Args:
        port: of the controller's channel; where the store is, it says there.
    """

    def __init__(self, port: int) -> None:
        self._store: Line | None = None
        self._channel = Line(port, self._redirect)

    @property
    def port(self) -> int:
        """That the rank calls."""
        return self._channel.port

    @property
    def channel(self) -> Line:
        """To the controller."""
        return self._channel

    @property
    def lines(self) -> list[Line]:
        """All that there are by now."""
        return [line for line in (self._channel, self._store) if line is not None]

    def cut_store(self) -> None:
        """End all connections to the store."""
        if self._store is not None:
            self._store.cut()

    def block_store(self, seconds: float) -> None:
        """Let nothing through to the store for so long."""
        if self._store is not None:
            self._store.block(seconds)

    def close(self) -> None:
        """Let go of everything."""
        for line in self.lines:
            line.close()

    def _redirect(self, data: bytes) -> tuple[bytes, bytes]:
        """Where the controller says at which port its store is, name the relay's instead.

        Returns: the frames that are whole, and the begin of the next.
        """
        whole = bytearray()
        while len(data) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack(data[: _LENGTH.size])[0]
            if len(data) < end:
                break
            whole += self._redirect_frame(data[:end])
            data = data[end:]
        return bytes(whole), data

    def _redirect_frame(self, frame: bytes) -> bytes:
        message = json.loads(frame[_LENGTH.size :])
        if "store" not in message:
            return frame
        if self._store is None:
            self._store = Line(message["store"][1])
        message["store"] = [LOOPBACK, self._store.port]
        body = json.dumps(message).encode()
        return _LENGTH.pack(len(body)) + body
