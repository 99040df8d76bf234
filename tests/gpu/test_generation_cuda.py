"""Generations of ranks on GPUs: weights come from peers, whole, and the pause is short."""

from __future__ import annotations

import json
import os
import struct
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import EPLBConfig
from equipoise.bundled import model_directory
from equipoise.comm import create_eplb_communicator
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.dispatch import create_dispatcher
from equipoise.dispatch.base import TokenDispatcher
from equipoise.elastic.builder import Home
from equipoise.elastic.detour import Detour
from equipoise.elastic.generation import NextGeneration
from equipoise.elastic.membership import Deadlines, Serving
from equipoise.elastic.placing import Redundancy
from equipoise.elastic.planning import describe, plan_change, rehearse
from equipoise.elastic.rehearsal import try_choices
from equipoise.elastic.verdict import Word, settle
from equipoise.models.parallel import ParallelModel, parallelize
from equipoise.topology import Topology
from tests.ranks import Rank, processes

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 2048, 768, 128, 1024
NUM_LAYERS = int(os.environ.get("EQUIPOISE_GPU_LAYERS", "2"))
"""An MoE layer has 1.2 GB of experts; 16 make 19 GB."""
LINK_BYTES = 4 << 30
CHANGES = (
    (2, ("rank-0", "rank-1")),
    (3, ("rank-0",)),
    (4, ("rank-0", "rank-1")),
    (5, ("rank-1",)),
)
NUM_CHANGES = int(os.environ.get("EQUIPOISE_GPU_CHANGES", len(CHANGES)))
AMONG_TWO = tuple(
    (2 + turn, ("rank-1", "rank-0") if turn % 2 else ("rank-0", "rank-1"))
    for turn in range(int(os.environ.get("EQUIPOISE_GPU_CHANGES", "5")))
)
"""Both serve from the second change on, so that tokens make way while they connect anew."""
SLACK_BYTES = 64 << 20
"""Of device memory, between one change and a later one."""
PATIENCE_S = 200.0


@dataclass(frozen=True)
class Wires:
    """What a generation travels by.

    Attributes:
        tokens: the dispatcher.
        experts: the communicator.
        redundancy: slots per rank; NIXL-EP's buffer is made for one number of them.
    """

    tokens: str
    experts: str
    redundancy: Redundancy

    @property
    def name(self) -> str:
        return f"{self.tokens}-{self.experts}"


WIRES = (
    Wires("torch", "nixl", Redundancy(num_redundant=0)),
    Wires("nixl_ep", "nixl", Redundancy(slots_per_rank=EXPERTS)),
    Wires("torch", "torch_gloo", Redundancy(num_redundant=0)),
)


def write_hollow_checkpoint(directory: Path) -> None:
    """A checkpoint whose weights are zeros that take no room on the disk."""
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=NUM_LAYERS,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=EXPERTS,
        num_experts_per_tok=8,
        tie_word_embeddings=False,
        architectures=["Qwen3MoeForCausalLM"],
        dtype="bfloat16",
    )
    config.save_pretrained(directory)
    with torch.device("meta"):
        model = transformers.Qwen3MoeForCausalLM(config)
    header: dict[str, Any] = {}
    end = 0
    for name, shape in _list_stored(model):
        start, end = end, end + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def _list_stored(model: Any) -> list[tuple[str, tuple[int, ...]]]:
    """Tensors as such checkpoints have them: an expert's projections one by one."""
    stored: list[tuple[str, tuple[int, ...]]] = []
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            stored.append((name, tuple(tensor.shape)))
    for layer in range(NUM_LAYERS):
        for expert in range(EXPERTS):
            path = f"model.layers.{layer}.mlp.experts.{expert}"
            stored.append((f"{path}.gate_proj.weight", (INTERMEDIATE, HIDDEN)))
            stored.append((f"{path}.up_proj.weight", (INTERMEDIATE, HIDDEN)))
            stored.append((f"{path}.down_proj.weight", (HIDDEN, INTERMEDIATE)))
    return stored


def stir(parallel: ParallelModel) -> None:
    """Give the model weights that are not zero."""
    random = torch.Generator(parallel.state.group.device).manual_seed(1)
    with torch.no_grad():
        for parameter in parallel.model.parameters():
            parameter.normal_(0.0, 0.02, generator=random)


