"""The communicator: sets a group's agents up, and runs exchanges between them."""

from __future__ import annotations

import base64
import contextlib
import json
import secrets
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, NoReturn

import torch
import torch.distributed as dist

from equipoise.comm.base import ExpertWeights, GroupCoordinator
from equipoise.comm.byte_views import view_bytes
from equipoise.comm.exchange import Exchange, deadline_in
from equipoise.comm.groups import find_device
from equipoise.comm.nixl.agent import Agent, Registration, WireError
from equipoise.comm.nixl.exchange import Mailbox, NixlExchange, Pair, Remote
from equipoise.comm.nixl.messages import TOKEN_BYTES, Failed
from equipoise.comm.nixl.pool import SendPool, plan_offers
from equipoise.comm.parcels import Inbox, Landing, Outbox, find_spans
from equipoise.comm.queued import QueuedCommunicator
from equipoise.comm.spans import Regions, Spans, span_of
from equipoise.errors import TransferError

_TAG_HELLO_SIZE = 4
_TAG_HELLO = 5
_FORMAT = 1
_POOL_BYTES = 32 << 20
_FEWEST_PIECES = 8
# Ranks may share cores, and a forward pass wants the interpreter: who waits sleeps, from a
# notification's latency up to a thousandth. With weights on GPUs and no forward pass beside, a READ
# of many experts is over in some thousandths: for so long it is looked at all the time.
_SHORTEST_PAUSE_S = 50e-6
_LONGEST_PAUSE_S = 1e-3
_WATCHED_S = 10e-3
_WATCHED_PAUSE_S = 10e-6


@dataclass(frozen=True)
class _Wire:
    """What a communicator holds while it is open."""

    pool: SendPool
    registered: Regions
    remotes: dict[int, Remote]
    mailbox: Mailbox


@dataclass
class _Buffer:
    """Memory that many exchanges fill; made known to NIXL when the first of them begins.

    Attributes:
        spans: the memory, as one.
        regions: the same.
        registration: None until then.
    """

    spans: Spans
    regions: Regions
    registration: Registration | None = None


@dataclass(frozen=True)
class _Flight:
    """An exchange that was started.

    Attributes:
        exchange: how far it has come.
        landing: what was registered for it alone, if anything.
    """

    exchange: NixlExchange
    landing: Registration | None


