"""What asks for more of the tests: environment variables that commands would take for options."""

from __future__ import annotations

from collections.abc import Mapping

SWITCHES = frozenset(
    f"EQUIPOISE_{name}"
    for name in (
        "ALL_FAMILIES",
        "CHANGES",
        "EXPLORE",
        "FAULTS",
        "GPU_CHANGES",
        "GPU_LAYERS",
        "SCHEDULES",
        "SEED",
        "SIMULATIONS",
        "STRESS",
    )
)


def without_switches(environment: Mapping[str, str]) -> dict[str, str]:
    """What a command of a test shall see."""
    return {name: value for name, value in environment.items() if name not in SWITCHES}
