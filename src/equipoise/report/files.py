"""Result files: refused before the work if they cannot be written, written whole or not at all."""

from __future__ import annotations

import errno
import os
import tempfile
from pathlib import Path

from equipoise.errors import ConfigError


def check_writable(path: Path, flag: str) -> None:
    """Refuse a path that cannot become a file.

    Args:
        path: of the file to come.
        flag: that named it, for the message.
    Collective: none.
    Raises: ConfigError that names flag and path.
    """
    if path.is_dir():
        raise ConfigError(f"{flag} {path}: is a directory; name a file")
    if _is_special(path):
        if not os.access(path, os.W_OK):
            raise ConfigError(f"{flag} {path}: cannot be written: {os.strerror(errno.EACCES)}")
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise ConfigError(f"{flag} {path}: there is no directory {folder}; make it first")
    try:
        # Permissions, read-only mounts, full disks: whether it works is seen by doing it.
        with tempfile.NamedTemporaryFile(dir=folder, prefix=f".{path.name}."):
            pass
    except OSError as error:
        raise ConfigError(f"{flag} {path}: cannot be written: {error.strerror}") from error


def write_atomically(path: Path, text: str) -> None:
    """Write a file so that readers see the old one or all of the new one.

    What is no file, like /dev/null or a pipe, is written to and stays what it is.

    Args:
        path: of the file; its directory exists.
        text: in UTF-8.
    Collective: none.
    Raises: OSError if the disk refuses it; then nothing is left of it.
    """
    if _is_special(path):
        path.write_text(text, encoding="utf-8")
        return
    handle, name = tempfile.mkstemp(dir=path.absolute().parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _is_special(path: Path) -> bool:
    return path.exists() and not path.is_file()


def _umask() -> int:
    # There is no way to read it but to set it.
    mask = os.umask(0)
    os.umask(mask)
    return mask
