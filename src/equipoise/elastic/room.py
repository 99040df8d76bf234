"""Whether there is memory for a change, before any is taken."""

from __future__ import annotations

import torch

from equipoise.errors import MembershipError
from equipoise.models.free_memory import find_free_bytes


def check_room(needed_bytes: int, device: torch.device, what: str) -> None:
    """Refuse what cannot be held.

    Args:
        needed_bytes: beside what is held already.
        device: where it goes.
        what: it is for.
    Collective: none.
    Raises: MembershipError that says how much is missing.
    """
    free = find_free_bytes(device)
    if free is not None and needed_bytes > free:
        raise MembershipError(
            f"{what} takes {needed_bytes:,} bytes on {device}, and {free:,} are free: "
            f"{needed_bytes - free:,} are missing"
        )
