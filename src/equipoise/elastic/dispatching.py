"""What the tokens of a rank travel by, in each of its generations."""

from __future__ import annotations

from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING

import torch

from equipoise.dispatch import create_dispatcher
from equipoise.elastic.spec import PREFILL_CHUNK, ServiceSpec
from equipoise.models.families import read_config

if TYPE_CHECKING:
    from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
    from equipoise.models.parallel import MakeDispatcher

_LONGEST_WAIT_S = 20.0
"""For a peer's tokens, in a kernel: the device does nothing else meanwhile."""


class RankDispatch:
    """Makes dispatchers, and owns what they share for as long as the process lives.

    Args:
        spec: of the service.
        device: of the rank.
    Raises: CommunicatorUnavailable if what was asked for does not work here.
    """

    def __init__(self, spec: ServiceSpec, device: torch.device) -> None:
        self._buffer: NixlEPAll2AllManager | None = None
        self.create: MakeDispatcher = partial(create_dispatcher, "torch")
        if spec.dispatch == "torch":
            return
        from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
        from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions

        assert spec.max_ranks is not None, "the spec has seen to it"
        timeout = timedelta(seconds=min(spec.timeout_s, _LONGEST_WAIT_S))
        self._buffer = NixlEPAll2AllManager(spec.max_ranks, device, timeout)
        hidden_size = int(read_config(spec.model)["hidden_size"])
        # Prompts beside running sequences, or a text to be scored.
        max_tokens = max(PREFILL_CHUNK + spec.max_batch_size, spec.max_len)
        options = NixlEPOptions(self._buffer, max_tokens, hidden_size)
        self.create = partial(create_dispatcher, options)

    def close(self) -> None:
        """Release what dispatchers share, after they are closed; twice is fine."""
        if self._buffer is not None:
            self._buffer.close()
