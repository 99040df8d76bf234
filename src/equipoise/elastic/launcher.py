"""What starts and ends the processes of single ranks, at any time."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

UNKNOWN_EXIT = 256
"""The exit code of a process whose parent is another, once it has ended."""


@dataclass(frozen=True)
class RankSeat:
    """What a rank's process is given when it starts; all else comes over its channel.

    Attributes:
        name: that it keeps, like "rank-3".
        incarnation: sets it apart from earlier ranks of that name.
        host: of the controller's channel.
        port: of the controller's channel.
        token: that its first frame must carry; a secret.
        device: as torch names it, like "cpu" or "cuda:1".
        num_threads: for torch.
        node: of its process: ranks of one node say the same; empty for the host's name.
    """

    name: str
    incarnation: str
    host: str
    port: int
    token: str = field(repr=False)
    device: str = "cpu"
    num_threads: int = 1
    node: str = ""


class RankHandle(Protocol):
    """A process that was started. Owner: the thread that started it."""

    @property
    def pid(self) -> int | None:
        """Of the process, on its host; None until it is known."""

    @property
    def exit_code(self) -> int | None:
        """None while it runs or is about to; negative for a signal. Does not wait.

        UNKNOWN_EXIT of an adopted process that has ended.
        """

    @property
    def detail(self) -> str:
        """Why it has ended, where the launcher knows more than the exit code; else empty."""

    def stop(self, *, kill: bool = False) -> None:
        """Ask it to end, or make it; does not wait."""

    def wait(self, timeout_s: float) -> int | None:
        """As `exit_code`, after waiting for the end."""


class Launcher(Protocol):
    """Starts ranks. Owner: the controller's thread."""

    @property
    def host(self) -> str:
        """Where its ranks run, for people; a rank that calls says it better."""

    def open(self, timeout_s: float) -> None:
        """Wait until ranks can be started at once. Any thread, before the first is.

        Raises: MembershipError if that takes longer.
        """

    def find_device(self, taken: list[str]) -> str:
        """A device for another rank.

        Args:
            taken: devices of the ranks that live.
        Raises: ConfigError if there is none.
        """

    def start(self, seat: RankSeat) -> RankHandle:
        """Start a process that calls `equipoise.elastic.rank.run_rank(seat)`; does not wait for it.

        Raises: MembershipError if it cannot be started.
        """

    def adopt(self, seat: RankSeat, pid: int) -> RankHandle:
        """Take over a process that the launcher of a controller before this one had started.

        Args:
            seat: as the process says.
            pid: as the process says.
        Raises: MembershipError if it cannot be.
        """

    def close(self) -> None:
        """End whatever it started or adopted and still runs. Twice is fine."""
