"""Ranks that come and go by a script, in real processes, each checked against the plain model."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from equipoise import EPLBConfig
from equipoise.comm.groups import create_rank_group
from equipoise.elastic.builder import Home
from equipoise.elastic.detour import Detour
from equipoise.elastic.generation import NextGeneration
from equipoise.elastic.membership import Deadlines, MembershipPlan, Serving
from equipoise.elastic.placing import Redundancy
from equipoise.elastic.planning import describe, plan_change
from equipoise.elastic.verdict import Word, settle
from equipoise.errors import EquipoiseError
from equipoise.models.host_copies import HostBackup
from equipoise.models.loading import load_model
from equipoise.models.parallel import ParallelModel, keep_copies, parallelize
from tests.ranks import Rank
from tests.test_models import VOCABULARY, make_model

CPU = torch.device("cpu")
PATIENCE_S = 60.0
"""What takes longer, on the slowest machine, hangs."""
TIMEOUT_S = 120.0
"""Of a test, whatever its ranks wait for."""


@dataclass
class Cast:
    """One process, a rank by name whether it serves or not.

    Attributes:
        rank: of the test.
        config: balancing.
        redundancy: of all generations.
        home: of this rank.
        plain: the model as it must be.
        backup: which experts ranks keep in host memory.
        parallel: what it serves, while it does.
        names: of the serving generation, by number.
    """

    rank: Rank
    config: EPLBConfig
    redundancy: Redundancy
    home: Home
    plain: Any
    backup: HostBackup = "none"
    parallel: ParallelModel | None = None
    names: tuple[str, ...] = ()
    forwards: int = 0
    retired: list[NextGeneration] = field(default_factory=list)
    detour: Detour = field(default_factory=Detour)

    @property
    def name(self) -> str:
        return self.home.name

    def forward(self) -> None:
        """One pass of all serving ranks, each with tokens of its own; as the plain model."""
        assert self.parallel is not None
        self.forwards += 1
        random = torch.Generator().manual_seed(1000 * self.rank.rank + self.forwards)
        tokens = torch.randint(VOCABULARY, (2, 7), generator=random)
        with torch.inference_mode(), self.parallel.route() as model:
            got = model(input_ids=tokens, use_cache=False).logits
            wanted = self.plain(input_ids=tokens, use_cache=False).logits
        assert (got - wanted).abs().max() <= 2e-6 * max(1.0, wanted.abs().max().item())
        self.parallel.step()

    def meet(self, next_one: NextGeneration | None) -> Word:
        """What ranks do before a step: OPEN, SWITCH or ABORT."""
        assert self.parallel is not None
        word = torch.tensor([next_one.word if next_one else self.detour.word])
        heard = settle([int(told) for told in self.parallel.state.group.all_gather(word)])
        if heard is Word.ASIDE:
            assert next_one is not None
            next_one.stand_aside()
        elif heard is Word.BACK:
            self.detour.end(self.parallel.dispatchers)
        return heard if heard in (Word.SWITCH, Word.ABORT) else Word.OPEN

    def drain(self) -> None:
        """Begin no rebalance, and step until none is under way."""
        assert self.parallel is not None
        self.parallel.state.pause()
        while self.parallel.state.is_rebalancing:
            self.forward()

    def tell_serving(self, change: int) -> None:
        assert self.parallel is not None
        if self.parallel.state.group.rank == 0:
            told = describe(self.parallel, self.names).to_json()
            self.rank.store.set(f"facts/{change}", json.dumps(told))

    def hear_serving(self, change: int) -> Serving:
        self.rank.store.wait([f"facts/{change}"], timedelta(seconds=PATIENCE_S))
        return Serving.from_json(json.loads(self.rank.store.get(f"facts/{change}")))

    def check_placements(self) -> None:
        """All ranks have the same placement, and each slot holds the expert that it says."""
        assert self.parallel is not None
        group = self.parallel.state.group
        for one in self.parallel.spread.sets:
            placement = one.maps.placement
            told = group.all_gather(torch.tensor([int(placement.fingerprint()[:15], 16)]))
            assert len({int(each) for each in told}) == 1
            num_slots = placement.topology.slots_per_rank
            mine = placement.slot_to_expert[:, group.rank * num_slots :][:, :num_slots]
            for layer, weights, held in zip(one.layers, one.weights, mine, strict=True):
                for name, tensor in zip(layer.tensors, weights, strict=True):
                    whole = self.plain.get_submodule(layer.name).get_parameter(name)
                    assert getattr(layer.module, name).data_ptr() == tensor.data_ptr()
                    for slot, expert in enumerate(held):
                        assert expert < 0 or torch.equal(tensor[slot], whole[expert])


def join_cast(
    rank: Rank,
    config: EPLBConfig,
    redundancy: Redundancy,
    *,
    timeout_s: float = 20.0,
    family: str = "qwen3_moe",
) -> Cast:
    """Make this process a rank; nobody serves yet."""
    directory = rank.path / "model"
    if rank.rank == 0:
        make_model(family).save_pretrained(directory)
        rank.store.set("model", "there")
    rank.store.wait(["model"], timedelta(seconds=PATIENCE_S))
    home = Home(
        name=f"rank-{rank.rank}",
        store=rank.store,
        device=CPU,
        config=config,
        timeout=timedelta(seconds=timeout_s),
        model=Path(directory),
    )
    return Cast(rank, config, redundancy, home, load_model(directory, torch.float32, CPU))


def begin(cast: Cast, members: Sequence[int]) -> None:
    """The first generation reads its weights from the checkpoint."""
    cast.names = tuple(f"rank-{member}" for member in members)
    if cast.name not in cast.names:
        return
    group = create_rank_group(
        cast.rank.store.clone(),
        cast.names.index(cast.name),
        len(members),
        CPU,
        generation=1,
        timeout=cast.home.timeout,
        device_group="gloo",
    )
    parallel = parallelize(
        cast.home.model,
        group,
        first_config(cast, len(members)),
        dispatcher=cast.home.dispatcher,
    )
    cast.parallel = keep_copies(parallel, cast.backup)


def first_config(cast: Cast, size: int) -> EPLBConfig:
    """The first generation's slots per rank come from its number of redundant experts."""
    slots = cast.redundancy.choose_slots(8, size)
    return cast.config.model_copy(update={"num_redundant_experts": slots * size - 8})


