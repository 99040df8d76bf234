"""Where gloo listens."""

from __future__ import annotations

import os

import torch.distributed as dist


def open_gloo_device() -> dist.ProcessGroupGloo.Device:
    """A device on the interface that GLOO_SOCKET_IFNAME names, as torch's own groups have it.

    Without, gloo takes the one that the host's name leads to.

    Collective: none.
    """
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    if interface:
        return dist.ProcessGroupGloo.create_device(interface=interface)
    return dist.ProcessGroupGloo.create_default_device()
