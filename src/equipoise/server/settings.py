"""Where a server listens, whom it lets in, and how much it takes."""

from __future__ import annotations

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from equipoise.errors import ConfigError

API_KEY, ADMIN_KEY = "EQ_API_KEY", "EQ_ADMIN_KEY"
"""Environment variables; with `_FILE` behind them, of a file that holds the key. All those that
begin with EQUIPOISE_ are balancing options, which `equipoise doctor` shows."""
SHORTEST_KEY = 16


@dataclass(frozen=True)
class Keys:
    """What clients must show, as `Authorization: Bearer KEY`.

    Attributes:
        api: opens what uses or reads the service.
        admin: opens that and what changes the service.
    """

    api: str = field(repr=False)
    admin: str = field(repr=False)


@dataclass(frozen=True)
class ServerLimits:
    """How much a server takes.

    Attributes:
        body_bytes: of a request.
        body_timeout_s: from a connection's first byte of a request to the last of its body.
        request_timeout_s: from there to the last token.
        drain_timeout_s: for what is in flight when the server is told to end.
        num_connections: at once; more are answered 503.
    """

    body_bytes: int = 1 << 20
    body_timeout_s: float = 30.0
    request_timeout_s: float = 600.0
    drain_timeout_s: float = 30.0
    num_connections: int = 1024

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ConfigError(f"{name} must be above 0, got {value}")


@dataclass(frozen=True)
class ServerSettings:
    """Of one server.

    Attributes:
        host: an address to bind to.
        port: 0 takes one that is free.
        keys: None lets everybody in, on loopback only.
        limits: how much it takes.
        model_name: by which clients know the model; None for the service's.
        log_prompts: whether the log holds what clients ask and get.
        log_health: whether the log has a line for each look at the server's health.
    Raises: ConfigError if others than this machine could come in without keys.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    keys: Keys | None = None
    limits: ServerLimits = field(default_factory=ServerLimits)
    model_name: str | None = None
    log_prompts: bool = False
    log_health: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port < 1 << 16:
            raise ConfigError(f"--port must be from 0 to 65535, got {self.port}")
        if self.keys is None and not is_loopback(self.host):
            raise ConfigError(
                f"--host {self.host} lets other machines in: set {API_KEY} and {ADMIN_KEY} (or "
                f"{API_KEY}_FILE and {ADMIN_KEY}_FILE), or bind to 127.0.0.1"
            )


def is_loopback(host: str) -> bool:
    """Whether an address or name reaches this machine from itself alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(environment: Mapping[str, str]) -> Keys | None:
    """The keys that the environment names; None if it names none.

    Raises: ConfigError, naming the variable and never the key, if there is one key without the
        other, they are the same, or one is short, cannot be read or cannot stand in a header.
    """
    api, admin = (read_key(environment, name) for name in (API_KEY, ADMIN_KEY))
    if api is None and admin is None:
        return None
    if api is None or admin is None:
        missing = API_KEY if api is None else ADMIN_KEY
        raise ConfigError(
            f"{missing} is not set: there is one key for the users of a server and another for "
            "those who change it; set both"
        )
    if api == admin:
        raise ConfigError(f"{API_KEY} and {ADMIN_KEY} are the same: give them different keys")
    return Keys(api, admin)


def read_key(environment: Mapping[str, str], name: str) -> str | None:
    """One key, from a variable of this name or the file that one with `_FILE` behind it names.

    Raises: ConfigError, as `read_keys`.
    """
    in_file = environment.get(f"{name}_FILE")
    key = environment.get(name)
    if in_file is not None and key is not None:
        raise ConfigError(f"{name} and {name}_FILE are both set: set one of them")
    if in_file is not None:
        name = f"{name}_FILE {in_file}"
        try:
            key = Path(in_file).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ConfigError(f"{name}: cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{name}: is not text") from error
    if key is None:
        return None
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ConfigError(f"{name}: a key is of printable ASCII characters without spaces")
    if len(key) < SHORTEST_KEY:
        raise ConfigError(f"{name}: a key has at least {SHORTEST_KEY} characters")
    return key
