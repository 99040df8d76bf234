"""What a controller leaves behind for the one that is started in its place."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import stat
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from equipoise.errors import ConfigError

_FORMAT = 1


@dataclass(frozen=True)
class ControllerState:
    """Where ranks call their controller, and what they must hear from it.

    Attributes:
        service: sets it apart from others; controllers that follow each other have the same.
        host: that it listens on.
        port: that it listens on.
        token: that a rank's first frame must carry; a secret.
        spec: of the service, as JSON.
    """

    service: str
    host: str
    port: int
    token: str = field(repr=False)
    spec: Mapping[str, Any]


class StateFile:
    """A file for its owner alone, of one living controller at a time.

    A lock that ends with the process tells a controller that lives from one that was killed.

    Args:
        path: of the file; its folder is there.
    Raises: ConfigError if another controller has it, or what is there is not this user's alone, or
        is not a controller's.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock_path = path.with_name(f"{path.name}.lock")
        if path.is_dir():
            raise ConfigError(f"{path}: is a directory; name a file")
        try:
            self._lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise ConfigError(f"{path}: no state can be kept there: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.found = self._read()
        except BlockingIOError as error:
            os.close(self._lock)
            raise ConfigError(f"{path}: a living controller has it; name another file") from error
        except BaseException:
            os.close(self._lock)
            raise

    def write(self, state: ControllerState) -> None:
        """Put a state in place of what was there, whole or not at all.

        Raises: OSError.
        """
        new = self.path.with_name(f"{self.path.name}.{secrets.token_hex(4)}")
        data = json.dumps({"format_version": _FORMAT, **asdict(state)}).encode()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            new.replace(self.path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def close(self, *, keep: bool) -> None:
        """Let another controller have it; twice is fine.

        Args:
            keep: whether what it says is left there.
        """
        if self._lock < 0:
            return
        if not keep:
            self.path.unlink(missing_ok=True)
            self._lock_path.unlink(missing_ok=True)
        lock, self._lock = self._lock, -1
        os.close(lock)

    def _read(self) -> ControllerState | None:
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from error
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(file.fileno())
            if about.st_uid != os.getuid() or stat.S_IMODE(about.st_mode) & 0o077:
                raise ConfigError(f"{self.path}: must be this user's, and closed to others")
            text = file.read()
        with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
            data = json.loads(text)
            if data.pop("format_version") == _FORMAT:
                return ControllerState(**data)
        raise ConfigError(f"{self.path}: is no state of a controller; remove it, or name another")
