"""A local socket, for its owner alone, by which commands reach a running service."""

from __future__ import annotations

import contextlib
import os
import socket
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

from equipoise.elastic.channel import Channel, ChannelClosed, Listener, Message, connect
from equipoise.elastic.service import QueueFull, Service, ServiceClosed
from equipoise.errors import ConfigError, EquipoiseError, MembershipError

ANSWER_S = 10.0
"""Longest wait for an answer beyond what was asked for takes itself."""

_SUFFIX = ".sock"
_ERRORS = MappingProxyType(
    {
        kind.__name__: kind
        for kind in (ConfigError, MembershipError, ServiceClosed, QueueFull, TimeoutError)
    }
)


class ControlSocket:
    """Answers commands about a service until it is closed.

    Args:
        service: asked in a thread per command.
        path: of the socket; None for one of this process among `find_sockets`.
    Raises: ConfigError if the path is taken or cannot be made.
    """

    def __init__(self, service: Service, path: Path | None = None) -> None:
        self._service = service
        self.path = path or make_folder() / f"{os.getpid()}{_SUFFIX}"
        _clear_stale(self.path)
        try:
            self._listener = Listener(self.path, None, self._answer, name="equipoise-control")
        except OSError as error:
            raise ConfigError(f"{self.path}: no socket can be made there: {error}") from error

    def close(self) -> None:
        """Answer no more; the path is free again. Twice is fine."""
        self._listener.close()

    def _answer(self, channel: Channel, asked: Message) -> None:
        orders: dict[str, Callable[[Message], Any]] = {
            "status": lambda _: self._service.status().to_json(),
            "placement": lambda _: self._service.placement(),
            "rebalance": lambda _: self._service.rebalance(),
            "scale": lambda options: self._service.scale(**options).to_json(),
        }
        what = str(asked.pop("ask", ""))
        try:
            if what not in orders:
                raise ConfigError(f"cannot be asked {what!r}: ask one of {', '.join(orders)}")
            answer: Message = {"answer": orders[what](asked)}
        except (EquipoiseError, TimeoutError, TypeError) as error:
            kind = next((k for k, v in _ERRORS.items() if isinstance(error, v)), "ConfigError")
            answer = {"error": kind, "text": str(error)}
        with contextlib.suppress(ChannelClosed):  # who asked has left
            channel.send(answer)


def ask(path: Path, what: str, *, takes_s: float = 0.0, **options: Any) -> Any:
    """Ask a running service something.

    Args:
        path: of its socket.
        what: "status", "placement", "scale" or "rebalance".
        takes_s: how long the service may take over it.
        options: of what is asked, as the service's method takes them.
    Returns:
        what the service answers, of JSON's types.
    Collective: none.
    Raises: what the service's method raises; MembershipError if nobody answers.
    """
    channel = connect(path, {"ask": what, **options}, peer="the service")
    try:
        answer = channel.receive(takes_s + ANSWER_S)
    finally:
        channel.close()
    if "error" in answer:
        raise _ERRORS[answer["error"]](answer["text"])
    return answer["answer"]


def make_folder() -> Path:
    """The folder of this user's sockets, made where it is not there.

    Raises: ConfigError if it is somebody else's, or open to others.
    """
    root = os.environ.get("XDG_RUNTIME_DIR")
    folder = Path(root or tempfile.gettempdir()) / f"equipoise-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise ConfigError(f"{folder}: must be a folder of this user that is closed to others")
    return folder


def find_sockets() -> list[Path]:
    """Sockets of this user's services on this machine that somebody answers. Collective: none."""
    return [path for path in sorted(make_folder().glob(f"*{_SUFFIX}")) if _is_answered(path)]


def _is_answered(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trying:
        trying.settimeout(ANSWER_S)
        try:
            trying.connect(str(path))
        except OSError:
            return False
    return True


def _clear_stale(path: Path) -> None:
    """Make room for a socket where one was left by a process that was killed."""
    if not path.exists():
        return
    if not stat.S_ISSOCK(path.lstat().st_mode):
        raise ConfigError(f"{path}: is there, and is no socket; name another path")
    if _is_answered(path):
        raise ConfigError(f"{path}: a running service answers there; name another path")
    path.unlink()