def change(
    cast: Cast,
    number: int,
    members: Sequence[int],
    *,
    deadlines: Deadlines | None = None,
    watch: Callable[[str], None] | None = None,
) -> str:
    """All processes: go to the next set of ranks; what became of it."""
    if cast.parallel is not None:
        cast.drain()
        cast.tell_serving(number)
    serving = cast.hear_serving(number)
    names = [f"rank-{member}" for member in members]
    plan = plan_change(serving, names, number, cast.redundancy, deadlines, cast.backup)
    plan = MembershipPlan.from_json(json.loads(json.dumps(plan.to_json())))
    if cast.name not in plan.participants:
        cast.names = tuple(names)
        return "away"
    became = take_part(cast, NextGeneration(plan, cast.home, cast.parallel, watch))
    if became in ("switched", "unsure"):
        cast.names = tuple(names)
    return became


def take_part(cast: Cast, next_one: NextGeneration) -> str:
    """Serve until it is decided, then switch, or do not."""
    verdict, state = Word.OPEN, next_one.state
    if cast.parallel is None:
        state = next_one.wait(PATIENCE_S)
        verdict = Word.SWITCH if state in ("decided", "unsure") else Word.ABORT
    try:
        while verdict is Word.OPEN:
            verdict = cast.meet(next_one)
            if verdict is Word.OPEN:
                cast.forward()
    except EquipoiseError:
        next_one.drop("a step has failed")
        assert next_one.wait_closed(PATIENCE_S)
        raise
    if verdict is Word.ABORT:
        next_one.drop("called off")
        cast.detour.note(next_one)
        assert next_one.wait_closed(PATIENCE_S)
        if cast.parallel is not None:
            cast.parallel.state.resume()
        return f"aborted: {next_one.reason}"
    cast.parallel = next_one.switch()
    if next_one.retirement is not None:
        # Beside the first step already, which is worse than what a service does.
        next_one.retirement.begin()
    cast.detour.note(next_one)
    cast.retired.append(next_one)
    return "unsure" if state == "unsure" else "switched"


def end(cast: Cast) -> None:
    """Serving ranks close; what was retired is gone."""
    if cast.parallel is not None:
        cast.parallel.state.group.barrier()
        cast.parallel.close()
        cast.parallel.state.group.close()
    for next_one in cast.retired:
        assert next_one.retirement is None or next_one.retirement.wait(PATIENCE_S)


def join_threads() -> None:
    """Wait until all threads of changes have ended: they do by themselves, behind what they did."""
    of_changes = ("equipoise-next", "equipoise-drop", "equipoise-retire")
    for one in threading.enumerate():
        if one.name.startswith(of_changes):
            one.join(PATIENCE_S)
            assert not one.is_alive(), f"{one.name} does not end"


__all__ = ["Cast", "begin", "change", "dist", "end", "join_cast", "join_threads"]