def sum_experts(parallel: ParallelModel) -> dict[str, int]:
    """A checksum of each expert of this rank's slots."""
    sums = {}
    group, (one,) = parallel.state.group, parallel.spread.sets
    num_slots = one.maps.placement.topology.slots_per_rank
    mine = one.maps.placement.slot_to_expert[:, group.rank * num_slots :][:, :num_slots]
    for layer, (weights, held) in enumerate(zip(one.weights, mine.tolist(), strict=True)):
        for slot, expert in enumerate(held):
            if expert >= 0:
                bits = [tensor[slot].view(torch.int16).long().sum() for tensor in weights]
                sums[f"{layer}/{expert}"] = int(torch.stack(bits).sum())
    return sums


def compute(parallel: ParallelModel, device: torch.device) -> torch.Tensor:
    tokens = torch.arange(64, device=device)[None] % VOCABULARY
    with torch.inference_mode(), parallel.route(first_position=0) as model:
        logits: torch.Tensor = model(input_ids=tokens, use_cache=False).logits
    parallel.step()
    return logits.float()


class Player:
    """One process that may serve."""

    def __init__(self, rank: Rank, device: torch.device, device_group: Any, wires: Wires) -> None:
        self.rank, self.device, self.redundancy = rank, device, wires.redundancy
        config = EPLBConfig(communicator=wires.experts, policy="deepseek", num_redundant_experts=0)
        self.manager: Any = None
        if wires.tokens == "nixl_ep":
            self.open_buffer()
        self.home = Home(
            f"rank-{rank.rank}",
            rank.store,
            device,
            config,
            timedelta(seconds=60),
            rank.path / "model",
            dtype=torch.bfloat16,
            device_group=device_group,
            dispatcher=None if self.manager is None else self.send_by_nixl_ep,
        )
        self.parallel: ParallelModel | None = None
        self.names: tuple[str, ...] = ()
        self.step_s: list[float] = []
        self.rates: list[float] = []
        self.detour = Detour()
        self.used_bytes: list[int] = []
        self.has_left = False

    def open_buffer(self) -> None:
        """NIXL-EP's, of the process: it outlives generations."""
        from equipoise.dispatch.nixl_ep.all_to_all import NixlEPAll2AllManager

        self.manager = NixlEPAll2AllManager(self.rank.size, self.device, timedelta(seconds=60))

    def send_by_nixl_ep(self, group: RankGroup, topology: Topology) -> TokenDispatcher:
        from equipoise.dispatch.nixl_ep.dispatcher import NixlEPOptions

        return create_dispatcher(NixlEPOptions(self.manager, 64, HIDDEN), group, topology)

    def serve(self) -> None:
        assert self.parallel is not None
        started = time.perf_counter()
        compute(self.parallel, self.device)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.step_s.append(time.perf_counter() - started)

    def change(self, number: int, names: tuple[str, ...]) -> None:
        store = self.rank.store
        if self.has_left and self.manager is not None:
            # As where a process has ended, and another begins.
            self.manager.close()
            self.open_buffer()
        if self.parallel is not None:
            self.parallel.state.pause()
        if self.parallel is not None and self.parallel.state.group.rank == 0:
            facts = describe(self.parallel, self.names).to_json()
            store.set(f"facts/{number}", json.dumps(facts))
        store.wait([f"facts/{number}"], timedelta(seconds=PATIENCE_S))
        serving = Serving.from_json(json.loads(store.get(f"facts/{number}")))
        deadlines = Deadlines(150.0, 60.0, 60.0)
        plan = plan_change(serving, names, number, self.redundancy, deadlines)
        if self.rank.rank == 0:
            print(f"{plan.participants} -> {names}: {rehearse(plan, self.device.type)}", flush=True)
        next_one = NextGeneration(plan, self.home, self.parallel)
        word = Word.OPEN
        if self.parallel is None:
            assert next_one.wait(PATIENCE_S) == "decided", next_one.reason
            word = Word.SWITCH
        while word is Word.OPEN:
            word = self.meet(next_one)
            if word is Word.OPEN:
                self.serve()
        assert word is Word.SWITCH, next_one.reason
        steps, self.step_s = sorted(self.step_s), []
        started = time.perf_counter()
        self.parallel, self.names = next_one.switch(), names
        self.has_left = self.parallel is None
        if self.parallel is not None:
            self.serve()
        pause_s = time.perf_counter() - started
        if next_one.retirement is not None:
            next_one.retirement.begin()
        self.detour.note(next_one)
        figures = next_one.figures
        rate = figures.received_bytes / max(figures.pull_s, 1e-9)
        during = f", {len(steps)} steps meanwhile"
        if steps:
            during += f", median {steps[len(steps) // 2]:.4f} s, longest {steps[-1]:.4f} s"
        print(
            f"generation {number}, {self.home.name}: {figures}, {rate / 1e9:.1f} GB/s; "
            f"switch and first step {pause_s:.4f} s{during}",
            flush=True,
        )
        if figures.received_bytes:
            self.rates.append(rate)
        if next_one.has_detour:
            self.serve_until_straight()
        if next_one.retirement is not None:
            assert next_one.retirement.wait(60.0)

    def note_memory(self) -> None:
        """What the device has in use, of all that uses it, but for what torch keeps for itself."""
        assert self.parallel is not None
        torch.cuda.synchronize(self.device)
        torch.cuda.empty_cache()
        # Ranks may share a device.
        self.parallel.state.group.barrier()
        free, total = torch.cuda.mem_get_info(self.device)
        self.used_bytes.append(total - free)
        self.parallel.state.group.barrier()

    def meet(self, next_one: NextGeneration | None) -> Word:
        assert self.parallel is not None
        word = self.detour.word if next_one is None else next_one.word
        heard = self.parallel.state.group.all_gather(torch.tensor([word]))
        settled = settle([int(each) for each in heard])
        if settled is Word.ASIDE:
            assert next_one is not None
            started = time.perf_counter()
            next_one.stand_aside()
            seconds = time.perf_counter() - started
            print(
                f"{self.home.name}: made way after {len(self.step_s)} steps, in {seconds:.4f} s",
                flush=True,
            )
            return Word.OPEN
        return settled

    def serve_until_straight(self) -> None:
        """Step until what was retired is closed on all ranks, and tokens go straight again."""
        assert self.parallel is not None
        started, on_detour = time.perf_counter(), len(self.step_s)
        while self.meet(None) is not Word.BACK:
            self.serve()
        detour_s = time.perf_counter() - started
        self.detour.end(self.parallel.dispatchers)
        straight = len(self.step_s)
        for _ in range(3):
            self.serve()
        steps = ", ".join(f"{seconds:.4f}" for seconds in self.step_s[straight:])
        print(
            f"{self.home.name}: a detour for {detour_s:.3f} s more, {straight - on_detour} steps, "
            f"longest {max(self.step_s[on_detour - 1 : straight]):.4f} s; then {steps} s",
            flush=True,
        )


