"""What UCX finds on this machine, as it says itself."""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import DependencyError

# Source: ucp.h of UCX 1.x, whose library reads those fields alone that the mask names.
_PARAM_FEATURES = 1 << 0
_FEATURE_RMA = 1 << 1

_RESOURCE = re.compile(r"^# +resource +\d+ .* -- (\S+)$", re.MULTILINE)


class _Params(ctypes.Structure):
    _fields_ = (
        ("field_mask", ctypes.c_uint64),
        ("features", ctypes.c_uint64),
        ("not_named", ctypes.c_char * 1024),
    )


@dataclass(frozen=True)
class Ucx:
    """The UCX that NIXL uses.

    Attributes:
        version: as the library says.
        library: file that it was loaded from.
        resources: "transport/device", as UCX lists them for READs.
    """

    version: str
    library: str
    resources: tuple[str, ...]

    @property
    def transports(self) -> tuple[str, ...]:
        """Names of transports, each once."""
        return tuple(dict.fromkeys(resource.partition("/")[0] for resource in self.resources))


def ask_ucx() -> Ucx:
    """Let the UCX that this process has loaded list what it could read over.

    Its settings are those of this process: UCX_TLS and the like leave transports out.

    Collective: none.
    Raises: DependencyError if no UCX is loaded, or it does not answer.
    """
    path = _find_loaded()
    # Loaded already: this finds the same one again, not another of the system.
    ucp = ctypes.CDLL(path)
    ucp.ucp_get_version_string.restype = ctypes.c_char_p
    version = ucp.ucp_get_version_string().decode()
    major, minor, release = (ctypes.c_uint() for _ in range(3))
    ucp.ucp_get_version(ctypes.byref(major), ctypes.byref(minor), ctypes.byref(release))
    params = _Params(field_mask=_PARAM_FEATURES, features=_FEATURE_RMA)
    context = ctypes.c_void_p()
    status = ucp.ucp_init_version(major, minor, ctypes.byref(params), None, ctypes.byref(context))
    if status:
        raise DependencyError(f"UCX {version} ({path}) does not start: status {status}")
    try:
        text = _print_context(ucp, context)
    finally:
        ucp.ucp_cleanup(context)
    resources = tuple(_RESOURCE.findall(text))
    if not resources:
        raise DependencyError(
            f"UCX {version} ({path}) lists no transport in a form that is known here"
        )
    return Ucx(version, path, resources)


def _find_loaded() -> str:
    """Path of the libucp in this process."""
    maps = Path("/proc/self/maps").read_text().splitlines()
    fields = (line.split(maxsplit=5) for line in maps)
    paths = {field[5] for field in fields if len(field) == 6}
    found = sorted(path for path in paths if re.match(r"libucp\b", Path(path).name))
    if not found:
        raise DependencyError("no libucp is loaded in this process")
    return found[0]


def _print_context(ucp: ctypes.CDLL, context: ctypes.c_void_p) -> str:
    """What `ucp_context_print_info` writes to a C stream."""
    libc = ctypes.CDLL(None)
    libc.fdopen.restype = ctypes.c_void_p
    handle = os.memfd_create("ucx")
    stream = ctypes.c_void_p(libc.fdopen(os.dup(handle), b"w"))
    ucp.ucp_context_print_info(context, stream)
    libc.fclose(stream)
    with os.fdopen(handle, "rb") as file:
        file.seek(0)
        return file.read().decode(errors="replace")
