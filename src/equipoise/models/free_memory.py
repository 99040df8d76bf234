"""How much memory a device has left."""

from __future__ import annotations

from pathlib import Path

import torch


def find_free_bytes(device: torch.device) -> int | None:
    """Bytes that can be had; None where the system does not say. Collective: none."""
    if device.type == "cuda":
        # What torch holds and does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if "MemAvailable" in line), None)
