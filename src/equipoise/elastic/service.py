"""What serves requests over a changing set of ranks, as its users see it.

The controller is one; a single rank in the caller's process is another. HTTP and the commands are
written against this alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from equipoise.errors import EquipoiseError

if TYPE_CHECKING:
    from equipoise.engine.requests import Delta, SamplingParams

Phase = Literal["idle", "preparing", "committing", "retiring", "failed"]
"""Of a change of the membership; `failed` until the next one begins."""

RankState = Literal["starting", "joining", "serving", "leaving", "dead"]

Busy = Literal["queue", "refuse"]
"""What becomes of a change that is asked for during another one."""


class QueueFull(EquipoiseError):  # noqa: N818 - says what is the matter
    """As many requests wait as may; later there is room again."""


class ServiceClosed(EquipoiseError):  # noqa: N818 - says what is the matter
    """The service takes no more requests: it drains, was closed, or has failed."""


@dataclass(frozen=True)
class ServiceRequest:
    """A prompt to be continued.

    Attributes:
        id: not used by an unfinished request of this service.
        tokens: of the prompt, at least one.
        sampling: how its tokens are chosen and where it ends.
    """

    id: str
    tokens: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True)
class RequestFailed:
    """A request that ends without all of its tokens.

    Attributes:
        request_id: which.
        reason: one line for people.
    """

    request_id: str
    reason: str


Deliver = Callable[["Delta | RequestFailed"], None]
"""Gets what becomes of a request, in order, from any thread; must return at once and not raise. The
last it gets is a Delta with a finish reason, or a RequestFailed."""


@dataclass(frozen=True)
class ModelFacts:
    """What a client of the model must know.

    Attributes:
        name: for people.
        directory: of the checkpoint, where its tokenizer is.
        max_len: tokens of the longest request, generated ones included.
        vocabulary_size: tokens are below it.
        max_batch_size: sequences in flight per rank.
    """

    name: str
    directory: Path
    max_len: int
    vocabulary_size: int
    max_batch_size: int


@dataclass(frozen=True)
class RankStatus:
    """A rank at one moment.

    Attributes:
        name: that it keeps, like "rank-3".
        number: in the serving generation; None while it is in none.
        pid: of its process.
        host: where it runs.
        device: as torch names it, like "cpu" or "cuda:1".
        state: what it does.
        steps: forward passes in the serving generation.
        running: requests that it has.
        room: requests that it could take at once.
        near_deadline: its longest silence so far, as a share of the deadline after which it is
            given up.
        step_s: median seconds of its last steps.
        pause_s: seconds from the end of the last step before the last switch to the end of the
            first one after it.
        detail: why it is dead, or what it waits for; empty otherwise.
        node: ranks that say the same share a machine; empty until it is known.
        parts_s: seconds of each part of its last change of generation, in order: after a death
            `abandon` (the failed step's generation is let go) and `register` (until it was told
            how to go on); then `build` (groups, connections, memory), `pull` (weights), `verify`,
            `assemble`, `rehearse`, `ready` (for the others), `decide` and `switch`. Empty in the
            first generation.
    """

    name: str
    number: int | None
    pid: int | None
    host: str
    device: str
    state: RankState
    steps: int = 0
    running: int = 0
    room: int = 0
    near_deadline: float = 0.0
    step_s: float = 0.0
    pause_s: float = 0.0
    detail: str = ""
    node: str = ""
    parts_s: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class ServiceTotals:
    """Counts since the service began.

    Attributes:
        submitted: requests taken.
        finished: requests whose last token was delivered.
        cancelled: requests ended by their clients.
        failed: requests that were told so.
        rerun: times that a request was run again elsewhere.
        prompt_tokens: of requests taken.
        generated_tokens: delivered.
        steps: forward passes of the ranks together, in all generations.
        scalings: changes of the membership that were asked for and done.
        recoveries: changes that deaths made necessary, done.
        deaths: ranks that died.
        rebalances: plans that were carried out.
        moves: experts that travelled between ranks.
    """

    submitted: int = 0
    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    rerun: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    steps: int = 0
    scalings: int = 0
    recoveries: int = 0
    deaths: int = 0
    rebalances: int = 0
    moves: int = 0


@dataclass(frozen=True)
class ServiceStatus:
    """A service at one moment.

    Attributes:
        model: what is served.
        generation: that serves.
        phase: of the last change of the membership.
        reason: why it failed, or what is under way; empty otherwise.
        ready: whether requests are taken and served.
        balancing: whether experts are kept balanced; not while the membership changes.
        balancedness: of the last rebalance as planned, mean over layers; None before any.
        ranks: by name; dead ones until a change of the membership forgets them.
        queue_length: requests that wait for a rank.
        queue_limit: as many may wait.
        running: requests that ranks have.
        changes_waiting: changes of the membership that wait for the one under way.
        totals: since the service began.
    """

    model: ModelFacts
    generation: int
    phase: Phase
    reason: str
    ready: bool
    balancing: bool
    balancedness: float | None
    ranks: tuple[RankStatus, ...]
    queue_length: int
    queue_limit: int
    running: int
    changes_waiting: int
    totals: ServiceTotals

    def to_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types. Collective: none."""
        data = asdict(self)
        data["model"]["directory"] = str(self.model.directory)
        data["ranks"] = [asdict(rank) for rank in self.ranks]
        return data


