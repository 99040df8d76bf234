"""Whether there is memory for a change, before any is taken."""

from __future__ import annotations

from pathlib import Path

import torch

from equipoise.errors import MembershipError


def check_room(needed_bytes: int, device: torch.device, what: str) -> None:
    """Refuse what cannot be held.

    Args:
        needed_bytes: beside what is held already.
        device: where it goes.
        what: it is for.
    Collective: none.
    Raises: MembershipError that says how much is missing.
    """
    free = _find_free(device)
    if free is not None and needed_bytes > free:
        raise MembershipError(
            f"{what} takes {needed_bytes:,} bytes on {device}, and {free:,} are free: "
            f"{needed_bytes - free:,} are missing"
        )


def _find_free(device: torch.device) -> int | None:
    """Bytes that can be had; None where the system does not say."""
    if device.type == "cuda":
        # What torch holds and does not use is free too.
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = {key: value for key, _, value in (line.partition(":") for line in lines)}
    return int(found["MemAvailable"].split()[0]) << 10 if "MemAvailable" in found else None
