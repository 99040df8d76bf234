"""The only place that knows NIXL: an agent, its memory, its peers, its READs."""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import logging
import os
import secrets
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch

from equipoise.comm.spans import Spans
from equipoise.errors import CommunicatorUnavailable

logger = logging.getLogger(__name__)

_INSTALL = "pip install 'equipoise[nixl]'"

_UCX_SETTINGS = MappingProxyType(
    {
        # UCX keeps registrations of released memory; without a bound they grow with every round.
        "UCX_RCACHE_MAX_UNRELEASED": "1024",
        # The progress thread copies under UCX's lock, which is a spin lock unless told otherwise:
        # a rank that polls meanwhile burns a whole core. On two cores, READs took twice as long.
        "UCX_USE_MT_MUTEX": "y",
    }
)
# Between processes of a host every call of the kernel that copies costs 8 us besides; in UCX's
# steps of 512 KB that was a sixth of the time. Whoever names transports may leave this one out,
# and UCX complains of settings that it has no use for.
_UCX_WITH_ANY_TRANSPORT = MappingProxyType({"UCX_CMA_SEG_SIZE": "4m"})

# NIXL's own Python class leaves this at 0, and an idle agent then takes a whole core. With another
# value the progress thread sleeps until UCX has something for it, or so long.
_PROGRESS_DELAY_US = 10_000

# Loading the InfiniBand modules of the 1.5.1 wheels makes Python crash in libnl when it exits.
_UCX_WITHOUT_INFINIBAND = MappingProxyType({"UCX_MODULES": "^ib"})


def has_nixl() -> bool:
    """Whether NIXL, or RIXL, can be imported here. Collective: none."""
    try:
        _load()
    except CommunicatorUnavailable:
        return False
    return True


def warm_up() -> None:
    """Load NIXL and UCX, where they are: for a process that ranks are forked from.

    UCX patches what allocates memory as it is loaded, which takes 0.4 s of a core; who is forked
    from a process that has loaded it need not wait for that.

    Collective: none; no thread is started, and nothing opened.
    """
    if not has_nixl():
        return
    nixl = _load()
    config = nixl.nixlAgentConfig()
    config.useProgThread = False
    config.useListenThread = False
    config.captureTelemetry = False
    try:
        nixl.nixlAgent("equipoise-warm-up", config).getPluginParams("UCX")
    except Exception as error:
        # A rank that needs it says so, better.
        logger.debug("UCX was not loaded ahead: %s", error)


class WireError(Exception):
    """NIXL refused, or could not do, what was asked of it.

    Attributes:
        lost: the peer is gone.
    """

    def __init__(self, message: str, *, lost: bool = False) -> None:
        super().__init__(message)
        self.lost = lost


@dataclass(frozen=True, eq=False)
class Registration:
    """Memory that NIXL knows."""

    descriptors: Any


@dataclass(frozen=True, eq=False)
class Read:
    """A READ that is ready, or under way.

    Attributes:
        handle: NIXL's.
        buffers: what it writes to, kept alive as long as it may.
    """

    handle: Any
    buffers: tuple[object, ...]


