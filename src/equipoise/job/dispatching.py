"""What the tokens of a job travel by."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

from equipoise.comm.groups import RankGroup
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.job.spec import JobSpec, check_dispatch
from equipoise.models.families import read_config
from equipoise.topology import Topology

if TYPE_CHECKING:
    from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager

_LONGEST_WAIT = timedelta(seconds=20)
"""For a peer's tokens, in a kernel: the device does nothing else meanwhile."""


class JobDispatch:
    """Makes dispatchers, and owns what they share.

    Args:
        spec: of the job.
        group: its ranks.
        max_tokens: most tokens of a rank in one forward pass.
    Raises: ConfigError or CommunicatorUnavailable if what was asked for does not work here.
    """

    def __init__(self, spec: JobSpec, group: RankGroup, max_tokens: int) -> None:
        self._buffer: NixlEPAll2AllManager | None = None
        self._create = partial(create_dispatcher, "torch")
        if spec.dispatch == "torch":
            return
        check_dispatch(spec.dispatch, spec.device, spec.dtype)
        from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
        from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions

        timeout = min(group.timeout, _LONGEST_WAIT)
        self._buffer = NixlEPAll2AllManager(group.size, group.device, timeout)
        hidden_size = int(read_config(spec.model)["hidden_size"])
        options = NixlEPOptions(self._buffer, max_tokens, hidden_size)
        self._create = partial(create_dispatcher, options)

    def create(self, group: RankGroup, topology: Topology) -> TokenDispatcher:
        """Make one. Collective: every rank of the group."""
        return self._create(group, topology)

    def close(self) -> None:
        """Release what dispatchers share, after they are closed; twice is fine."""
        if self._buffer is not None:
            self._buffer.close()
