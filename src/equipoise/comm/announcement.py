"""What two ranks tell each other before anything travels between them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from equipoise.topology import IntArray

NUM_WORDS = 8


@dataclass(frozen=True)
class Sizes:
    """What goes one way between two ranks.

    Attributes:
        num_tensors: how many tensors; where experts move, each row of a weight is one.
        num_bytes: of all of them.
        digest: of each one's bytes, in order; equal for equal lists.
    """

    num_tensors: int
    num_bytes: int
    digest: int

    @classmethod
    def of(cls, sizes: Sequence[int] | IntArray) -> Sizes:
        """Sum up the bytes of each tensor, in order."""
        return _sum_up(np.ascontiguousarray(sizes, dtype="<i8").tobytes())


# Experts are alike, so what goes to one peer is often what goes to another.
@lru_cache(maxsize=256)
def _sum_up(listed: bytes) -> Sizes:
    """[n] int64, little-endian: bytes of each tensor."""
    sizes = np.frombuffer(listed, dtype="<i8")
    digest = hashlib.blake2b(listed, digest_size=8).digest()
    return Sizes(len(sizes), int(sizes.sum()), int.from_bytes(digest, "little", signed=True))


NOTHING = Sizes.of(())
"""Where nothing goes that way."""


@dataclass(frozen=True)
class Announcement:
    """One rank's word to one peer about one exchange.

    Attributes:
        number: how many exchanges this rank has begun with its communicator.
        sends: what it has for the peer.
        expects: what it wants from the peer.
        total_bytes: what it exchanges with all ranks, both ways; the deadline follows from it.
    """

    number: int
    sends: Sizes
    expects: Sizes
    total_bytes: int

    def to_tensor(self) -> Tensor:
        """[8] int64."""
        words = [self.number, *_list(self.sends), *_list(self.expects), self.total_bytes]
        return torch.tensor(words, dtype=torch.int64)

    @classmethod
    def from_tensor(cls, words: Tensor) -> Announcement:
        """What `to_tensor` wrote."""
        number, *sizes, total_bytes = words.tolist()
        return cls(number, Sizes(*sizes[:3]), Sizes(*sizes[3:]), total_bytes)


def find_mismatch(rank: int, mine: Announcement, peer: int, theirs: Announcement) -> str | None:
    """Say how two ranks' announcements contradict each other; None if they do not.

    Both sides find the same, in the same words.

    Args:
        rank: this rank.
        mine: what it told the peer.
        peer: the other.
        theirs: what it was told.
    Collective: none.
    """
    if mine.number != theirs.number:
        first, second = sorted(((rank, mine.number), (peer, theirs.number)))
        return (
            f"rank {first[0]} is in exchange {first[1]}, rank {second[0]} in exchange {second[1]}: "
            "every rank must call execute equally often"
        )
    ways = sorted(((rank, peer, mine, theirs), (peer, rank, theirs, mine)), key=lambda way: way[0])
    for source, destination, sender, receiver in ways:
        sent, expected = sender.sends, receiver.expects
        if sent == expected:
            continue
        if (sent.num_tensors, sent.num_bytes) == (expected.num_tensors, expected.num_bytes):
            return (
                f"rank {source} sends rank {destination} {_count(sent)}, as expected, but their "
                "sizes differ one by one: both sides must queue in the same order"
            )
        return (
            f"rank {source} sends rank {destination} {_count(sent)}, "
            f"but rank {destination} expects {_count(expected)}"
        )
    return None


def _list(sizes: Sizes) -> tuple[int, int, int]:
    """Its fields in order; what dataclasses has for it copies each of them."""
    return sizes.num_tensors, sizes.num_bytes, sizes.digest


def _count(sizes: Sizes) -> str:
    plural = "" if sizes.num_tensors == 1 else "s"
    return f"{sizes.num_tensors} tensor{plural} of {sizes.num_bytes} bytes"