class Agent:
    """One NIXL agent with a name that no other has, on this host or elsewhere.

    Owner: one thread at a time; agents do not share anything.

    Args:
        device: where the memory is that it registers.
    Raises: CommunicatorUnavailable if NIXL is not installed, or cannot start here.
    """

    def __init__(self, device: torch.device) -> None:
        self._nixl = nixl = _load()
        self._memory: Any = nixl.DRAM_SEG if device.type == "cpu" else nixl.VRAM_SEG
        self.memory: Literal["DRAM", "VRAM"] = "DRAM" if device.type == "cpu" else "VRAM"
        self.device_id = device.index or 0
        self.name = f"equipoise-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(8)}"
        found = [value for value in vars(nixl).values() if isinstance(value, type)]
        self._errors = tuple(value for value in found if issubclass(value, Exception))
        config = nixl.nixlAgentConfig()
        config.useProgThread = True
        config.pthrDelay = _PROGRESS_DELAY_US
        config.useListenThread = False
        config.captureTelemetry = False
        try:
            self._agent: Any = nixl.nixlAgent(self.name, config)
            self._agent.createBackend("UCX", {})
        except self._errors as error:
            raise CommunicatorUnavailable(
                f"NIXL is installed and cannot start UCX here ({error}): {_INSTALL} brings one "
                "that can"
            ) from error
        self._registrations: set[Registration] = set()
        self._reads: set[Read] = set()
        self._posted: set[Read] = set()
        self._peers: set[str] = set()
        self._is_quarantined = False

    @property
    def num_open(self) -> int:
        """Registrations, READs, peers, and the agent itself, that are not released."""
        held = len(self._registrations) + len(self._reads) + len(self._peers)
        return held + (self._agent is not None)

    def register(self, spans: Spans) -> Registration:
        """Make memory known to NIXL; at least one span."""
        table = self._describe(spans, self.device_id)
        registration = Registration(self._nixl.nixlRegDList(self._memory, table))
        self._agent.registerMem(registration.descriptors)
        self._registrations.add(registration)
        return registration

    def deregister(self, registration: Registration) -> None:
        """Let go of memory that no READ names."""
        self._agent.deregisterMem(registration.descriptors)
        self._registrations.remove(registration)

    def describe(self) -> bytes:
        """What peers need to reach this agent and all that it has registered by now."""
        metadata: bytes = self._agent.getLocalMD()
        return metadata

    def connect(self, metadata: bytes) -> str:
        """Take up a peer from what it `describe`s.

        Returns:
            Its name.
        Raises: WireError if there is no way to it.
        """
        try:
            name: str = self._agent.loadRemoteMD(metadata).decode()
            self._peers.add(name)
            self._agent.makeConnection(name, [])
        except self._errors as error:
            raise self._explain(error) from error
        return name

    def notify(self, name: str, message: bytes) -> None:
        """Send a peer a notification; never waits for it.

        Raises: WireError if the peer is gone.
        """
        try:
            self._agent.genNotif(name, message)
        except self._errors as error:
            raise self._explain(error) from error

    def take_notifications(self) -> dict[str, list[bytes]]:
        """What has come, by the sender's name; each is returned once."""
        taken: dict[str, list[bytes]] = self._agent.getNotifs({})
        return taken

    def prepare_read(
        self,
        name: str,
        local: Spans,
        remote: Spans,
        remote_device_id: int,
        message: bytes,
        buffers: tuple[object, ...],
    ) -> Read:
        """Make ready to fill local memory from a peer's; nothing is written before `post`.

        Args:
            name: the peer.
            local: where to, all registered here.
            remote: where from, all registered there; span by span as long as `local`.
            remote_device_id: of the peer's memory.
            message: what the peer is notified of when all has been read.
            buffers: what to keep alive until then.
        Raises: WireError if the peer is gone, or its memory is not what it described.
        """
        here = self._nixl.nixlXferDList(self._memory, self._describe(local, self.device_id))
        there = self._nixl.nixlXferDList(self._memory, self._describe(remote, remote_device_id))
        try:
            handle = self._agent.createXferReq(self._nixl.NIXL_READ, here, there, name, message)
        except self._errors as error:
            raise self._explain(error) from error
        read = Read(handle, buffers)
        self._reads.add(read)
        return read

    def post(self, read: Read) -> None:
        """Begin a READ that is ready.

        Raises: WireError if the peer is gone.
        """
        self._posted.add(read)
        try:
            self._agent.postXferReq(read.handle)
        except self._errors as error:
            raise self._explain(error) from error

    def is_complete(self, read: Read) -> bool:
        """Whether all has arrived. Raises: WireError if it never will."""
        try:
            status = self._agent.getXferStatus(read.handle)
        except self._errors as error:
            raise self._explain(error) from error
        if status not in (self._nixl.NIXL_SUCCESS, self._nixl.NIXL_IN_PROG):
            raise WireError(f"a READ ended with {status}")
        return bool(status == self._nixl.NIXL_SUCCESS)

    @property
    def has_reads(self) -> bool:
        """Whether there are READs that were posted and not released."""
        return bool(self._posted)

    def release(self, read: Read) -> None:
        """Forget a READ that is complete."""
        self._agent.releaseXferReq(read.handle)
        self._reads.remove(read)
        self._posted.discard(read)

    def release_ended(self) -> None:
        """Forget all READs that have ended, well or not."""
        for read in list(self._reads):
            # NIXL refuses to release what it could not stop: that has not ended.
            with contextlib.suppress(*self._errors):
                if self._has_ended(read):
                    self.release(read)

    def quarantine(self) -> None:
        """Keep this agent, its memory and its READs' buffers until the process ends.

        A READ that has not ended may still write, even after its handle was released.
        """
        if not self._is_quarantined:
            self._is_quarantined = True
            logger.warning("%d NIXL READs have not ended: their memory is kept", len(self._posted))
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(self))

    def close(self) -> None:
        """Release everything, or with READs that have not ended nothing; twice is fine.

        Collective: none; waits for no peer.
        """
        if self._agent is None:
            return
        self.release_ended()
        if self._posted:
            self.quarantine()
            return
        for name in list(self._peers):
            self._agent.invalidateRemoteMD(name)
            self._peers.remove(name)
        for registration in list(self._registrations):
            self.deregister(registration)
        self._agent = None

    def _has_ended(self, read: Read) -> bool:
        if read not in self._posted:
            return True
        try:
            return self.is_complete(read)
        except WireError:
            return True

    def _describe(self, spans: Spans, device_id: int) -> np.ndarray[Any, np.dtype[np.uint64]]:
        device = np.full_like(spans.address, device_id)
        return np.stack((spans.address, spans.num_bytes, device), axis=1).astype(np.uint64)

    def _explain(self, error: Exception) -> WireError:
        return WireError(
            f"NIXL says {error}", lost=isinstance(error, self._nixl.nixlRemoteDisconnectError)
        )