@dataclass(frozen=True)
class ScaleReport:
    """What a change of the membership does, or did.

    Attributes:
        dry_run: whether it was only rehearsed; what follows is then expected, not measured.
        done: whether the change is done; False of a rehearsal and of one that goes on.
        generation: that serves after it.
        joining: names of newcomers.
        leaving: names of leavers.
        staying: names of the others.
        bytes: weights that travel between ranks.
        peak_bytes_per_rank: by name, weights and buffers held at once.
        pause_s: longest pause of a serving rank, the first step behind the switch included; an
            expectation where rehearsed.
        prepare_s: seconds from the request, start of processes excluded, to the decision.
        total_s: the same up to serving at the full new size.
        notes: what else is worth knowing, one line each.
        newcomer_bytes_per_s: at which the slowest newcomer's weights came; None where none did.
    """

    dry_run: bool
    done: bool
    generation: int
    joining: tuple[str, ...]
    leaving: tuple[str, ...]
    staying: tuple[str, ...]
    bytes: int = 0
    peak_bytes_per_rank: dict[str, int] | None = None
    pause_s: float | None = None
    prepare_s: float | None = None
    total_s: float | None = None
    notes: tuple[str, ...] = ()
    newcomer_bytes_per_s: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Everything, of JSON's own types. Collective: none."""
        data = asdict(self)
        for key in ("joining", "leaving", "staying", "notes"):
            data[key] = list(data[key])
        return data


class Service(Protocol):
    """Takes requests, gives tokens, and changes its ranks meanwhile. Any thread may call.

    Collective: none; its ranks meet among themselves.
    """

    @property
    def facts(self) -> ModelFacts:
        """What a client of the model must know."""

    def submit(self, request: ServiceRequest, deliver: Deliver) -> None:
        """Take a request; returns before it is served.

        Args:
            request: what to continue.
            deliver: gets each of its tokens once and in order, and its end. May be called before
                this returns.
        Raises: QueueFull if as many wait as may; ConfigError if the request cannot be served: it is
            empty, too long, or of unknown tokens, or its id is in use; ServiceClosed.
        """

    def cancel(self, request_id: str) -> None:
        """End a request: its last Delta says `cancelled`. One that has ended already is ignored."""

    def status(self) -> ServiceStatus:
        """How it is at this moment."""

    def placement(self) -> dict[str, Any]:
        """Which expert each slot holds, as placement files are written.

        Raises: ServiceClosed if no rank serves.
        """

    def scale(
        self,
        to: int | None = None,
        remove: Sequence[str] = (),
        *,
        dry_run: bool = False,
        busy: Busy = "queue",
        wait: bool = True,
        timeout_s: float = 600.0,
    ) -> ScaleReport:
        """Change the set of ranks.

        Args:
            to: ranks that there shall be; newcomers get unused names, the highest numbers leave.
            remove: names of ranks that shall leave; instead of `to`.
            dry_run: only say what it would do.
            busy: what becomes of it during another change.
            wait: return when it is done; else as soon as it has begun or waits in the queue.
            timeout_s: longest that this call takes; the change goes on beyond it.
        Raises: ConfigError if it cannot be asked for; MembershipError if it was refused, or failed
            and the old generation serves on; TimeoutError; ServiceClosed.
        """

    def rebalance(self) -> None:
        """Have a rebalance begin at the next occasion.

        Raises: ServiceClosed; MembershipError while the membership changes.
        """

    def drain(self, deadline_s: float) -> bool:
        """Take no more requests, and wait until those taken have ended.

        Returns:
            Whether all have ended within the deadline.
        """

    def close(self) -> None:
        """End all ranks; what has not ended is told so. Twice is fine."""
