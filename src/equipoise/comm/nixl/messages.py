"""What two ranks say to each other by NIXL notification."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
import torch

from equipoise.comm.announcement import NUM_WORDS, Announcement
from equipoise.comm.spans import Spans

TOKEN_BYTES = 8

_HEAD = struct.Struct(f"<{TOKEN_BYTES}sBqq")
_OFFER, _DONE, _FAILED, _PING = range(1, 5)
_LAST = 0x80


@dataclass(frozen=True)
class Offer:
    """The sender: these bytes are final, read them.

    Attributes:
        number: of the exchange.
        sequence: of the offer within it, from 0.
        is_last: none follows in this exchange.
        announcement: all that is exchanged, the same in every offer of an exchange.
        spans: where the bytes are; none if nothing travels.
    """

    number: int
    sequence: int
    is_last: bool
    announcement: Announcement
    spans: Spans


@dataclass(frozen=True)
class Done:
    """The receiver: this offer was read; its memory is the sender's again."""

    number: int
    sequence: int


@dataclass(frozen=True)
class Failed:
    """Either side: this exchange will not come to its end with me."""

    number: int
    reason: str


@dataclass(frozen=True)
class Ping:
    """Either side: are you there? Not answered: to a dead peer it cannot be sent."""

    number: int


Message = Offer | Done | Failed | Ping


def encode(token: bytes, message: Message) -> bytes:
    """A notification.

    Args:
        token: [8] bytes, the receiver's own; what is meant for another communicator is thus known.
        message: what to say.
    """
    match message:
        case Offer():
            words = message.announcement.to_tensor().numpy().astype("<i8").tobytes()
            spans = np.stack((message.spans.address, message.spans.num_bytes)).astype("<i8")
            kind = _OFFER | (_LAST if message.is_last else 0)
            head = _HEAD.pack(token, kind, message.number, message.sequence)
            return head + words + spans.tobytes()
        case Done():
            return _HEAD.pack(token, _DONE, message.number, message.sequence)
        case Failed():
            return _HEAD.pack(token, _FAILED, message.number, 0) + message.reason.encode()
        case Ping():
            return _HEAD.pack(token, _PING, message.number, 0)


def decode(token: bytes, data: bytes) -> Message | None:
    """What `encode` wrote; None if it is for another communicator.

    Args:
        token: [8] bytes, this communicator's own.
        data: the notification.
    """
    if len(data) < _HEAD.size:
        return None
    addressee, kind, number, sequence = _HEAD.unpack_from(data)
    if addressee != token:
        return None
    body = data[_HEAD.size :]
    match kind & ~_LAST:
        case 1:
            words = np.frombuffer(body, dtype="<i8").astype(np.int64)
            announcement = Announcement.from_tensor(torch.from_numpy(words[:NUM_WORDS]))
            address, num_bytes = words[NUM_WORDS:].reshape(2, -1)
            spans = Spans(address, num_bytes)
            return Offer(number, sequence, bool(kind & _LAST), announcement, spans)
        case 2:
            return Done(number, sequence)
        case 3:
            return Failed(number, body.decode())
        case _:
            return Ping(number)
