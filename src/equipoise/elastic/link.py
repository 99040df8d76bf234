"""A rank's side of the channel to its controller.

One thread reads, one writes and gives signs of life; the forward thread waits for neither.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import socket
import threading
import time
from collections.abc import Callable

from equipoise.elastic.channel import Channel, ChannelClosed, Message, connect
from equipoise.elastic.launcher import RankSeat
from equipoise.elastic.said import Heard, Said

logger = logging.getLogger(__name__)

BEAT_S = 0.2
"""Between two signs of life, until the rank knows better."""
RETRY_S = 0.2
"""Between two calls for a controller that has gone."""


class ControllerLink:
    """What the controller says, in order, and what is said to it.

    When the controller is gone, what is said waits; the link calls until it, or another in its
    place, answers, or too long has passed. What was lost with the channel is said again.

    Args:
        seat: of this rank.
        describe: makes what a sign of life says; called by the writing thread.
    Raises: ChannelClosed if the controller does not answer.
    """

    def __init__(self, seat: RankSeat, describe: Callable[[], Message]) -> None:
        self._seat, self._describe = seat, describe
        self._beat_s, self._orphan_s = BEAT_S, 0.0
        self._met = ""
        self._on_over: tuple[int, Callable[[], None]] | None = None
        self._inbox: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._outbox: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
        self._said, self._heard = Said(), Heard()
        # Set while the controller is known to have heard all that was said before.
        self._has_channel = threading.Event()
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        self._sending = threading.Lock()
        self._channel = self._call()
        self._reader = threading.Thread(target=self._read, name="equipoise-link-in", daemon=True)
        self._writer = threading.Thread(target=self._write, name="equipoise-link-out", daemon=True)
        self._reader.start()
        self._writer.start()

    def set_times(self, beat_s: float, orphan_s: float) -> None:
        """How often to give signs of life, and how long to call for a controller that has gone."""
        with self._lock:
            self._beat_s, self._orphan_s = beat_s, orphan_s

    def meet(self, service: str) -> None:
        """Which service this rank is of: a controller that takes the place of another asks."""
        with self._lock:
            self._met = service

    def watch(self, generation: int, on_over: Callable[[], None]) -> None:
        """What to call as soon as the controller says that a generation is over.

        The forward thread, which is told as well, may be waiting for the device just then, and the
        device for the dead.

        Args:
            generation: that this rank serves in from now on.
            on_over: called on the reading thread.
        """
        with self._lock:
            self._on_over = (generation, on_over)

    @property
    def local_address(self) -> str:
        """From which this rank reaches the controller."""
        with self._lock:
            return self._channel.local_address

    def say(self, message: Message) -> None:
        """Have a message sent, behind those before it; waits for nobody."""
        self._outbox.put(message)

    def receive(self, timeout_s: float) -> Message | None:
        """The next message of the controller; None if none comes in time.

        Beside its own there are `{"do": "orphaned"}` when it is gone, and `{"do": "abandoned"}`
        when none has answered for long enough.
        """
        try:
            if timeout_s <= 0:
                return self._inbox.get_nowait()
            return self._inbox.get(timeout=timeout_s)
        except queue.Empty:
            return None

    def close(self, wait_s: float = 2.0) -> None:
        """Hang up, once what was said has been sent or the wait is over."""
        self._outbox.put(None)
        self._writer.join(wait_s)
        self._is_closed.set()
        self._has_channel.set()
        with self._lock:
            self._channel.close()

    def _call(self) -> Channel:
        seat = self._seat
        hello = {
            "token": seat.token,
            "name": seat.name,
            "incarnation": seat.incarnation,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "node": seat.node or socket.gethostname(),
            "device": seat.device,
            "met": self._met,
            "said": self._said.count,
            "heard": self._heard.count,
        }
        return connect((seat.host, seat.port), hello, peer="the controller")

    def _read(self) -> None:
        while not self._is_closed.is_set():
            try:
                message = self._channel.receive()
                if message.get("do") == "heard":
                    self._confirm(int(message["heard"]))
                elif self._heard.is_new(message):
                    self._inbox.put(message)
                    self._look(message)
                if message.get("do") == "given up":
                    # Whoever calls again hears the same again.
                    return
            except ChannelClosed as error:
                with self._sending:
                    self._has_channel.clear()
                if self._is_closed.is_set():
                    return
                logger.warning("%s: %s; serving on without it", self._seat.name, error)
                self._inbox.put({"do": "orphaned"})
                if not self._call_again():
                    self._inbox.put({"do": "abandoned"})
                    return

    def _look(self, message: Message) -> None:
        with self._lock:
            watched = self._on_over
        if message["do"] == "over" and watched and watched[0] == message["generation"]:
            watched[1]()

    def _call_again(self) -> bool:
        with self._lock:
            deadline = time.monotonic() + self._orphan_s
        while time.monotonic() < deadline:
            try:
                channel = self._call()
            except ChannelClosed:
                if self._is_closed.wait(RETRY_S):
                    return False
                continue
            with self._sending, self._lock:
                if self._is_closed.is_set():
                    channel.close()
                    return False
                self._channel = channel
            return True
        return False

    def _confirm(self, count: int) -> None:
        """The controller has heard so many; over a new channel, the rest is said again."""
        self._said.confirm(count)
        if self._has_channel.is_set():
            return
        with self._sending, contextlib.suppress(ChannelClosed):
            for message in self._said.unheard:
                self._channel.send(message)
            self._has_channel.set()

    def _write(self) -> None:
        next_beat = time.monotonic()
        while not self._is_closed.is_set():
            if not self._has_channel.wait(RETRY_S):
                continue
            try:
                left = max(0.0, next_beat - time.monotonic())
                message = self._outbox.get(timeout=left) if left else self._outbox.get_nowait()
            except queue.Empty:
                self._send({**self._describe(), "heard": self._heard.count})
                with self._lock:
                    next_beat = time.monotonic() + self._beat_s
                continue
            if message is None:
                return
            self._send(message, is_numbered=True)

    def _send(self, message: Message, *, is_numbered: bool = False) -> None:
        with self._sending:
            if is_numbered:
                message = self._said.add(message)
            # Otherwise it has gone meanwhile, and what was said before is said first.
            if self._has_channel.is_set():
                try:
                    self._channel.send(message)
                except ChannelClosed:
                    self._has_channel.clear()
