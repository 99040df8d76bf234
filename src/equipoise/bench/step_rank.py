"""What each rank does when steps of the engine are measured.

Axis letters: L layers, R ranks, S slots per rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from equipoise.balancer import RebalanceOutcome
from equipoise.bench.step_case import (
    CaseName,
    Compared,
    LeftOut,
    Setting,
    StepParts,
    StepSaid,
    StepSpec,
    Timed,
)
from equipoise.bench.step_loads import read_shares
from equipoise.bench.step_model import Routes, build_model, measure_experts
from equipoise.bench.step_parts import StepClock
from equipoise.bench.step_prediction import TimedExperts, fit_plane
from equipoise.comm.groups import RankGroup
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepResult
from equipoise.engine.requests import Request, SamplingParams
from equipoise.models.parallel import ParallelModel, parallelize
from equipoise.topology import Topology

if TYPE_CHECKING:
    from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager

_WARM_STEPS, _FILL_STEPS = 5, 10
_PART_STEPS = 8
_NUM_TIMED = 96
"""Of the loads that came to a rank in a layer, at most how many its experts are timed with."""
_DECODE_PROMPT, _DECODE_TOKENS = 1, 120
"""Rows are replaced all at once; all lengths are of one graph."""
_NEVER = 1 << 40

Fed = tuple[Engine, Callable[[], None]]
"""An engine, and what gives it the requests of its next step."""


def measure_steps(spec: StepSpec, group: RankGroup, emit: Callable[[StepSaid], None]) -> None:
    """Measure the cases, one after the other, on one model.

    Args:
        spec: the same on every rank.
        group: its ranks.
        emit: called on rank 0.
    Collective: every rank of the group.
    Raises: TransferError or MembershipError if a rank fails.
    """
    if group.device.type == "cpu":
        # Ranks share the cores; threads of theirs would only wait for each other.
        torch.set_num_threads(1)
    bench = _Bench(spec, group)
    measures: dict[CaseName, Callable[[], Compared | LeftOut]] = {
        "prefill": bench.compare_prefill,
        "decode": bench.compare_decode,
        "recorder": bench.compare_recorder,
        "stall": bench.compare_stall,
        "graphs": bench.compare_graphs,
    }
    try:
        if group.rank == 0:
            emit(bench.describe())
        for case in spec.cases:
            said = measures[case]()
            if group.rank == 0:
                emit(said)
    finally:
        bench.close()


@dataclass
class _Tally:
    """Steps of one kind on this rank.

    Attributes:
        decodes: whether steps that take prompts are left out.
        step_s: wall seconds of each.
        balance_s: of these in the balancer's step.
        num_tokens: of all.
        counts: of each [L, P], where loads are kept.
        moves: experts that travelled meanwhile.
        rebalances: that ended meanwhile.
    """

    decodes: bool = False
    step_s: list[float] = field(default_factory=list)
    balance_s: list[float] = field(default_factory=list)
    num_tokens: int = 0
    counts: list[Tensor] = field(default_factory=list)
    moves: int = 0
    rebalances: int = 0

    def add(self, result: StepResult) -> None:
        self.note(result.outcomes)
        if self.decodes and any(delta.position == 0 for delta in result.deltas):
            return
        figures = result.figures
        self.step_s.append(figures.step_s)
        self.balance_s.append(figures.balance_s)
        self.num_tokens += figures.num_tokens
        self.counts += [load.slot_count for load in figures.loads]

    def note(self, outcomes: Sequence[RebalanceOutcome]) -> None:
        """Rebalances have ended."""
        self.rebalances += len(outcomes)
        self.moves += sum(outcome.moves for outcome in outcomes)


class _Bench:
    """A model under balance, whose plans come when the bench asks for them."""

    def __init__(self, spec: StepSpec, group: RankGroup) -> None:
        self._spec, self._group = spec, group
        self._dtype = torch.float32 if spec.device == "cpu" else torch.bfloat16
        self._manager: NixlEPAll2AllManager | None = None
        self._random = np.random.default_rng(spec.seed + group.rank)
        self._num_requests = 0
        self._others: list[ParallelModel] = []
        # Balances at each step that may begin it; paused but for the blocks that are for it.
        self.parallel, self._routes = self._spread(spec.balancing, step_interval=1)
        self.parallel.state.pause()

    def _spread(
        self, config: EPLBConfig, *, step_interval: int = _NEVER
    ) -> tuple[ParallelModel, Routes]:
        """A model of its own, experts in order; all have the same weights and routes."""
        spec = self._spec
        config = config.model_copy(
            update={
                "window_size": spec.num_steps,
                "step_interval": step_interval,
                "communicator": spec.communicator,
            }
        )
        model = build_model(spec.size, self._dtype, self._group.device, spec.seed)
        parallel = parallelize(model, self._group, config, dispatcher=self._make_dispatcher)
        shares = read_shares(spec.size, spec.kind)
        return parallel, Routes(parallel, shares, spec.size.top_k, spec.seed)

    def close(self) -> None:
        """Release what was taken. Collective: every rank of the group."""
        # All at the end: NIXL-EP loses a peer's memory when an agent of NIXL lets go of the peer.
        for parallel in (self.parallel, *self._others):
            parallel.close()
        if self._manager is not None:
            self._manager.close()

    def compare_prefill(self) -> Compared:
        """Prompts alone, experts in order and balanced."""

        def make(parallel: ParallelModel) -> Fed:
            spec = self._spec
            limits = self._limit(spec.num_prompts, spec.prompt_len + 1, spec.prefill_tokens)
            engine = Engine(parallel, limits)

            def feed() -> None:
                for _ in range(spec.num_prompts):
                    engine.submit(self._make_request(spec.prompt_len, 1))

            return engine, feed

        return self._compare_placements("prefill", make)

    def compare_decode(self) -> Compared:
        """As many sequences as there are rows, each a token further in a step."""
        return self._compare_placements("decode", self._make_decoding)

    def compare_recorder(self) -> Compared | LeftOut:
        """The same steps with counting off and on, by turns."""
        if self._group.device.type != "cuda":
            return LeftOut("recorder", "a GPU: on a CPU it is lost among the steps' own noise")
        engine, feed = self._make_decoding(self.parallel)
        (one,) = self.parallel.spread.sets
        tallies = _Tally(decodes=True), _Tally(decodes=True)
        for step in range(2 * self._spec.num_steps):
            # Off, on, on, off: what grows with the sequences is the same on both sides.
            counts = step % 4 in (1, 2)
            one.recorder.enabled = counts
            self._run(engine, feed, 1, tallies[counts])
        one.recorder.enabled = True
        return Compared("recorder", self._merge(tallies[0]), self._merge(tallies[1]))

    def compare_stall(self) -> Compared:
        """Decode steps with rebalances back to back and without, in blocks by turns."""
        spec = self._spec
        num_blocks = 2 * -(-spec.num_stall_steps // spec.block_steps)
        engine, feed = self._make_decoding(self.parallel)
        off, on, between = _Tally(decodes=True), _Tally(decodes=True), _Tally()
        state = self.parallel.state
        for block in range(num_blocks):
            # What the block before has begun ends outside of what is measured.
            self._settle(engine, feed, between)
            into = on if block % 2 else off
            if block % 2:
                self._rename_experts()
                state.resume()
            for _ in range(spec.block_steps):
                num_before = into.rebalances
                self._run(engine, feed, 1, into)
                if into.rebalances > num_before:
                    self._rename_experts()
            state.pause()
        self._settle(engine, feed, between)
        moves, rebalances = on.moves + between.moves, on.rebalances + between.rebalances
        return Compared(
            "stall", self._merge(off), self._merge(on), moves=moves, rebalances=rebalances
        )

    def _rename_experts(self) -> None:
        """One rank is done with it sooner than another, which is no wait of a step's either."""
        self._routes.rename_experts()
        self._group.barrier()

    def compare_graphs(self) -> Compared | LeftOut:
        """Decode steps launched one kernel at a time, and as graphs, by turns."""
        if not all(dispatcher.captures for dispatcher in self.parallel.dispatchers):
            return LeftOut("graphs", "two GPUs and --dispatcher nixl_ep")
        sides = [
            (self._make_decoding(self.parallel, graphs=graphs), _Tally(decodes=True))
            for graphs in (False, True)
        ]
        for _ in range(self._spec.num_steps):
            for (engine, feed), tally in sides:
                self._run(engine, feed, 1, tally)
        (_, eager), (_, captured) = sides
        return Compared("graphs", self._merge(eager), self._merge(captured))

    def describe(self) -> Setting:
        """What was measured on."""
        device = self._group.device
        (wire,) = self.parallel.communicators
        return Setting(
            device="cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            dtype=str(self._dtype).removeprefix("torch."),
            communicator=f"{wire.name} ({wire.reason})",
        )

    def _compare_placements(self, case: CaseName, make: Callable[[ParallelModel], Fed]) -> Compared:
        """Steps with experts in order and steps of a balanced model, by turns."""
        balanced, _ = self._spread(EPLBConfig(use_async=False))
        self._others.append(balanced)
        sides = self._begin_together(make(self.parallel)), self._begin_together(make(balanced))
        decodes = case == "decode"
        tallies, between = (_Tally(decodes), _Tally(decodes)), _Tally()
        for side in sides:
            self._run(*side, _FILL_STEPS, _Tally())
        between.note(balanced.state.rearrange())
        for side in sides:
            self._run(*side, _WARM_STEPS, _Tally())
        for step in range(2 * self._spec.num_steps):
            is_balanced = step % 4 in (1, 2)
            self._run(*sides[is_balanced], 1, tallies[is_balanced])
        off, on = (self._merge(tally) for tally in tallies)
        experts = self._time_experts(balanced, tallies)
        parts = None if decodes else self._time_parts(sides, between)
        return Compared(case, off, on, experts, parts, between.moves, between.rebalances)

    def _begin_together(self, fed: Fed) -> Fed:
        """What ranks do between steps is no wait of a step's."""
        engine, feed = fed

        def feed_all() -> None:
            feed()
            self._group.barrier()

        return engine, feed_all

    def _time_experts(self, parallel: ParallelModel, tallies: Sequence[_Tally]) -> TimedExperts:
        """Each rank with the loads of its own of a few steps: no two devices are as fast."""
        num_steps = max(1, _NUM_TIMED // (2 * self._spec.size.num_layers))
        # [off and on, steps, L, R, S]
        slot_count = torch.stack([self._sum_counts(tally)[:num_steps] for tally in tallies])
        own = slot_count[:, :, :, self._group.rank]
        own_s = measure_experts(parallel, own.flatten(0, 2)).view(own.shape[:3])
        seconds = self._group.all_gather(own_s)
        planes = tuple(
            fit_plane(slot_count[:, :, :, rank].flatten(0, 2).numpy(), one.flatten().numpy())
            for rank, one in enumerate(seconds)
        )
        off_s, on_s = torch.stack(seconds, dim=-1).numpy()
        return TimedExperts(planes, off_s, on_s)

    def _time_parts(self, sides: tuple[Fed, Fed], into: _Tally) -> tuple[StepParts, StepParts]:
        """Some more steps, whose parts are marked: marks take time of their own."""
        models = self.parallel, self._others[-1]
        clocks = [StepClock(self._group, *parallel.dispatchers) for parallel in models]
        for step in range(2 * _PART_STEPS):
            is_balanced = step % 4 in (1, 2)
            with clocks[is_balanced].watch():
                self._run(*sides[is_balanced], 1, into)
        off, on = (clock.sum_up() for clock in clocks)
        return off, on

    def _make_dispatcher(self, group: RankGroup, topology: Topology) -> TokenDispatcher:
        spec = self._spec
        if spec.dispatcher != "nixl_ep":
            return create_dispatcher(spec.dispatcher, group, topology)
        from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
        from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions

        if self._manager is None:
            self._manager = NixlEPAll2AllManager(group.size, group.device, group.timeout)
        most = max(spec.decode_size, spec.prefill_tokens if "prefill" in spec.cases else 1)
        options = NixlEPOptions(self._manager, most, spec.size.hidden_size)
        return create_dispatcher(options, group, topology)

    def _limit(self, num_rows: int, max_len: int, prefill: int) -> EngineLimits:
        return EngineLimits(num_rows, max_len, prefill, end_tokens=frozenset(), keep_load=True)

    def _make_decoding(self, parallel: ParallelModel, *, graphs: bool = True) -> Fed:
        """An engine in which every row decodes, but for a step at which all are replaced."""
        size = self._spec.decode_size
        length = _DECODE_PROMPT + _DECODE_TOKENS
        engine = Engine(parallel, self._limit(size, length, size * _DECODE_PROMPT), graphs=graphs)

        def feed() -> None:
            while engine.num_requests < size:
                engine.submit(self._make_request(_DECODE_PROMPT, _DECODE_TOKENS))

        # Until all of its shapes have been met once.
        self._run(engine, feed, _WARM_STEPS if self._manager is None else length, _Tally())
        return engine, feed

    def _make_request(self, length: int, max_new_tokens: int) -> Request:
        self._num_requests += 1
        tokens = self._random.integers(1, self._spec.size.vocabulary, length).tolist()
        sampling = SamplingParams(max_new_tokens=max_new_tokens, ignore_end=True)
        return Request(str(self._num_requests), tuple(tokens), sampling)

    def _run(self, engine: Engine, feed: Callable[[], None], num_steps: int, tally: _Tally) -> None:
        """Until so many more steps have been counted: ranks take prompts at the same steps."""
        most = len(tally.step_s) + num_steps
        while len(tally.step_s) < most:
            feed()
            tally.add(engine.step())

    def _settle(self, engine: Engine, feed: Callable[[], None], tally: _Tally) -> None:
        """Step until no rebalance is under way; every rank knows at the same step."""
        while self.parallel.state.is_rebalancing:
            self._run(engine, feed, 1, tally)

    def _merge(self, tally: _Tally) -> Timed:
        """The figures of all ranks."""
        seconds = torch.tensor([tally.step_s, tally.balance_s], dtype=torch.float64)
        num_tokens = torch.tensor(tally.num_tokens)
        self._group.all_reduce(seconds, "max")
        self._group.all_reduce(num_tokens)
        by_rank = self._sum_counts(tally)
        return Timed(
            step_s=seconds[0].numpy(),
            balance_s=seconds[1].numpy(),
            num_tokens=int(num_tokens),
            rank_tokens=by_rank.sum(3).numpy(),
            occupied=(by_rank > 0).sum(3).numpy(),
        )

    def _sum_counts(self, tally: _Tally) -> Tensor:
        """[steps, L, R, S] int64, rows that came to each slot."""
        slot_count = torch.stack(tally.counts).cpu()
        self._group.all_reduce(slot_count)
        return slot_count.view(*slot_count.shape[:2], self._group.size, -1)
