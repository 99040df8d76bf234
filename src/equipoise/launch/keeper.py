"""A process of torchrun's that keeps one place of a service: starts a rank there, and watches it.

The rank is a process of its own, so that its death is not the keeper's: torchrun ends a whole job
as soon as one of its processes has ended.
"""

from __future__ import annotations

import logging
import os
import threading
from dataclasses import asdict

from equipoise.elastic.channel import Channel, ChannelClosed, Message, connect
from equipoise.elastic.launcher import Launcher, RankHandle, RankSeat
from equipoise.errors import MembershipError

logger = logging.getLogger(__name__)

LOOK_S = 0.05
"""Between two looks at whether the rank still runs."""


class Keeper:
    """Does what the launcher of the first rank says, until that is over.

    Args:
        rank: number that torchrun gave this process.
        node: ranks of one machine say the same.
        device: for the rank.
        local: starts processes of this machine.
    """

    def __init__(self, rank: int, node: str, device: str, local: Launcher) -> None:
        self._rank, self._node, self._device, self._local = rank, node, device, local
        self._handles: dict[str, RankHandle] = {}

    def run(self, address: tuple[str, int], token: str, open_s: float) -> int:
        """Keep the place until the launcher says that it is over, or has gone.

        Args:
            address: of the launcher.
            token: that it asks for.
            open_s: longest wait until ranks can be started here.
        Returns:
            The exit code: 0 where it was told to end.
        Collective: none; talks to the launcher alone.
        Raises: MembershipError if nothing can be started here, or the launcher does not answer.
        """
        self._local.open(open_s)
        hello = {"token": token, "rank": self._rank, "pid": os.getpid()}
        channel = connect(address, hello, peer="the launcher")
        try:
            while True:
                message = channel.receive()
                if message["do"] == "end":
                    return 0
                if message["do"] == "start":
                    self._start(channel, message)
                else:
                    self._stop(message)
        except ChannelClosed as error:
            logger.error("process %d of torchrun: %s", self._rank, error)
            return 1
        finally:
            channel.close()
            self._local.close()

    def _start(self, channel: Channel, message: Message) -> None:
        seat = RankSeat(**{**message["seat"], "node": self._node, "device": self._device})
        try:
            handle = self._local.start(seat)
        except MembershipError as error:
            channel.send({"say": "ended", "key": seat.incarnation, "code": 1, "why": str(error)})
            return
        self._handles[seat.incarnation] = handle
        channel.send({"say": "started", "key": seat.incarnation, "pid": handle.pid})
        threading.Thread(
            target=_watch,
            args=(channel, seat.incarnation, handle),
            name=f"equipoise-watch-{seat.name}",
            daemon=True,
        ).start()

    def _stop(self, message: Message) -> None:
        handle = self._handles.get(message["key"])
        if handle is not None:
            handle.stop(kill=message["kill"])


def write_seat(seat: RankSeat) -> Message:
    """What a keeper is told to start. Collective: none."""
    return {"do": "start", "seat": asdict(seat)}


def _watch(channel: Channel, key: str, handle: RankHandle) -> None:
    """Tell of a rank's end."""
    code: int | None = None
    while code is None and not channel.is_closed:
        code = handle.wait(LOOK_S)
    if code is not None:
        try:
            channel.send({"say": "ended", "key": key, "code": code, "why": ""})
        except ChannelClosed:
            logger.debug("nobody hears that a rank has ended with %d", code)