class NixlEplbCommunicator(QueuedCommunicator[_Flight]):
    """The sender offers, the receiver READs straight into its tensors, and NIXL confirms.

    Weights and the pool are registered once; nothing of them is copied on the sender's side. Other
    tensors are sent through the pool, piece by piece: registering them for the peers would leave
    a trace in every peer's agent that only disconnecting removes. Tensors to be received are
    registered for one exchange, which costs 0.1 to 0.5 ms, and 5 us more for each.
    On the CPU the kernel copies page by page: weights in huge pages, as torch makes them with
    THP_MEM_ALLOC_ENABLE=1 in the environment, travel a fifth faster.
    After a TransferError tensors that were to be received may still be written to: they are kept
    alive, and must not be used.

    Args:
        coordinator: agents introduce themselves over its `cpu_group`.
        expert_weights: as for the base.
        timeout_s: as for the base.
        pool_bytes: of the pool; what does not fit takes turns.
    Collective: every rank of the group.
    Raises: CommunicatorUnavailable if NIXL is not installed or cannot start; TransferError if a
        rank does not come in time.
    """

    name: ClassVar[str] = "nixl"
    needs_profile_buffer_reservation = False
    num_ahead = 1
    can_hold = True
    lands_in_place = True

    def __init__(
        self,
        coordinator: GroupCoordinator,
        expert_weights: ExpertWeights,
        timeout_s: float,
        *,
        pool_bytes: int = _POOL_BYTES,
    ) -> None:
        group = coordinator.cpu_group
        super().__init__(group.rank(), group.size(), expert_weights, timeout_s)
        self._device = find_device(coordinator, expert_weights)
        agent = Agent(self._device)
        pool = SendPool(pool_bytes, max(_FEWEST_PIECES, self.size - 1), self._device)
        weights = Spans.of(span_of(rows) for layer in self._rows for rows in layer)
        registered = Spans.join([weights, Spans.of([span_of(pool.data)])])
        token = secrets.token_bytes(TOKEN_BYTES)
        try:
            agent.register(registered)
            remotes = self._meet(group, agent, token)
        except BaseException:
            agent.close()
            raise
        self._agent = agent
        mailbox = Mailbox(agent, token, remotes)
        self._wire: _Wire | None = _Wire(pool, Regions(registered), remotes, mailbox)
        self._buffers: list[_Buffer] = []

    @contextlib.contextmanager
    def register(self, buffer: torch.Tensor) -> Iterator[None]:  # noqa: D102 - see the base
        self._refuse_unless_open()
        spans = Spans.of([span_of(buffer)])
        if not buffer.numel():
            yield
            return
        lent = _Buffer(spans, Regions(spans))
        self._buffers.append(lent)
        try:
            yield
        finally:
            self._buffers.remove(lent)
            # Where READs may still write, the agent keeps everything.
            known = lent.registration
            if known is not None and self._wire is not None and not self._agent.has_reads:
                self._agent.deregister(known)

    @property
    def num_open_handles(self) -> int:
        """Agents, peers, registrations and READs that NIXL holds for this communicator.

        The same before and after every exchange that ended well; 0 after `close`, unless a READ
        never ended.
        """
        return self._agent.num_open

    def _meet(self, group: dist.ProcessGroup, agent: Agent, token: bytes) -> dict[int, Remote]:
        hello = {
            "format": _FORMAT,
            "memory": agent.memory,
            "device": agent.device_id,
            "token": token.hex(),
            "agent": base64.b64encode(agent.describe()).decode(),
        }
        remotes = {}
        for peer, data in self._swap(group, json.dumps(hello).encode()).items():
            theirs = json.loads(data)
            for key in ("format", "memory"):
                if theirs[key] != hello[key]:
                    raise TransferError(
                        f"rank {self.rank} has {key} {hello[key]}, rank {peer} {theirs[key]}: "
                        "all ranks need the same",
                        rank=self.rank,
                        peer=peer,
                    )
            try:
                name = agent.connect(base64.b64decode(theirs["agent"]))
            except WireError as error:
                raise TransferError(
                    f"rank {self.rank} cannot connect to rank {peer}: {error}",
                    rank=self.rank,
                    peer=peer,
                ) from error
            remotes[peer] = Remote(name, bytes.fromhex(theirs["token"]), theirs["device"])
        # Nobody closes its agent again before all have connected to it.
        self._swap(group, b"connected")
        return remotes

    def _swap(self, group: dist.ProcessGroup, mine: bytes) -> dict[int, bytes]:
        """Everybody's hello, by rank; at set-up only."""
        outgoing = torch.frombuffer(bytearray(mine), dtype=torch.uint8)
        sizes = {peer: torch.zeros(1, dtype=torch.int64) for peer in self._peers}
        own_size = view_bytes(torch.tensor([len(mine)], dtype=torch.int64))
        self._swap_tensors(
            group, _TAG_HELLO_SIZE, own_size, {p: view_bytes(size) for p, size in sizes.items()}
        )
        hellos = {p: torch.empty(int(size), dtype=torch.uint8) for p, size in sizes.items()}
        self._swap_tensors(group, _TAG_HELLO, outgoing, hellos)
        return {peer: hello.numpy().tobytes() for peer, hello in hellos.items()}

    def _swap_tensors(
        self,
        group: dist.ProcessGroup,
        tag: int,
        outgoing: torch.Tensor,
        incoming: dict[int, torch.Tensor],
    ) -> None:
        exchange = Exchange(group, tag)
        for peer, tensor in incoming.items():
            exchange.recv(tensor, peer)
        for peer in incoming:
            exchange.send(outgoing, peer)
        failures = exchange.wait(deadline_in(self.timeout_s))
        if failures:
            self._raise({}, failures, self.timeout_s)

    def _begin(self, number: int, outbox: Outbox, inbox: Inbox) -> _Flight:
        wire = self._wire
        assert wire is not None, "closed communicators are refused before"
        with self._on_stream():
            # READs follow no stream: all that writes or reads these tensors must be over.
            self._settle()
            exchange = NixlExchange(
                self.rank,
                number,
                self.timeout_s,
                self._agent,
                wire.mailbox,
                wire.pool,
                wire.remotes,
                self._settle,
                self._pair_up(wire, number, outbox, inbox),
                self._may_land,
            )
            # What peers wait for comes first.
            exchange.offer()
            landing = self._register_landings(wire, inbox)
        flight = _Flight(exchange, landing)
        self._advance([*self._under_way, flight])
        return flight

    def advance(self, patience_s: float = 0.0) -> None:  # noqa: D102 - see the base
        self._refuse_unless_open()
        # What goes wrong shows when the exchange is finished.
        flights = [*self._under_way]
        self._advance(flights)
        deadline = deadline_in(patience_s)
        while not all(each.exchange.travels for each in flights) and time.monotonic() < deadline:
            self._advance(flights)

    def _end(self, flight: _Flight) -> None:
        flights = [flight, *self._under_way]
        pauses = self._find_pauses()
        try:
            while not (
                flight.exchange.has_received if self._may_be_read else flight.exchange.is_over
            ):
                self._refuse_if_interrupted()
                if self._advance(flights, flight):
                    pauses = self._find_pauses()
                    continue
                time.sleep(next(pauses))
        except BaseException:
            self._set_apart(flights)
            raise
        if any(pair.has_failed for pair in flight.exchange.pairs):
            self._set_apart(flights)
            self._give_up(flight.exchange)
        if flight.landing is not None:
            self._agent.deregister(flight.landing)

    def _find_pauses(self) -> Iterator[float]:
        """Seconds between looks at what has come, from the last thing that came on."""
        is_short = self._is_cuda and not self.is_beside_forward
        if is_short:
            stop = deadline_in(_WATCHED_S)
            while time.monotonic() < stop:
                yield 0.0 if self.is_alone else _WATCHED_PAUSE_S
        pause = _SHORTEST_PAUSE_S
        while True:
            yield pause
            pause = pause if is_short else min(2 * pause, _LONGEST_PAUSE_S)

    def _advance(self, flights: Sequence[_Flight], awaited: _Flight | None = None) -> bool:
        """Bring every exchange that is under way as far as it goes; whether that was anywhere.

        Once the awaited one is over, those that cannot land yet are left for later.
        """
        assert self._wire is not None
        moved = False
        with self._on_stream():
            self._wire.mailbox.collect()
            for each in flights:
                exchange = each.exchange
                is_due = awaited is None or not awaited.exchange.is_over or not exchange.is_held
                if is_due and not exchange.is_over:
                    moved = exchange.advance() or moved
        return moved

    def _set_apart(self, flights: Sequence[_Flight]) -> None:
        """After a failure: let go of what no READ writes to any more, and keep the rest."""
        self._agent.release_ended()
        if self._agent.has_reads:
            self._agent.quarantine()
            return
        for flight in flights:
            if flight.landing is not None:
                self._agent.deregister(flight.landing)

    def _pair_up(self, wire: _Wire, number: int, outbox: Outbox, inbox: Inbox) -> list[Pair]:
        pairs = []
        deadline = deadline_in(self.timeout_s)
        for peer, announced in self._announce(number, outbox, inbox).items():
            landings = inbox.get(peer, [])
            offers = plan_offers(outbox.get(peer, []), wire.registered, wire.pool.piece_bytes)
            pairs.append(
                Pair(
                    peer,
                    announced,
                    deque(offers),
                    find_spans(landings),
                    tuple(landing.data for landing in landings),
                    deadline,
                    self.timeout_s,
                )
            )
        return pairs

    def _register_landings(self, wire: _Wire, inbox: Inbox) -> Registration | None:
        """Make known what is not registered yet: of each storage what will be written."""
        bounds: dict[int, tuple[int, int]] = {}
        landings: list[Landing] = [landing for each in inbox.values() for landing in each]
        for buffer in self._buffers:
            if buffer.registration is None:
                buffer.registration = self._agent.register(buffer.spans)
        known = [wire.registered, *(buffer.regions for buffer in self._buffers)]
        for landing in landings:
            address, num_bytes = span_of(landing.data)
            if not num_bytes or any(region.contain(address, num_bytes) for region in known):
                continue
            storage = landing.data.untyped_storage().data_ptr()
            start, stop = bounds.get(storage, (address, address))
            bounds[storage] = min(start, address), max(stop, address + num_bytes)
        if not bounds:
            return None
        return self._agent.register(Spans.of((a, b - a) for a, b in bounds.values()))

    def _give_up(self, exchange: NixlExchange) -> NoReturn:
        """Raise, and tell peers with which all went well that the next exchange will not."""
        refusals = {p.peer: p.refusal for p in exchange.pairs if p.refusal is not None}
        failures = {p.peer: p.failure for p in exchange.pairs if p.failure is not None}
        allowed_s = max(pair.allowed_s for pair in exchange.pairs if pair.has_failed)
        for pair in exchange.pairs:
            if not pair.has_failed:
                reason = f"rank {self.rank} has failed in exchange {exchange.number}"
                exchange.tell(pair, Failed(exchange.number + 1, reason))
        self._raise(refusals, failures, allowed_s)

    def _settle(self) -> None:
        """Wait on the host for the work that stands on the current stream."""
        if not self._is_cuda:
            return
        stream = self._current_stream()
        # To be woken takes longer than to ask.
        if not stream.query():
            event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            event.record(stream)
            event.synchronize()

    def _release(self) -> None:
        self._wire = None
        self._agent.close()