def _list_modules() -> tuple[str, ...]:
    """The package that picks a build by CUDA version, the builds alone, and ROCm's namesake."""
    builds = ("nixl_cu13", "nixl_cu12")
    if (torch.version.cuda or "").startswith("12."):
        builds = ("nixl_cu12", "nixl_cu13")
    return ("nixl", *builds, "rixl")


def _load() -> Any:
    """The module with NIXL's bindings. Raises: CommunicatorUnavailable."""
    _set_ucx_defaults()
    reasons = []
    for name in _list_modules():
        try:
            return importlib.import_module(f"{name}._bindings")
        except ImportError as error:
            reasons.append(str(error))
    raise CommunicatorUnavailable(
        f"the communicator nixl needs NIXL: {_INSTALL} ({'; '.join(reasons)})"
    )


def _set_ucx_defaults() -> None:
    """Set what UCX reads from the environment when it is loaded; the user's values stand."""
    wanted = dict(_UCX_SETTINGS)
    if not any(Path("/sys/class/infiniband").glob("*")):
        wanted.update(_UCX_WITHOUT_INFINIBAND)
    if "UCX_TLS" not in os.environ:
        wanted.update(_UCX_WITH_ANY_TRANSPORT)
    missing = {name: value for name, value in wanted.items() if name not in os.environ}
    early = [name for name in _list_modules() if f"{name}._bindings" in sys.modules]
    if early and "UCX_RCACHE_MAX_UNRELEASED" in missing:
        logger.warning(
            "%s was imported before Equipoise could set UCX_RCACHE_MAX_UNRELEASED: its cache of "
            "registrations may grow without bound; set it to 1024 in the environment",
            early[0],
        )
    os.environ.update(missing)