def grow_and_shrink(
    rank: Rank, device: torch.device, device_group: Any, wires: Wires, changes: Any = CHANGES
) -> Player:
    if rank.rank == 0:
        write_hollow_checkpoint(rank.path / "model")
        rank.store.set("model", "there")
    rank.store.wait(["model"], timedelta(seconds=PATIENCE_S))
    player = Player(rank, device, device_group, wires)
    if rank.rank == 0:
        group = create_rank_group(
            rank.store.clone(),
            0,
            1,
            device,
            generation=1,
            timeout=timedelta(seconds=60),
            device_group=device_group,
        )
        player.names = ("rank-0",)
        player.parallel = parallelize(
            player.home.model, group, player.home.config, dispatcher=player.home.dispatcher
        )
        stir(player.parallel)
        torch.save(sum_experts(player.parallel), rank.path / "sums")
        torch.save(compute(player.parallel, device).cpu(), rank.path / "logits")
        for _ in range(3):
            player.serve()
    for number, names in changes[:NUM_CHANGES]:
        player.change(number, names)
        if changes is AMONG_TWO:
            player.note_memory()
        if player.parallel is not None:
            wanted = torch.load(rank.path / "sums")
            for key, got in sum_experts(player.parallel).items():
                assert wanted[key] == got, f"generation {number}: expert {key} differs"
            logits = torch.load(rank.path / "logits")
            error = (compute(player.parallel, device).cpu() - logits).abs().max()
            assert error <= 0.05 * logits.abs().max(), error
            for _ in range(3):
                player.serve()
    if player.parallel is not None:
        # Nobody closes while another still waits for a last exchange.
        torch.cuda.synchronize(device)
        player.parallel.state.group.barrier()
        player.parallel.close()
        player.parallel.state.group.close()
    if player.manager is not None:
        player.manager.close()
    link = measure_link(rank, device)
    rates = ", ".join(f"{rate / 1e9:.0f} GB/s ({rate / link:.2f})" for rate in player.rates)
    print(f"{player.home.name}: weights at {rates} of one READ's {link / 1e9:.0f}", flush=True)
    return player


