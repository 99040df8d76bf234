"""Names and addresses of this host's network interfaces."""

from __future__ import annotations

import contextlib
import fcntl
import socket
import struct

from equipoise.errors import ConfigError

_SIOCGIFADDR = 0x8915


def find_address(interface: str) -> str:
    """The address that an interface is listened on by.

    Args:
        interface: its name, like eth0, or an address of this host.
    Collective: none.
    Raises: ConfigError if this host has no such interface.
    """
    known = list_interfaces()
    if interface in known:
        return known[interface]
    with contextlib.suppress(OSError), socket.create_server((interface, 0)) as trial:
        address = str(trial.getsockname()[0])
        if address != "0.0.0.0":  # noqa: S104 - refused: ranks could not call it
            return address
    names = ", ".join(f"{name} ({address})" for name, address in known.items())
    raise ConfigError(f"{interface}: is no interface of this host: there are {names}")


def find_name(address: str) -> str | None:
    """The interface that has an address; None if none has. Collective: none."""
    return next((name for name, its in list_interfaces().items() if its == address), None)


def list_interfaces() -> dict[str, str]:
    """First IPv4 address of each interface that has one, by name. Collective: none."""
    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        for _, name in socket.if_nameindex():
            request = struct.pack("256s", name.encode()[:15])
            with contextlib.suppress(OSError):
                answer = fcntl.ioctl(asking.fileno(), _SIOCGIFADDR, request)
                found[name] = socket.inet_ntoa(answer[20:24])
    return found
