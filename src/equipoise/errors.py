"""The error tree.

EquipoiseError
├── ConfigError (ValueError)        an option or a configuration key is wrong
├── PlacementError (ValueError)     a placement cannot be, or does not fit
├── TraceError (ValueError)         a load file cannot be read as one
├── ModelError (ValueError)         a model or a checkpoint cannot be taken over
├── DependencyError (ImportError)   an optional package is not installed; says how to
├── CommunicatorUnavailable         a wire cannot work here; says what to install
├── TransferError                   weights did not arrive; names the ranks
└── MembershipError                 the set of ranks is not what it must be
"""

from __future__ import annotations


class EquipoiseError(Exception):
    """Root of every error that Equipoise raises on purpose."""


class ConfigError(EquipoiseError, ValueError):
    """An option or a configuration key is wrong."""


class PlacementError(EquipoiseError, ValueError):
    """A placement cannot be, or does not fit what it is used with."""


class TraceError(EquipoiseError, ValueError):
    """A load file cannot be read as one."""


class ModelError(EquipoiseError, ValueError):
    """A model or a checkpoint cannot be taken over."""


class DependencyError(EquipoiseError, ImportError):
    """An optional package is not installed; the message says how to install it."""


class CommunicatorUnavailable(EquipoiseError):  # noqa: N818 - the field's name for it
    """A wire cannot work here; the message says what to install."""


class TransferError(EquipoiseError):
    """Weights did not arrive.

    Attributes:
        rank: the rank that raises, or None where it is not known.
        peer: the rank that it was waiting for or refused, or None.
        layer: the MoE layer that was on its way, or None.
    """

    def __init__(
        self,
        message: str,
        *,
        rank: int | None = None,
        peer: int | None = None,
        layer: int | None = None,
    ) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
        self.layer = layer


class MembershipError(EquipoiseError):
    """The set of ranks is not what it must be: one died, or they disagree.

    Attributes:
        rank: the rank that raises, or None where it is not known.
        peer: the rank that is missing or differs, or None.
    """

    def __init__(self, message: str, *, rank: int | None = None, peer: int | None = None) -> None:
        super().__init__(message)
        self.rank = rank
        self.peer = peer
