"""The spine: record -> (plan due?) -> plan -> transfer -> commit."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from equipoise.balancer.accounting import Accounts, Measure, sum_measures
from equipoise.balancer.background import Background
from equipoise.balancer.foreground import Foreground
from equipoise.balancer.limits import NUM_HALVES, find_half_bytes
from equipoise.balancer.model_state import EplbModelState, OnCommit
from equipoise.balancer.orders import Order
from equipoise.balancer.outcome import RebalanceOutcome
from equipoise.balancer.stats import EplbStats
from equipoise.comm.base import EplbCommunicator, ExpertWeights
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch.maps import PlacementMaps
from equipoise.errors import (
    ConfigError,
    DependencyError,
    EquipoiseError,
    PlacementError,
    TransferError,
)
from equipoise.load.recorder import LoadRecorder
from equipoise.load.window import LoadWindow
from equipoise.policy.base import PlacementPolicy
from equipoise.transfer.agreement import agree
from equipoise.transfer.executor import (
    check_fit,
    rearrange_expert_weights_inplace,
)

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry
    from prometheus_client.registry import Collector

logger = logging.getLogger(__name__)

_ORDERS = MappingProxyType(
    {
        "rearrange": Order.REARRANGE,
        "pause": Order.PAUSE,
        "resume": Order.RESUME,
        "stop": Order.STOP,
    }
)


class EplbState:
    """Keeps the experts of one or more models balanced over the ranks of a group.

    With `use_async` a worker thread plans and stages experts beside the forward pass, and `step`
    commits them; without, `step` does it all when a plan is due.

    Owner: the forward thread of its rank, which makes every call; only `stats` and `request` may be
    called from any thread.

    Args:
        config: the same on every rank.
        group: ranks that serve the experts, one generation.
        policy: makes placements; deterministic.

    Attributes:
        steps: forward passes of this rank that were closed.
        transfer_group: the group that communicators are made over: `group`, or the workers' own.

    Collective: the constructor too, on every rank of the group, with `use_async`.
    Raises: MembershipError, then, if a rank does not come.
    """

    def __init__(self, config: EPLBConfig, group: RankGroup, policy: PlacementPolicy) -> None:
        self.config = config
        self.group = group
        self.policy = policy
        self.steps = 0
        self._foreground = Foreground(group, config, policy)
        self._background: Background | None = None
        if config.use_async:
            self._background = Background(group.fork("balancer"), config, policy)
        self._models: dict[str, EplbModelState] = {}
        self._listeners: list[Callable[[RebalanceOutcome], None]] = []
        self._accounts = Accounts(config)
        self._is_paused = False
        self._failure: str | None = None
        # Guards what `stats` reads.
        self._lock = threading.Lock()

    @property
    def transfer_group(self) -> RankGroup:
        """The group that communicators are made over. Collective: none."""
        return self.group if self._background is None else self._background.group

    @property
    def models(self) -> tuple[EplbModelState, ...]:
        """Those under balance, as they were added. Collective: none; forward thread."""
        return tuple(self._models.values())

    def add_model(
        self,
        name: str,
        expert_weights: ExpertWeights,
        maps: PlacementMaps,
        recorder: LoadRecorder,
        communicator: EplbCommunicator,
        *,
        on_commit: OnCommit | None = None,
    ) -> EplbModelState:
        """Put a model under balance, before its first step.

        Args:
            name: not used by another model of this state.
            expert_weights: per MoE layer the tensors [S, ...] of this rank's slots, contiguous,
                each with memory of its own that it keeps.
            maps: its placement on the device.
            recorder: what its layers count tokens with.
            communicator: a wire that knows these weights, made over `transfer_group`.
            on_commit: called on the forward thread with a layer and its local slots [n] int64
                that hold another expert now, after slots and maps have switched and before the
                next forward pass, so that the engine makes anew what it derived from the weights.
                What it raises ends `step`, on this rank alone; in the background, this rank
                balances no more, and raises at each step.
        Collective: every rank of the group, models in the same order.
        Raises: ConfigError if the name is taken; PlacementError, naming the layer and the tensor,
            if weights, recorder or maps do not fit each other; TransferError, on every other
            rank, if one has such a problem, and on every rank if they come with different
            configurations, placements or weights; MembershipError if one does not come.
        """
        problem: Exception | None = None
        try:
            self._check_name(name)
            check_fit(maps.placement, expert_weights, self.group)
            _check_recorder(recorder, maps)
        except EquipoiseError as error:
            problem = error
        agree(self.group, self._collect_facts(name, expert_weights, maps), problem)
        model = EplbModelState(
            name,
            expert_weights,
            maps,
            recorder,
            LoadWindow(
                maps.placement.num_layers,
                maps.placement.num_experts,
                self.config.window_size,
                recorder.counts.device,
            ),
            communicator,
            self.group.rank,
            on_commit,
        )
        communicator.is_beside_forward = self._background is not None
        with self._lock:
            self._models[name] = model
        return model

    def _check_name(self, name: str) -> None:
        if name in self._models:
            raise ConfigError(f"a model named {name!r} is already under balance")
        if self._background is not None and self._background.has_started:
            raise ConfigError(
                f"model {name!r} comes after the first step: in the background, models are "
                "added before it"
            )

    def _collect_facts(
        self, name: str, expert_weights: ExpertWeights, maps: PlacementMaps
    ) -> dict[str, str]:
        """What ranks must agree on to balance a model together."""
        shapes = [[(list(t.shape), str(t.dtype)) for t in layer] for layer in expert_weights]
        return {
            "model name": name,
            "configuration": self.config.model_dump_json(),
            "policy": self.policy.name,
            "placement": maps.placement.fingerprint(),
            "weights": repr(shapes),
        }

    def add_listener(self, listener: Callable[[RebalanceOutcome], None]) -> None:
        """Tell this listener, too, of every rebalance.

        Args:
            listener: called on the forward thread, on this rank, once all models' experts are
                where they go.
        Collective: none.
        """
        self._listeners.append(listener)

    def inherit(self, before: EplbState) -> None:
        """Go on from what this rank has seen in the generation before: load and listeners.

        Args:
            before: of the same models, added in the same order; it steps no more.
        Collective: none; before the first step.
        """
        for mine, theirs in zip(self._models.values(), before.models, strict=True):
            mine.window = theirs.window
        self._listeners[:0] = before._listeners

    def stats(self) -> EplbStats:
        """Figures of this moment; any thread may ask. Collective: none."""
        with self._lock:
            figures = {model.name: model.stats for model in self._models.values()}
            return EplbStats(self.steps, MappingProxyType(figures), self._failure)

    def register_metrics(self, registry: CollectorRegistry) -> Collector:
        """Have the caller's Prometheus registry read `stats` when it is scraped.

        Returns:
            what `registry.unregister` takes; until then the registry keeps this state alive.
        Collective: none; all figures but steps are the same on every rank.
        Raises: DependencyError without prometheus-client; ValueError if the registry has metrics
            of these names.
        """
        try:
            from equipoise.balancer.metrics import register_stats
        except ImportError as error:
            raise DependencyError(
                "metrics need prometheus-client: pip install 'equipoise[metrics]'"
            ) from error
        return register_stats(registry, self.stats)

    def step(self) -> tuple[RebalanceOutcome, ...]:
        """Close a forward pass: take its load, and rebalance when a plan is due.

        A rank without requests calls it as often as the others: its forward pass is a dummy whose
        tokens are padding, so it takes part in dispatch and adds nothing to the load.

        Returns:
            One outcome per model that a plan was made for; empty on most steps.
        Collective: every rank of the group, once after each forward pass.
        Raises: TransferError or MembershipError, on every rank concerned, within the deadline;
            PlacementError if weights have moved in memory.
        """
        with self._lock:
            self.steps += 1
        for model in self._models.values():
            model.record_step()
        self._accounts.record(self._models.values())
        if self._background is not None:
            return self._step_in_background(self._background)
        if self._is_due:
            return self.rearrange()
        self._measure(begins=False)
        return ()

    def rearrange(self, *, is_profile: bool = False) -> tuple[RebalanceOutcome, ...]:
        """Plan from the window's load now, and move experts.

        In the background it only begins now, unless a rebalance is under way, and its outcomes
        come from the steps that follow.

        Args:
            is_profile: change nothing, but take the buffers that a real call may need, so that
                memory profiling sees them; in the background, before the first step.
        Returns:
            One outcome per model whose window has any load; none of a profile pass.
        Collective: every rank of the group, at the same step.
        Raises: as `step`; TransferError if ranks come at different steps or with different models.
        """
        if self._background is not None and not is_profile:
            self._start_background(self._background)
            self._begin(self._background, is_due=True)
            return ()
        models = list(self._models.values())
        self._foreground.agree(models, self.steps)
        if is_profile:
            self._reserve()
            return ()
        self._measure(begins=True)
        outcomes: tuple[RebalanceOutcome, ...] = ()
        for model in models:
            outcome = self._foreground.rearrange(model, self.steps)
            if outcome is not None:
                self._take(outcome)
                outcomes += (outcome,)
        # Only now: a listener that raises shall not keep this rank from what others move.
        self._tell(outcomes)
        return outcomes

    def pause(self) -> None:
        """Begin no rebalance until `resume`; one under way goes on to its end.

        Collective: every rank of the group, at the same step.
        """
        self._set_paused(True)

    def resume(self) -> None:
        """Begin rebalances again when plans are due. Collective: as `pause`."""
        self._set_paused(False)

    def request(self, what: Literal["rearrange", "pause", "resume", "stop"]) -> None:
        """Have all ranks do something at one step, in the background, and return at once.

        The workers take it up when a rebalance begins, or within some steps while none does, and
        settle the step as they do for a commit. Requests of one rank are followed in their order.

        Args:
            what: `rearrange` begins a rebalance, once none is under way; `pause` and `resume` are
                what these methods do, and `is_paused` tells when; `stop` ends balancing.
        Collective: none; any one rank, any thread.
        Raises: ConfigError for anything else, or in the foreground; TransferError if balancing
            has ended.
        """
        if what not in _ORDERS:
            raise ConfigError(f"cannot ask for {what!r}: ask for one of {', '.join(_ORDERS)}")
        if self._background is None:
            raise ConfigError(
                f"with use_async=False nothing runs beside the forward pass that could take "
                f"{what!r} to other ranks: call the method of that name on every rank"
            )
        with self._lock:
            failure = self._failure
        if failure is not None:
            raise TransferError(
                f"rank {self.group.rank}: balancing has ended: {failure}", rank=self.group.rank
            )
        self._background.order(_ORDERS[what])

    @property
    def is_paused(self) -> bool:
        """Whether no rebalance begins by itself; the same on every rank at the same step."""
        return self._is_paused if self._background is None else self._background.is_paused

    def _set_paused(self, is_paused: bool) -> None:
        if self._background is None:
            self._is_paused = is_paused
        else:
            self._background.is_paused = is_paused

    @property
    def is_rebalancing(self) -> bool:
        """Whether a rebalance is under way; the same on every rank at the same step.

        To drain: `pause`, and step until it is not.
        """
        return self._background is not None and self._background.is_under_way

    def close(self, *, wait_s: float | None = None) -> bool:
        """Stop balancing, from whatever it is doing; twice is fine.

        A rebalance under way is given up: what was committed stays. Group and communicators
        remain the caller's to close.

        Args:
            wait_s: longest wait for this rank's worker; None for the group's timeout.
        Returns:
            Whether communicators may be closed; if not, the worker still uses them.
        Collective: every rank of the group, at the same step.
        """
        return self._background is None or self._background.close(wait_s)

    def _start_background(self, background: Background) -> None:
        if not background.has_started and background.failure is None:
            background.start(list(self._models.values()))

    @property
    def _is_due(self) -> bool:
        return self.steps % self.config.step_interval == 0 and not self.is_paused

    def _step_in_background(self, background: Background) -> tuple[RebalanceOutcome, ...]:
        self._start_background(background)
        try:
            outcomes = background.close_step(self.steps)
        finally:
            with self._lock:
                self._failure = background.failure
        for outcome in outcomes:
            self._take(outcome)
        self._note_realised(background.take_measured())
        self._tell(outcomes)
        # A rebalance that is due is also the one that was asked for.
        self._begin(background, is_due=background.take_wanted() or self._is_due)
        return outcomes

    def _begin(self, background: Background, *, is_due: bool) -> None:
        """Have the worker do what is due at this step; all of it in the order of steps."""
        measures: tuple[Measure, ...] = ()
        if background.may_begin:
            measures = self._accounts.collect(self._models.values(), self.steps, begins=is_due)
        background.poll(self.steps, measures)
        if is_due:
            background.trigger(self.steps)

    def _measure(self, *, begins: bool) -> None:
        """In the foreground: exchange at once what is due."""
        measures = self._accounts.collect(self._models.values(), self.steps, begins=begins)
        says = self.group.rank == 0
        self._note_realised(sum_measures(measures, self.group.all_reduce, says=says))

    def _note_realised(self, outcomes: list[RebalanceOutcome]) -> None:
        with self._lock:
            for outcome in outcomes:
                model = self._models[outcome.model]
                model.stats = model.stats.note_realised(outcome)

    def _take(self, outcome: RebalanceOutcome) -> None:
        """Count and log a rebalance."""
        model = self._models[outcome.model]
        with self._lock:
            model.stats = model.stats.add(outcome)
        self._accounts.open(model, outcome)
        if self.group.rank == 0:
            logger.info("%s", outcome)

    def _tell(self, outcomes: tuple[RebalanceOutcome, ...]) -> None:
        for outcome in outcomes:
            for listener in self._listeners:
                listener(outcome)

    def _reserve(self) -> None:
        for model in self._models.values():
            staging_bytes = self.config.staging_bytes
            held: list[Tensor] = []
            if self._background is not None:
                num_slots = model.placement.topology.slots_per_rank
                staging_bytes = find_half_bytes(
                    model.expert_bytes, num_slots, self.config, self.group.device
                )
                # The pass takes one half; the worker has all of them at once.
                held = [
                    torch.empty(staging_bytes, dtype=torch.uint8, device=self.group.device)
                    for _ in range(NUM_HALVES - 1)
                ]
            rearrange_expert_weights_inplace(
                model.placement,
                model.placement,
                model.expert_weights,
                model.communicator,
                self.group,
                staging_bytes=staging_bytes,
                is_profile=True,
            )
            del held


def _check_recorder(recorder: LoadRecorder, maps: PlacementMaps) -> None:
    counted, placed = list(recorder.counts.shape), list(maps.slot_to_expert.shape)
    if counted != placed:
        raise PlacementError(
            f"the recorder counts [layers, slots] {counted}, the placement has {placed}"
        )
    if recorder.counts.device != maps.slot_to_expert.device:
        raise PlacementError(
            f"the recorder is on {recorder.counts.device}, the maps are on "
            f"{maps.slot_to_expert.device}: both must be where tokens are routed"
        )
