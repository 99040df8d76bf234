"""What `equipoise bench load` reads, and what is said of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from equipoise.bench.load_files import CheckpointSize
from equipoise.bench.option_checks import check_least, check_positive
from equipoise.errors import ConfigError

Cache = Literal["cold", "warm"]


@dataclass(frozen=True)
class LoadSpec:
    """What is measured; the same on every rank.

    Attributes:
        directory: where the checkpoint is made; it is there and empty.
        size: of the model.
        num_ranks: R.
        num_rounds: how often the files are loaded and plainly read, cold and warm each.
        timeout_s: longest wait for another rank.
    """

    directory: str
    size: CheckpointSize
    num_ranks: int = 2
    num_rounds: int = 2
    timeout_s: float = 600.0

    def __post_init__(self) -> None:
        check_least(("--ranks", self.num_ranks, 1), ("--rounds", self.num_rounds, 1))
        check_positive(("--timeout", self.timeout_s))
        if self.size.num_experts % self.num_ranks:
            raise ConfigError(
                f"{self.size.num_experts} experts cannot be spread evenly over {self.num_ranks} "
                "ranks: take another number of ranks"
            )


@dataclass(frozen=True)
class FilesMade:
    """The checkpoint is there.

    Attributes:
        num_bytes: of its files.
        seconds: that making them took.
    """

    num_bytes: int
    seconds: float


@dataclass(frozen=True)
class LoadMeasured:
    """One load and one plain read.

    Attributes:
        cache: whether the page cache was dropped before each.
        cached: share of samples of the files that were in the page cache before the load and
            before the plain read; None where the file system does not say.
        seconds: of the load, on the slowest rank.
        plain_seconds: of the plain read, on the slowest rank.
        bytes_read: by all ranks together; they share no read of what all have.
        first_byte_s: of rank 0, until it has read something: headers, and the model without
            weights.
        last_byte_s: of rank 0, from its last read to the end.
    """

    cache: Cache
    cached: tuple[float | None, float | None]
    seconds: float
    plain_seconds: float
    bytes_read: int
    first_byte_s: float
    last_byte_s: float


LoadSaid = FilesMade | LoadMeasured
