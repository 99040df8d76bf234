"""Single ranks in the places that torchrun's processes keep; their number is torchrun's."""

from __future__ import annotations

import json
import os
import secrets
import socket
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from typing import TYPE_CHECKING, Literal

from equipoise.comm.deadline import call_in_time
from equipoise.elastic.channel import Channel, ChannelClosed, Listener, Message
from equipoise.elastic.launcher import RankHandle, RankSeat
from equipoise.errors import ConfigError, MembershipError
from equipoise.launch.keeper import Keeper, write_seat
from equipoise.launch.seats import assign_seat
from equipoise.launch.torchrun import TorchrunRank

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from equipoise.elastic.launcher import Launcher

KEY = "equipoise/launcher"
"""Where keepers find the launcher, in torchrun's store."""
GRACE_S = 3.0
_DIED = -9


class TorchrunLauncher:
    """Starts ranks where torchrun has started processes; lives in the first of them.

    Args:
        size: processes that torchrun started.
        interface: address that keepers are listened to on.
        store: torchrun's, where they find it.
    Collective: every other process of torchrun's calls `keep_place`.
    Raises: OSError if the address cannot be listened on.
    """

    def __init__(self, size: int, interface: str, store: Store) -> None:
        self._size = size
        self._token = secrets.token_hex(16)
        self._changed = threading.Condition()
        self._channels: dict[int, Channel] = {}
        self._ranks: dict[str, _KeptRank] = {}
        self._ended: str | None = None
        self._listener = Listener(
            (interface, 0), self._token, self._greet, name="equipoise-launcher"
        )
        told = {"host": interface, "port": self._listener.port, "token": self._token}
        store.set(KEY, json.dumps(told))

    @property
    def host(self) -> str:
        """Until a rank says which."""
        return "torchrun"

    def open(self, timeout_s: float) -> None:
        """Wait until every process of torchrun's can start a rank. As `Launcher.open`.

        Raises: MembershipError also if `close` is called meanwhile.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: self._ended is not None or len(self._channels) == self._size, timeout_s
            )
            if self._ended is not None:
                raise MembershipError(f"no rank is started any more: {self._ended}")
            missing = sorted(set(range(self._size)) - set(self._channels))
        if missing:
            names = ", ".join(map(str, missing))
            raise MembershipError(f"process {names} of torchrun is not there after {timeout_s:g} s")

    def find_device(self, taken: list[str]) -> str:
        """Settled by the keeper. As `Launcher.find_device`."""
        del taken
        return "cpu"

    def start(self, seat: RankSeat) -> RankHandle:
        """Have a keeper without a rank start one. As `Launcher.start`."""
        with self._changed:
            taken = {one.place for one in self._ranks.values() if one.exit_code is None}
            free = sorted(set(self._channels) - taken)
            if not free:
                raise MembershipError(
                    f"torchrun started {self._size} processes, and each has its rank: for more "
                    "ranks, start more of them"
                )
            channel = self._channels[free[0]]
            rank = _KeptRank(free[0], seat.incarnation, channel)
            self._ranks[seat.incarnation] = rank
        try:
            channel.send(write_seat(seat))
        except ChannelClosed as error:
            rank.end(_DIED)
            raise MembershipError(f"{seat.name} could not be started: {error}") from error
        return rank

    def adopt(self, seat: RankSeat, pid: int) -> RankHandle:
        """Never: torchrun ends the whole job. As `Launcher.adopt`."""
        raise MembershipError(f"{seat.name} (process {pid}) ended with the job that it was of")

    def close(self, why: str = "the launcher was closed") -> None:
        """Have all keepers end what they keep, and themselves. Twice is fine."""
        with self._changed:
            self._ended = self._ended or why
            self._changed.notify_all()
            channels = list(self._channels.values())
        for channel in channels:
            try:
                channel.send({"do": "end"})
            except ChannelClosed:
                continue
        with self._changed:
            self._changed.wait_for(lambda: not self._channels, GRACE_S)
        self._listener.close()

    def _greet(self, channel: Channel, hello: Message) -> None:
        """In a thread per keeper: hear it to its end."""
        place = int(hello["rank"])
        channel.peer = f"process {place} of torchrun"
        with self._changed:
            self._channels[place] = channel
            self._changed.notify_all()
        try:
            while True:
                self._hear(channel.receive())
        except ChannelClosed:
            with self._changed:
                self._channels.pop(place, None)
                for rank in self._ranks.values():
                    if rank.place == place:
                        rank.end(_DIED)
                self._changed.notify_all()

    def _hear(self, message: Message) -> None:
        with self._changed:
            rank = self._ranks[message["key"]]
            if message["say"] == "started":
                rank.pid = int(message["pid"])
            else:
                rank.detail = str(message["why"])
                rank.end(int(message["code"]))
                del self._ranks[message["key"]]


@dataclass
class _KeptRank:
    """A rank that a keeper has started, as it is known here."""

    place: int
    key: str
    channel: Channel
    pid: int | None = None
    detail: str = ""
    _code: int | None = None
    _has_ended: threading.Event = field(default_factory=threading.Event)

    @property
    def exit_code(self) -> int | None:
        return self._code

    def end(self, code: int) -> None:
        """It has ended; the first word stands."""
        if self._code is None:
            self._code = code
        self._has_ended.set()

    def stop(self, *, kill: bool = False) -> None:
        try:
            self.channel.send({"do": "stop", "key": self.key, "kill": kill}, timeout_s=1.0)
        except ChannelClosed:
            self.end(_DIED)

    def wait(self, timeout_s: float) -> int | None:
        self._has_ended.wait(timeout_s)
        return self._code


def keep_place(
    place: TorchrunRank,
    local: Launcher,
    device: Literal["cpu", "cuda"],
    address: tuple[str, int],
    token: str,
    open_s: float,
) -> int:
    """Keep the place of this process of torchrun's, until the service ends.

    Args:
        place: of this process.
        local: starts processes of this machine.
        device: kind of device.
        address: of the launcher.
        token: that it asks for.
        open_s: longest wait until ranks can be started here.
    Returns:
        The exit code.
    Collective: none; talks to the launcher alone.
    Raises: ConfigError without the device; MembershipError as `Keeper.run`.
    """
    seat = assign_seat(
        place.rank,
        place.size,
        local_rank=place.local_rank,
        local_size=place.local_size,
        device=device,
    )
    return Keeper(place.rank, find_node(os.environ), seat.device, local).run(address, token, open_s)


def find_launcher(store: Store, timeout_s: float) -> tuple[tuple[str, int], str]:
    """Where the launcher of the first process listens, and its token.

    Args:
        store: torchrun's.
        timeout_s: longest wait for it.
    Collective: none; the first process makes the launcher.
    Raises: MembershipError if it does not come.
    """

    def ask() -> bytes:
        store.wait([KEY], timedelta(seconds=timeout_s))
        return bytes(store.get(KEY))

    try:
        told = json.loads(call_in_time(ask, timeout_s + GRACE_S))
    except (RuntimeError, TimeoutError) as error:
        raise MembershipError(
            f"the first process of torchrun did not say where it listens within {timeout_s:g} s"
        ) from error
    return (str(told["host"]), int(told["port"])), str(told["token"])


def find_master_address(environment: Mapping[str, str]) -> str:
    """The address of this host that MASTER_ADDR names, on the first process.

    Raises: ConfigError if the name leads nowhere.
    """
    name = environment["MASTER_ADDR"]
    try:
        return socket.gethostbyname(name)
    except OSError as error:
        raise ConfigError(f"MASTER_ADDR {name}: {error}; name an address by --interface") from error


def find_node(environment: Mapping[str, str]) -> str:
    """What sets this machine apart in a job of torchrun's. Collective: none."""
    number = environment.get("GROUP_RANK")
    return socket.gethostname() if number is None else f"node-{number}"