def measure_link(rank: Rank, device: torch.device) -> float:
    """What one READ of the other rank's memory reaches, into memory that is registered."""
    group = create_rank_group(
        rank.store.clone(),
        rank.rank,
        rank.size,
        device,
        generation=99,
        timeout=timedelta(seconds=60),
        device_group="gloo",
    )
    block = torch.empty(1, LINK_BYTES, dtype=torch.uint8, device=device)
    wire = create_eplb_communicator(group, "nixl", [[block]])
    seconds = []
    for _ in range(4):
        group.barrier()
        started = time.perf_counter()
        if rank.rank == 0:
            wire.add_send(block, 1)
        else:
            wire.add_recv(block, 0)
        wire.execute()
        seconds.append(time.perf_counter() - started)
    wire.close()
    group.close()
    return LINK_BYTES / min(seconds)


def count_choice_kernels(device: torch.device) -> int:
    from equipoise.load.choice_kernel import _choose_and_count

    kernels, *_ = _choose_and_count.device_caches[device.index]
    return len(kernels)


@pytest.mark.gpu
@pytest.mark.timeout(120)
@processes(1, timeout_s=110)
def test_a_first_step_has_no_choice_kernel_to_compile(rank: Rank) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    group = create_rank_group(
        rank.store, 0, 1, device, timeout=timedelta(seconds=60), device_group="gloo"
    )
    parallel = parallelize(model_directory(), group, EPLBConfig(communicator="torch_gloo"))
    try_choices(parallel.spread, device)
    compiled = count_choice_kernels(device)
    tokens = torch.arange(7, device=device)[None]
    with torch.inference_mode():
        for valid in (None, torch.ones(7, dtype=torch.bool, device=device)):
            with parallel.route(valid) as model:
                model(input_ids=tokens, use_cache=False)
    # Layers whose counts begin at an odd place are served by the same ones.
    assert compiled == count_choice_kernels(device) == 2
    parallel.close()
    group.close()


@pytest.mark.multi_gpu
@pytest.mark.timeout(400)
@pytest.mark.parametrize("wires", WIRES, ids=lambda wires: wires.name)
@processes(2, timeout_s=390)
def test_two_gpus_become_one_and_two_again(rank: Rank, wires: Wires) -> None:
    device = torch.device("cuda", rank.rank)
    torch.cuda.set_device(device)
    grow_and_shrink(rank, device, "nccl", wires)


@pytest.mark.multi_gpu
@pytest.mark.timeout(400)
@processes(2, timeout_s=390)
def test_two_gpus_connect_anew_beside_tokens_over_nccl(rank: Rank) -> None:
    device = torch.device("cuda", rank.rank)
    torch.cuda.set_device(device)
    check_memory(grow_and_shrink(rank, device, "nccl", WIRES[0], AMONG_TWO))


@pytest.mark.gpu
@pytest.mark.timeout(400)
@processes(2, timeout_s=390)
def test_two_ranks_of_one_gpu_connect_anew(rank: Rank) -> None:
    device = torch.device("cuda", 0)
    torch.cuda.set_device(device)
    check_memory(grow_and_shrink(rank, device, "gloo", WIRES[0], AMONG_TWO))


def check_memory(player: Player) -> None:
    """That the last of many changes has left as much in use as the second."""
    used = [f"{num_bytes / 1e9:.3f}" for num_bytes in player.used_bytes]
    print(f"{player.home.name}: GB in use after each change: {', '.join(used)}", flush=True)
    assert player.used_bytes[-1] <= player.used_bytes[1] + SLACK_BYTES
