"""One suite over every dispatcher: what comes home is what one process would have computed."""

from __future__ import annotations

import signal
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributed import HashStore

from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import Dispatched, TokenDispatcher
from equipoise.dispatch.maps import PlacementMaps
from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager
from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions
from equipoise.dispatch.replicas import choose_slots
from equipoise.errors import ConfigError, TransferError
from equipoise.topology import Topology
from tests.fake_nixl_ep import FakeFabric, FakeKernels
from tests.placements import make_random_placement
from tests.ranks import Rank, processes

HIDDEN = 24
CPU = torch.device("cpu")


def compute(dispatched: Dispatched, first_slot: int) -> Tensor:
    """Stands for the experts: depends on the slot, element by element, so rows' order is free."""
    factor = (dispatched.slot_N + first_slot + 1).to(dispatched.hidden_ND.dtype)
    return dispatched.hidden_ND * factor[:, None] + factor[:, None] / 8


def expect(hidden: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    """Token by token, slot by slot."""
    rows = []
    for token, token_slots, token_weights in zip(hidden, slots.tolist(), weights, strict=True):
        outputs = [
            token * (slot + 1) + (slot + 1) / 8 if slot >= 0 else torch.zeros_like(token)
            for slot in token_slots
        ]
        rows.append((torch.stack(outputs) * token_weights[:, None]).sum(0).to(token.dtype))
    return torch.stack(rows) if rows else hidden


def make_inputs(
    case: str, topology: Topology, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """One rank's tokens, slots and weights; rank by rank different."""
    random = torch.Generator().manual_seed(1000 * rank + len(case))
    num_tokens, num_choices, num_slots = 5 + 30 * rank, 3, topology.num_slots
    match case:
        case "one rank without tokens":
            num_tokens = 0 if rank == 0 else num_tokens
        case "no tokens at all":
            num_tokens = 0
        case "512 tokens":
            num_tokens, num_choices = 512 - rank, 8
        case "one slot per token":
            num_choices = 1
    slots = torch.randint(num_slots, (num_tokens, num_choices), generator=random)
    match case:
        case "all to the last rank":
            slots = num_slots - 1 - slots % topology.slots_per_rank
        case "replicas and empty slots":
            placement = make_random_placement(
                np.random.default_rng(7), 1, num_slots // 2, topology, empty_share=0.2
            )
            maps = PlacementMaps(placement, torch.device("cpu"))
            slots = choose_slots(maps, 0, slots % (num_slots // 2), 7 * rank)
        case "padding":
            slots[torch.rand(num_tokens, generator=random) < 0.4] = -1
        case "padding only":
            slots[:] = -1
        case "empty slots":
            slots = slots // 2 * 2
    hidden = torch.randn(num_tokens, HIDDEN, generator=random).to(dtype)
    weights = torch.rand(num_tokens, num_choices, generator=random)
    return hidden, slots, weights


def leave_out_repeats(slots: Tensor) -> Tensor:
    """Routers choose an expert once; kernels that have no room for more are given no more."""
    is_same = (slots[:, :, None] == slots[:, None, :]).tril(-1).any(2)
    return slots.masked_fill(is_same, -1)


def send_and_return(
    dispatcher: TokenDispatcher, inputs: tuple[Tensor, Tensor, Tensor], first_slot: int
) -> tuple[Tensor, Dispatched]:
    hidden, slots, weights = inputs
    dispatched = dispatcher.dispatch(hidden, slots)
    return dispatcher.combine(compute(dispatched, first_slot), weights, dispatched), dispatched


CASES = (
    "plain",
    "one rank without tokens",
    "no tokens at all",
    "512 tokens",
    "one slot per token",
    "all to the last rank",
    "padding",
    "padding only",
    "empty slots",
    "replicas and empty slots",
)


def compare(combined: Tensor, expected: Tensor, is_exact: bool, case: object) -> None:
    if is_exact:
        assert torch.equal(combined, expected), case
    else:
        # Kernels that sum in float32 and round once.
        error = (combined.float() - expected.float()).norm()
        assert combined.shape == expected.shape
        assert error <= 0.01 * expected.float().norm(), (case, error)


def check_cases(
    dispatcher: TokenDispatcher,
    topology: Topology,
    rank: int,
    dtype: torch.dtype,
    *,
    is_exact: bool = True,
    device: torch.device = CPU,
) -> None:
    """Each case, twice in a row, so that one exchange's leftovers would show in the next."""
    first_slot = rank * topology.slots_per_rank
    for case in CASES * 2:
        everybody = [make_inputs(case, topology, r, dtype) for r in range(topology.num_ranks)]
        weight_dtype = torch.float32 if case == "padding" else dtype
        everybody = [(h, s, w.to(weight_dtype)) for h, s, w in everybody]
        if not is_exact:
            everybody = [(h, leave_out_repeats(s), w) for h, s, w in everybody]
        hidden, slots, weights = (each.to(device) for each in everybody[rank])
        combined, dispatched = send_and_return(dispatcher, (hidden, slots, weights), first_slot)
        assert combined.dtype == dtype, case
        compare(combined.cpu(), expect(*everybody[rank]), is_exact, case)
        dispatcher.check()

        sent_here = torch.cat([s[s // topology.slots_per_rank == rank] for _, s, _ in everybody])
        got = dispatched.slot_N.cpu() + first_slot
        assert torch.equal(got.sort().values, sent_here.sort().values), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes()
def test_torch_brings_home_what_one_process_computes(
    rank: Rank, num_ranks: int, dtype: torch.dtype
) -> None:
    topology = Topology(num_ranks, 5)
    group = rank.make_group()
    check_cases(create_dispatcher("torch", group, topology), topology, rank.rank, dtype)
    group.barrier()
    group.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@processes(1)
def test_reference_computes_the_same(rank: Rank, dtype: torch.dtype) -> None:
    topology = Topology(1, 20)
    dispatcher = create_dispatcher("reference", rank.make_group(), topology)
    check_cases(dispatcher, topology, 0, dtype)


def check_random_exchanges(
    dispatcher: TokenDispatcher,
    group: RankGroup,
    topology: Topology,
    dtype: torch.dtype,
    *,
    most: int,
    num_draws: int = 25,
    is_exact: bool = True,
) -> None:
    """Shapes drawn at random: tokens and choices; the oracle holds all slots itself."""
    random = torch.Generator().manual_seed(5)
    for draw in range(num_draws):
        num_choices = int(torch.randint(1, 9, (), generator=random))
        # Few as in decode, now and then as many as in prefill.
        few = min(most, 512)
        counts = torch.randint(
            0, 1 + (few if draw % 8 else most), (group.size,), generator=random
        ).tolist()
        total = sum(counts)
        hidden = torch.randn(total, HIDDEN, generator=random).to(group.device, dtype)
        slots = torch.randint(-1, topology.num_slots, (total, num_choices), generator=random)
        slots = (slots if is_exact else leave_out_repeats(slots)).to(group.device)
        weights = torch.rand(total, num_choices, generator=random).to(group.device, dtype)
        mine = slice(sum(counts[: group.rank]), sum(counts[: group.rank + 1]))
        inputs = (hidden[mine], slots[mine], weights[mine])
        got, _ = send_and_return(dispatcher, inputs, group.rank * topology.slots_per_rank)
        expected = reference_of(hidden, slots, weights, topology)[mine]
        compare(got, expected, is_exact, (draw, counts, num_choices))
        dispatcher.check()


@processes(3)
def test_torch_agrees_with_reference_on_random_exchanges(rank: Rank) -> None:
    topology = Topology(3, 4)
    group = rank.make_group()
    dispatcher = create_dispatcher("torch", group, topology)
    check_random_exchanges(dispatcher, group, topology, torch.float32, most=4096)
    group.barrier()
    group.close()


def check_two_micro_batches(
    dispatcher: TokenDispatcher, group: RankGroup, topology: Topology
) -> None:
    """Both are dispatched before either is combined."""
    both = [
        tuple(
            each.to(group.device) for each in make_inputs(case, topology, group.rank, torch.float32)
        )
        for case in ("plain", "padding")
    ]
    sent = [dispatcher.dispatch(hidden, slots) for hidden, slots, _ in both]
    outputs = [compute(one, topology.slots_per_rank * group.rank) for one in sent]
    for inputs, dispatched, output in zip(both, sent, outputs, strict=True):
        combined = dispatcher.combine(output, inputs[2], dispatched)
        assert torch.equal(combined, reference_of(*inputs, topology))


@processes(2)
def test_torch_has_two_micro_batches_in_flight(rank: Rank) -> None:
    topology = Topology(2, 4)
    group = rank.make_group()
    check_two_micro_batches(create_dispatcher("torch", group, topology), group, topology)
    group.barrier()
    group.close()


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_nixl_ep_brings_home_what_one_process_computes(num_ranks: int) -> None:
    """Against a fake of the kernels; the real ones are tests/gpu's."""
    store, fabric, topology = HashStore(), FakeFabric(), Topology(num_ranks, 5)

    def run(rank: int) -> None:
        timeout = timedelta(seconds=30)
        group = create_rank_group(
            store, rank, num_ranks, torch.device("cpu"), timeout=timeout, device_group="gloo"
        )
        manager = NixlEPAll2AllManager(
            num_ranks, group.device, timeout, kernels=FakeKernels(fabric)
        )
        dispatcher = create_dispatcher(NixlEPOptions(manager, 512, HIDDEN), group, topology)
        check_cases(dispatcher, topology, rank, torch.bfloat16, is_exact=False)
        check_random_exchanges(
            dispatcher, group, topology, torch.bfloat16, most=256, num_draws=4, is_exact=False
        )
        group.barrier()
        manager.close()

    with ThreadPoolExecutor(num_ranks) as pool:
        for future in [pool.submit(run, rank) for rank in range(num_ranks)]:
            future.result(200)


def reference_of(hidden: Tensor, slots: Tensor, weights: Tensor, topology: Topology) -> Tensor:
    from equipoise.dispatch.reference import ReferenceDispatcher

    oracle = ReferenceDispatcher(Topology(1, topology.num_slots))
    combined, _ = send_and_return(oracle, (hidden, slots, weights), 0)
    return combined


def test_reference_rows_come_by_slot_then_by_token() -> None:
    from equipoise.dispatch.reference import ReferenceDispatcher

    hidden = torch.arange(3.0)[:, None]
    slots = torch.tensor([[2, 0], [0, -1], [2, 1]])
    dispatched = ReferenceDispatcher(Topology(1, 3)).dispatch(hidden, slots)
    assert dispatched.slot_N.tolist() == [0, 0, 1, 2, 2]
    assert dispatched.hidden_ND[:, 0].tolist() == [0, 1, 2, 0, 2]


@processes(2)
def test_an_unknown_name_and_a_foreign_topology_are_refused(rank: Rank) -> None:
    group = rank.make_group()
    with pytest.raises(ConfigError, match="unknown dispatcher 'carrier_pigeon': there are ref"):
        create_dispatcher("carrier_pigeon", group, Topology(2, 4))
    with pytest.raises(ConfigError, match="spread over 3 ranks, but 2 exchange tokens"):
        create_dispatcher("torch", group, Topology(3, 4))
    with pytest.raises(ConfigError, match="one buffer of the process: give NixlEPOptions"):
        create_dispatcher("nixl_ep", group, Topology(2, 4))
    with pytest.raises(ConfigError, match="serves one rank, not 2: ask for torch"):
        create_dispatcher("reference", group, Topology(2, 4))


@processes(3, dies=[1])
def test_a_rank_that_dies_raises_on_the_others(rank: Rank) -> None:
    topology = Topology(3, 2)
    group = rank.make_group()
    dispatcher = create_dispatcher("torch", group, topology)
    inputs = make_inputs("plain", topology, rank.rank, torch.float32)
    send_and_return(dispatcher, inputs, 0)
    if rank.rank == 1:
        signal.raise_signal(signal.SIGKILL)
    with pytest.raises(TransferError, match=f"rank {rank.rank}: tokens were not exchanged") as e:
        send_and_return(dispatcher, inputs, 0)
    assert e.value.rank == rank.rank


@processes(2)
def test_a_rank_that_stays_away_raises_within_the_deadline(rank: Rank) -> None:
    topology = Topology(2, 2)
    group = rank.make_group()
    dispatcher = create_dispatcher("torch", group, topology)
    inputs = make_inputs("plain", topology, rank.rank, torch.float32)
    send_and_return(dispatcher, inputs, 0)
    group.timeout = timedelta(seconds=2)
    if rank.rank == 0:
        with pytest.raises(TransferError, match=r"take part within 2\.0 s"):
            send_and_return(dispatcher, inputs, 0)
        rank.store.set("raised", "yes")
    else:
        rank.store.wait(["raised"], timedelta(seconds=20))
