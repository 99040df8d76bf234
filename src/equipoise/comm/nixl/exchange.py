"""One exchange of one rank: offers out, READs in, with each peer on its own."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from equipoise.comm.announcement import Announcement, find_mismatch
from equipoise.comm.base import MayLand
from equipoise.comm.exchange import PeerFailure, deadline_in
from equipoise.comm.nixl.agent import Agent, Read, WireError
from equipoise.comm.nixl.messages import Done, Failed, Message, Offer, Ping, decode, encode
from equipoise.comm.nixl.pool import PlannedOffer, SendPool
from equipoise.comm.queued import SLOWEST_BYTES_PER_S
from equipoise.comm.spans import Spans, align

_PING_S = 0.1


@dataclass(frozen=True)
class Remote:
    """A peer, as NIXL knows it.

    Attributes:
        name: of its agent.
        token: [8] bytes, of its communicator.
        device_id: where its memory is.
    """

    name: str
    token: bytes
    device_id: int


class Mailbox:
    """Sorts what comes to an agent by rank, and keeps what is for later exchanges.

    Args:
        agent: of this communicator.
        token: [8] bytes, this communicator's own; other notifications are dropped.
        remotes: by rank.
    """

    def __init__(self, agent: Agent, token: bytes, remotes: Mapping[int, Remote]) -> None:
        self._agent = agent
        self._token = token
        self._rank_of = {remote.name: rank for rank, remote in remotes.items()}
        self._kept: dict[int, list[Message]] = {rank: [] for rank in remotes}

    def collect(self) -> None:
        """Take what has come."""
        for name, notifications in self._agent.take_notifications().items():
            rank = self._rank_of.get(name)
            if rank is None:
                continue
            for data in notifications:
                message = decode(self._token, data)
                if message is not None and not isinstance(message, Ping):
                    self._kept[rank].append(message)

    def take(self, rank: int, number: int) -> list[Message]:
        """What a rank has said about an exchange; that it failed earlier counts too."""
        said = [message for message in self._kept[rank] if message.number <= number]
        self._kept[rank] = [message for message in self._kept[rank] if message.number > number]
        return [m for m in said if m.number == number or isinstance(m, Failed)]


@dataclass
class Pair:
    """How far an exchange with one peer has come.

    Attributes:
        peer: its rank.
        announced: what it is told.
        offers: what it was not yet offered.
        landing: where its bytes go, all registered.
        buffers: what must live as long as they may come.
        deadline: on the clock of time.monotonic; moved when its announcement has come.
        allowed_s: how long that was.
        num_offered: offers made.
        unread: offers that it has not yet read, by sequence, with their piece of the pool.
        heard: its announcement.
        early: offers that came before the one that is next.
        num_heard: offers taken.
        heard_last: no more will come.
        num_landing: bytes for which READs were posted.
        held: READs that are ready, and wait for what they fill.
        reads: posted, and not yet complete.
        pinged: when it was last told anything.
        refusal: why it cannot go on, in words for both sides.
        failure: how it was lost.
    """

    peer: int
    announced: Announcement
    offers: deque[PlannedOffer]
    landing: Spans
    buffers: tuple[object, ...]
    deadline: float
    allowed_s: float
    num_offered: int = 0
    unread: dict[int, int | None] = field(default_factory=dict)
    heard: Announcement | None = None
    early: dict[int, Offer] = field(default_factory=dict)
    num_heard: int = 0
    heard_last: bool = False
    num_landing: int = 0
    held: list[Read] = field(default_factory=list)
    reads: list[Read] = field(default_factory=list)
    pinged: float = 0.0
    refusal: str | None = None
    failure: PeerFailure | None = None

    @property
    def has_failed(self) -> bool:
        """Whether it can no longer end well."""
        return self.refusal is not None or self.failure is not None

    @property
    def is_over(self) -> bool:
        """Whether nothing more is waited for."""
        return self.has_failed or (self.has_received and not self.unread)

    @property
    def has_received(self) -> bool:
        """Whether all is here, and all that the peer has not read of ours is where it stays."""
        under_way = self.offers or self.held or self.reads or not self.heard_last
        is_staged = any(piece is not None for piece in self.unread.values())
        return self.has_failed or not (under_way or is_staged)


class NixlExchange:
    """Offers, reads and confirms until every pair is over, well or not; no wait in here.

    Args:
        rank: this rank.
        number: of the exchange; the same on every rank.
        timeout_s: longest wait for a peer, to which the time for the bytes is added.
        agent: of this communicator.
        mailbox: its.
        pool: its.
        remotes: by rank.
        settle: waits on the host for what was enqueued on the stream.
        pairs: with each peer.
        may_land: READs are posted once it says yes; None if they may be at once.
    """

    def __init__(
        self,
        rank: int,
        number: int,
        timeout_s: float,
        agent: Agent,
        mailbox: Mailbox,
        pool: SendPool,
        remotes: Mapping[int, Remote],
        settle: Callable[[], None],
        pairs: Sequence[Pair],
        may_land: MayLand | None = None,
    ) -> None:
        self._rank = rank
        self._timeout_s = timeout_s
        self._agent = agent
        self._mailbox = mailbox
        self._pool = pool
        self._remotes = remotes
        self._settle = settle
        self._may_land = may_land
        self.number = number
        self.pairs = pairs
        staging = sum(any(offer.staged_bytes for offer in pair.offers) for pair in pairs)
        self._num_staging = max(1, staging)

    @property
    def is_over(self) -> bool:
        """Whether every pair is over; what went wrong stands in the pairs.

        Where nothing lands either, what is to be filled is waited for, as has been said.
        """
        return self._may_end and all(pair.is_over for pair in self.pairs)

    @property
    def has_received(self) -> bool:
        """As `is_over`, though peers may still read weights: what they confirm is let go by."""
        return self._may_end and all(pair.has_received for pair in self.pairs)

    @property
    def _may_end(self) -> bool:
        return self._may_land is None or any(pair.has_failed for pair in self.pairs)

    @property
    def is_held(self) -> bool:
        """Whether what is to be filled was in use when it was last asked."""
        return self._may_land is not None

    @property
    def travels(self) -> bool:
        """Whether every READ is under way, or over; or a pair has failed."""
        return all(pair.has_failed or (pair.heard_last and not pair.held) for pair in self.pairs)

    def offer(self) -> None:
        """Offer what can be offered now. `advance` does so too; this hears and reads nothing."""
        for pair in self.pairs:
            while not pair.has_failed and self._offer_next(pair):
                pass

    def advance(self) -> bool:
        """Do what can be done without waiting; whether that was anything.

        What has come must have been collected. Exchanges of one communicator are advanced in the
        order of their numbers, since the mailbox drops what is older.
        """
        if self._may_land is not None and self._may_land():
            self._may_land = None
            # The time until now was not the peers' to use.
            for pair in self.pairs:
                pair.deadline = deadline_in(pair.allowed_s)
        moved = [self._advance(pair) for pair in self.pairs if not pair.is_over]
        return any(moved)

    def tell(self, pair: Pair, message: Message) -> None:
        """Notify the peer; that it is gone is a failure of the pair, and no error here."""
        remote = self._remotes[pair.peer]
        pair.pinged = time.monotonic()
        try:
            self._agent.notify(remote.name, encode(remote.token, message))
        except WireError as error:
            self._take_failure(pair, error)

    def refuse(self, pair: Pair, reason: str) -> None:
        """End a pair for a reason that both sides raise."""
        pair.refusal = reason
        self.tell(pair, Failed(self.number, reason))

    def _advance(self, pair: Pair) -> bool:
        """Do what can be done with a peer without waiting; whether that was anything."""
        moved = False
        for message in self._mailbox.take(pair.peer, self.number):
            moved = True
            self._hear(pair, message)
        while not pair.has_failed and self._offer_next(pair):
            moved = True
        while not pair.has_failed and pair.num_heard in pair.early:
            self._prepare_read(pair, pair.early.pop(pair.num_heard))
        while pair.held and self._may_land is None and not pair.has_failed:
            moved = True
            self._post(pair, pair.held.pop(0))
        for read in list(pair.reads):
            if not pair.has_failed and self._end_read(pair, read):
                moved = True
        now = time.monotonic()
        if pair.is_over or moved:
            return moved
        if now >= pair.deadline and self._may_land is None:
            late = TimeoutError(f"nothing from rank {pair.peer}")
            pair.failure = PeerFailure(late=True, error=late)
            reason = f"rank {self._rank} gave up after {pair.allowed_s:.1f} s"
            self.tell(pair, Failed(self.number, reason))
        elif now >= pair.pinged + _PING_S:
            # A dead peer shows when it is told something, however long it has been silent.
            self.tell(pair, Ping(self.number))
        return False

    def _hear(self, pair: Pair, message: Message) -> None:
        match message:
            case Offer():
                pair.early[message.sequence] = message
                if pair.heard is None:
                    self._hear_announcement(pair, message.announcement)
            case Done():
                piece = pair.unread.pop(message.sequence, None)
                if piece is not None:
                    self._pool.give(piece)
            case Failed():
                pair.refusal = message.reason

    def _hear_announcement(self, pair: Pair, heard: Announcement) -> None:
        pair.heard = heard
        mismatch = find_mismatch(self._rank, pair.announced, pair.peer, heard)
        if mismatch is not None:
            self.refuse(pair, mismatch)
            return
        most = max(pair.announced.total_bytes, heard.total_bytes)
        pair.allowed_s = self._timeout_s + most / SLOWEST_BYTES_PER_S
        pair.deadline = time.monotonic() + pair.allowed_s

    def _offer_next(self, pair: Pair) -> bool:
        """Make the next offer, if there is one and a piece of the pool for it."""
        if not pair.offers:
            return False
        planned = pair.offers[0]
        piece = None
        if planned.staged_bytes:
            # Each peer's share is at least one piece, so none can starve another.
            held = sum(held is not None for held in pair.unread.values())
            if held >= self._pool.num_pieces // self._num_staging:
                return False
            piece = self._pool.take()
            if piece is None:
                return False
        spans = self._pool.fill(piece or 0, planned)
        if piece is not None:
            self._settle()
        pair.offers.popleft()
        offer = Offer(self.number, pair.num_offered, not pair.offers, pair.announced, spans)
        if len(spans.address):
            pair.unread[offer.sequence] = piece
        pair.num_offered += 1
        self.tell(pair, offer)
        return True

    def _prepare_read(self, pair: Pair, offer: Offer) -> None:
        pair.num_heard += 1
        pair.heard_last = offer.is_last
        start, stop = pair.num_landing, pair.num_landing + offer.spans.total_bytes
        expected = pair.landing.total_bytes
        if stop > expected or (offer.is_last and stop < expected):
            reason = f"rank {pair.peer} announced {expected} bytes and offers {stop}"
            self.refuse(pair, reason)
            return
        if stop == start:
            return
        pair.num_landing = stop
        local, remote = align(pair.landing.between(start, stop), offer.spans)
        peer = self._remotes[pair.peer]
        message = encode(peer.token, Done(self.number, offer.sequence))
        try:
            read = self._agent.prepare_read(
                peer.name, local, remote, peer.device_id, message, pair.buffers
            )
        except WireError as error:
            self._take_failure(pair, error)
        else:
            pair.held.append(read)

    def _post(self, pair: Pair, read: Read) -> None:
        pair.reads.append(read)
        try:
            self._agent.post(read)
        except WireError as error:
            self._take_failure(pair, error)

    def _end_read(self, pair: Pair, read: Read) -> bool:
        try:
            if not self._agent.is_complete(read):
                return False
        except WireError as error:
            self._take_failure(pair, error)
            return False
        pair.reads.remove(read)
        self._agent.release(read)
        return True

    def _take_failure(self, pair: Pair, error: WireError) -> None:
        if error.lost:
            # Later than a reason that stands already: then the peer has said why.
            if pair.refusal is None:
                pair.failure = PeerFailure(late=False, error=error)
        elif pair.refusal is None:
            self.refuse(pair, f"rank {self._rank} cannot read from rank {pair.peer}: {error}")
