"""What options of benchmarks are refused for, in the same words everywhere."""

from __future__ import annotations

from equipoise.errors import ConfigError


def check_least(*options: tuple[str, int, int]) -> None:
    """Refuse numbers that are too small.

    Args:
        options: flag, value and the least that it may be.
    Raises: ConfigError that names the first one.
    """
    for flag, value, least in options:
        if value < least:
            raise ConfigError(f"{flag} must be at least {least}, got {value}")


def check_positive(*options: tuple[str, float]) -> None:
    """Refuse what is not above 0, or without end.

    Args:
        options: flag and value.
    Raises: ConfigError that names the first one.
    """
    for flag, value in options:
        if not 0 < value < float("inf"):
            raise ConfigError(f"{flag} must be a number above 0, got {value}")
