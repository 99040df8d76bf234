"""A rank's part of the next generation, made beside what serves."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Literal, Self

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store

from equipoise.balancer.model_state import OnCommit
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.comm.process_groups import has_nccl
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.elastic.bridge import OVER_NCCL, Bridge, Haul, Weights
from equipoise.elastic.change_store import ChangeStore
from equipoise.elastic.membership import MembershipPlan
from equipoise.elastic.newcomer import build_newcomer, find_sets, finish_newcomer
from equipoise.elastic.planning import describe, find_room
from equipoise.elastic.reach import meet_peers
from equipoise.elastic.rehearsal import try_alone, try_choices, try_together
from equipoise.elastic.room import check_room
from equipoise.elastic.shared_weights import SharedTensor, list_shared
from equipoise.elastic.traffic import find_kept, keeps_tensors, list_copy_fetches, list_fetches
from equipoise.errors import MembershipError
from equipoise.load.recorder import LoadRecorder
from equipoise.models.checkpoint import Checkpoint
from equipoise.models.experts import ExpertParallelModel, ExpertSet, SetPlan, allocate_slots
from equipoise.models.host_copies import CopyKey, CopyRule, HostCopies
from equipoise.models.parallel import MakeDispatcher, ParallelModel, assemble, read_copy

logger = logging.getLogger(__name__)

TryOut = Callable[[ParallelModel], None]
"""What a rank does with a generation that does not serve yet; what it raises fails the change."""


@dataclass(frozen=True)
class Home:
    """What of a rank outlives generations.

    Attributes:
        name: of the rank.
        store: a client of the controller's store; generations take clients of their own.
        device: where its weights are.
        config: balancing; the same on every rank.
        timeout: longest wait for another rank once a generation serves.
        model: directory of the checkpoint; of a newcomer only headers are read.
        dtype: of the weights; None for that of the configuration.
        attention: transformers' attention implementation; None lets it choose.
        device_group: what tokens travel over.
        dispatcher: makes what sends them; None for `torch`.
        on_commit: of a newcomer, as for `parallelize`; a rank that serves has its own.
        checkpoint: opened ahead, for the one change by which this rank comes; None to open it then.
    """

    name: str
    store: Store
    device: torch.device
    config: EPLBConfig
    timeout: timedelta
    model: Path
    dtype: torch.dtype | None = None
    attention: str | None = None
    device_group: Literal["gloo", "nccl"] = "gloo"
    dispatcher: MakeDispatcher | None = None
    on_commit: OnCommit | None = None
    checkpoint: Checkpoint | None = None


class Builder:
    """Builds, step by step; `close` undoes what was built. Owner: one thread.

    Args:
        plan: of the change.
        home: of this rank.
        serving: what it serves; None of a newcomer.
        store: the change's.
        notify: told of the parts that begin.
        try_out: called with the next generation, once it is whole and before this rank is ready.
        wait_aside: of a rank that serves: returns once tokens take a detour on all that do.

    Attributes:
        parallel: the next generation, once it is whole; None of a leaver.
        haul: what was brought.
        needs_detour: whether ranks are connected while tokens take a detour; the same on every
            member.
    """

    def __init__(
        self,
        plan: MembershipPlan,
        home: Home,
        serving: ParallelModel | None,
        store: ChangeStore,
        notify: Callable[[str], None],
        try_out: TryOut | None = None,
        wait_aside: Callable[[float], None] | None = None,
    ) -> None:
        self.parallel: ParallelModel | None = None
        self.haul = Haul()
        self.needs_detour = self._needs_pause = False
        self._wait_aside = wait_aside
        self._plan, self._home, self._serving, self._store = plan, home, serving, store
        self._notify, self._try_out = notify, try_out
        self._number = plan.find_number(home.name)
        self._deadline = time.monotonic() + plan.deadlines.prepare_s
        self._bridge: Bridge | None = None
        self._group: RankGroup | None = None
        self._copies = HostCopies()
        # Of the thread that makes this, which will serve: here, as its memory is a stream's own.
        self._serving_stream = None
        if home.device.type == "cuda":
            self._serving_stream = torch.cuda.current_stream(home.device)
        self._dispatchers: list[TokenDispatcher] = []

    def build(self) -> str:
        """Build all of it.

        Returns:
            A fingerprint of what will be served; the same on every participant.
        Collective: every participant of the change.
        Raises: CalledOff or StoreLost; MembershipError, TransferError, ModelError,
            CommunicatorUnavailable, or what torch raises where memory is short.
        """
        plan, name = self._plan, self._home.name
        self._check_standing()
        needed = find_room(plan, name)
        logger.info("%s: generation %d takes %s bytes more", name, plan.generation, f"{needed:,}")
        check_room(needed, self._home.device, f"generation {plan.generation}")
        checkpoint = self._open_checkpoint()
        self._store.tell(f"here/{name}", "yes")
        self._store.hear_all("here", plan.participants, self._deadline)
        meet_peers(self._store, name, list(plan.participants), self._deadline)
        spread = self._spread(checkpoint)
        self._bring(spread, checkpoint)
        if spread is not None and self._group is not None:
            self._notify("assemble")
            self._store.check()
            if self.needs_detour and self._home.config.communicator in OVER_NCCL:
                self._make_way()
            # From here on the parts are the parallel model's to close.
            self._dispatchers = []
            self.parallel = assemble(
                spread,
                self._group,
                self._home.config,
                checkpoint,
                self._home.on_commit if self._serving is None else self._serving.on_commit,
                self._copies,
            )
            self._rehearse(self.parallel)
        self._synchronize()
        self._drop_bridge_early()
        return self._make_fingerprint()

    def interrupt(self) -> None:
        """Any thread: have the exchange under way fail soon."""
        bridge = self._bridge
        if bridge is not None:
            bridge.interrupt()

    def forget(self) -> Bridge | None:
        """It was taken: what was built is others' now, and what served before is kept no longer.

        Returns:
            The wires, if they are still to be closed.
        """
        bridge, self._bridge = self._bridge, None
        self.parallel, self.haul, self._group, self._serving = None, Haul(), None, None
        # Whoever made this is what it belongs to: connections would stay until both are collected.
        self._wait_aside = None
        return bridge

    def close(self) -> None:
        """Undo what was built; what serves is untouched. Collective: none."""
        self._drop_bridge()
        if self.parallel is not None:
            self.parallel.close()
        for dispatcher in self._dispatchers:
            dispatcher.close()
        if self._group is not None:
            self._group.close()
        self.parallel, self.haul, self._group, self._dispatchers = None, Haul(), None, []
        self._wait_aside = None

    def _check_standing(self) -> None:
        """Refuse a plan that was made of something else than this rank serves."""
        plan, name = self._plan, self._home.name
        if self._serving is None:
            if name in plan.serving.held:
                raise MembershipError(f"{name} serves nothing, and the plan counts on what it has")
            return
        if self._serving.state.is_rebalancing:
            raise MembershipError(f"{name}: a rebalance is under way; drain it first")
        number = self._serving.state.group.rank
        names = [str(other) for other in range(number)] + [name]
        mine = describe(self._serving, names, only=name)
        planned = plan.serving
        if (mine.shapes, mine.shared_bytes) != (planned.shapes, planned.shared_bytes):
            raise MembershipError(f"{name} serves another model than the plan is of")
        if planned.held.get(name) != mine.held[name]:
            raise MembershipError(f"{name} holds other experts than the plan says")

    def _open_checkpoint(self) -> Checkpoint | None:
        """A newcomer's; it takes its time, so nobody is waited for before."""
        home = self._home
        if self._serving is None:
            opened = home.checkpoint
            return opened or Checkpoint(home.model, home.dtype, home.device, home.attention)
        return self._serving.checkpoint

    def _spread(self, checkpoint: Checkpoint | None) -> ExpertParallelModel | None:
        """The model as the next generation has it, its new slots still empty; None of a leaver."""
        plan, home, number = self._plan, self._home, self._number
        if number is None:
            return None
        size = len(plan.members)
        self._group = create_rank_group(
            self._store.make_client(),
            number,
            size,
            home.device,
            generation=plan.generation,
            timeout=home.timeout,
            device_group=home.device_group,
        )
        if self._serving is not None:
            layers = [list(one.layers) for one in self._serving.spread.sets]
        else:
            assert checkpoint is not None, "a newcomer has one"
            layers = find_sets(checkpoint, plan)
        make = home.dispatcher or partial(create_dispatcher, "torch")
        sets = []
        for some, placement in zip(layers, plan.placements, strict=True):
            dispatcher = make(self._group, placement.topology)
            self._dispatchers.append(dispatcher)
            sets.append(
                SetPlan(
                    some,
                    PlacementMaps(placement, home.device),
                    dispatcher,
                    LoadRecorder(placement.num_layers, placement.num_slots, home.device),
                )
            )
        # A rank that serves alone waits for nobody, whom connecting could keep.
        beside = len(plan.serving.held) == 1 or all(
            one.prepares_beside for one in self._dispatchers
        )
        self.needs_detour = not (beside or plan.is_recovery)
        between = any(one.prepares_between_steps for one in self._dispatchers)
        # Those that have served together are connected.
        self._needs_pause = between and bool(plan.newcomers) and not plan.is_recovery
        if self._serving is None:
            assert checkpoint is not None, "as above"
            return build_newcomer(checkpoint, sets, plan, number)
        return self._succeed(self._serving.spread, sets)

    def _succeed(self, spread: ExpertParallelModel, sets: Sequence[SetPlan]) -> ExpertParallelModel:
        return spread.succeed(
            [
                ExpertSet(
                    one.layers,
                    one.weights
                    if keeps_tensors(self._plan, self._home.name, index)
                    else [
                        allocate_slots(
                            layer, new.maps.placement.topology.slots_per_rank, self._home.device
                        )
                        for layer in one.layers
                    ],
                    new.maps,
                    new.dispatcher,
                    new.recorder,
                    one.binding,
                )
                for index, (one, new) in enumerate(zip(spread.sets, sets, strict=True))
            ]
        )

    def _bring(self, spread: ExpertParallelModel | None, checkpoint: Checkpoint | None) -> None:
        plan, home, store = self._plan, self._home, self._store
        place = plan.participants.index(home.name)
        group = create_rank_group(
            PrefixStore("bridge/", store.make_client()),
            place,
            len(plan.participants),
            home.device,
            generation=plan.generation,
            timeout=home.timeout,
            device_group="gloo",
        )
        group.is_beside_nccl = home.device_group == "nccl" or self._serves_over_nccl()
        target: Weights = [] if spread is None else [one.weights for one in spread.sets]
        given: Weights = target
        if self._serving is not None:
            given = [one.weights for one in self._serving.spread.sets]
        had = HostCopies() if self._serving is None else self._serving.copies
        # They are read from the checkpoint, as what nobody holds may be.
        had.wait(self._find_left())
        shared = self._exchange_shared(spread, checkpoint)
        self._bridge = Bridge(group, home.config, given, had, shared)
        keeps = [
            keeps_tensors(plan, home.name, index) and self._serving is not None
            for index in range(len(plan.placements))
        ]
        self._notify("pull")
        newcomers = [plan.participants.index(name) for name in plan.newcomers]
        givers = [plan.participants.index(name) for name in plan.serving.held]
        fetches = list_fetches(plan)
        if home.device.type == "cuda":
            self._bridge.touch(fetches, givers, newcomers)
        started = time.perf_counter()
        received = self._bridge.share(givers, newcomers, store.check)
        with _Restorer(spread, checkpoint, home.name) as restore:
            self.haul = self._bridge.haul(fetches, target, keeps, restore, store.check)
            self._synchronize()
            self.haul.seconds = time.perf_counter() - started
            self._notify("verify")
            if home.config.verify != "off":
                self._bridge.meet(self._find_left())
                self._bridge.verify(fetches, target, self.haul, home.config.verify)
            if plan.backup != "none":
                kept = self._bridge.back_up(list_copy_fetches(plan), target, restore, store.check)
                self._copies = self._keep(spread, checkpoint, kept, had)
        self.haul.received_bytes += received
        self._bridge.meet(self._find_left())

    def _keep(
        self,
        spread: ExpertParallelModel | None,
        checkpoint: Checkpoint | None,
        kept: Mapping[CopyKey, Sequence[Tensor]],
        had: HostCopies,
    ) -> HostCopies:
        """What this rank keeps in host memory from now on."""
        if spread is None or self._number is None:
            return HostCopies()
        kept_by = find_kept(self._plan)
        stays = kept_by[self._number] - set(kept)
        rule = None
        if checkpoint is not None:
            read = partial(read_copy, spread, checkpoint)
            rule = CopyRule(self._plan.backup, self._number, kept_by, read)
        return HostCopies({**kept, **{key: had[key] for key in stays}}, rule)

    def _rehearse(self, parallel: ParallelModel) -> None:
        """Leave nothing for the first step to do for the first time."""
        self._notify("rehearse")
        self._store.check()
        self._synchronize()
        # A newcomer's serving stream is free, and keeps what is allocated on it.
        with torch.cuda.stream(self._serving_stream if self._serving is None else None):
            if self._serving is None:
                try_alone(parallel.spread, self._home.device)
            try_choices(parallel.spread, self._home.device)
            if self._try_out is not None:
                self._try_out(parallel)
            self._synchronize()
        self._drop_bridge_early()
        self._make_way()
        # In a recovery what the dead have left on the device may keep what connects.
        if not self._plan.is_recovery or all(one.prepares_beside for one in parallel.dispatchers):
            try_together(parallel.spread, self._home.device, self._prepares_here)

    def _prepares_here(self, dispatcher: TokenDispatcher) -> bool:
        """On this thread, and not on the one that serves."""
        if not dispatcher.prepares_between_steps:
            return True
        return self._serving is None and not self._plan.is_recovery

    def connect_between_steps(self) -> None:
        """The thread that serves, while `wait_aside` waits: what is for no other thread.

        Collective: every member of the next generation.
        Raises: TransferError or MembershipError if a rank does not take part in time.
        """
        if self.parallel is not None and self._needs_pause:
            spread, device = self.parallel.spread, self._home.device
            try_together(spread, device, lambda one: one.prepares_between_steps)

    def _serves_over_nccl(self) -> bool:
        if self._serving is None or self._plan.is_recovery:
            return False
        return has_nccl(self._serving.state.group.device_group)

    def _make_way(self) -> None:
        """Have tokens leave nothing on devices that waits for a peer while ranks connect there.

        And have the thread that serves do its part of it; newcomers are there by then.
        """
        if not (self.needs_detour or self._needs_pause):
            return
        if self._wait_aside is None:
            self._store.tell(f"connects/{self._home.name}", "yes")
            return
        self._store.hear_all("connects", self._plan.newcomers, self._deadline)
        self._wait_aside(self._deadline)

    def _synchronize(self) -> None:
        """Wait for what this thread has enqueued on its stream."""
        if self._home.device.type == "cuda":
            torch.cuda.current_stream(self._home.device).synchronize()

    def _find_left(self) -> float:
        """Seconds that others may still take to prepare."""
        return max(0.0, self._deadline - time.monotonic())

    def _exchange_shared(
        self, spread: ExpertParallelModel | None, checkpoint: Checkpoint | None
    ) -> list[SharedTensor]:
        """What newcomers need beside experts, listed the same on every participant."""
        plan, store = self._plan, self._store
        if not plan.newcomers:
            return []
        teller = next(iter(plan.serving.held))
        if self._serving is not None:
            mine = list_shared(self._serving.spread)
            if self._home.name == teller:
                store.tell("shared", json.dumps([one.to_json() for one in mine]))
            return mine
        assert spread is not None, "a newcomer is a member"
        assert checkpoint is not None, "and has a checkpoint"
        told = json.loads(store.hear("shared", teller, self._deadline))
        listed = [SharedTensor.from_json(one) for one in told]
        return finish_newcomer(checkpoint, spread, listed, self._home.device)

    def _make_fingerprint(self) -> str:
        facts = (self._plan.to_json(), self._home.config.model_dump_json())
        return hashlib.blake2b(json.dumps(facts).encode(), digest_size=8).hexdigest()

    def _drop_bridge_early(self) -> None:
        """NIXL-EP lost the memory of a peer where a wire to that peer was closed.

        So this is before it connects them, or once it is through with those that leave.
        """
        if self._serving is None or len(self._plan.serving.held) == 1:
            self._drop_bridge()

    def _drop_bridge(self) -> None:
        bridge, self._bridge = self._bridge, None
        if bridge is not None:
            bridge.close()


class _Restorer:
    """Reads experts that nobody holds from the checkpoint, and nothing else of it."""

    def __init__(
        self, spread: ExpertParallelModel | None, checkpoint: Checkpoint | None, name: str
    ) -> None:
        self._spread, self._checkpoint, self._name = spread, checkpoint, name

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._checkpoint is not None:
            self._checkpoint.close()

    def __call__(self, index: int, layer: int, expert: int) -> Sequence[Tensor]:
        if self._spread is None or self._checkpoint is None:
            raise MembershipError(
                f"layer {layer}, expert {expert} is held by nobody, and {self._name} has no "
                "checkpoint to read it from"
            )
        return self._checkpoint.read_expert(self._spread.sets[index].layers[layer], expert)
