"""An engine with groups, weights and a forward pass of its own; Equipoise balances its experts."""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import equipoise as eq

RANKS, LAYERS, EXPERTS, TOP_K, HIDDEN, TOKENS, STEPS = 2, 2, 8, 2, 16, 64, 12
CPU, TIMEOUT = torch.device("cpu"), timedelta(seconds=30)


def serve(rank: int, rendezvous: str) -> None:
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    group = eq.RankGroup.from_process_groups(dist.group.WORLD, device=CPU, timeout=TIMEOUT)
    topology = eq.Topology(RANKS, EXPERTS // RANKS + 1)  # one spare slot per rank
    maps = eq.PlacementMaps(eq.place_in_order(LAYERS, EXPERTS, topology), CPU)
    recorder = eq.LoadRecorder(LAYERS, topology.num_slots, CPU)
    dispatcher = eq.create_dispatcher("torch", group, topology)
    torch.manual_seed(0)  # the same model and the same requests on every rank
    routers, experts = torch.randn(LAYERS, HIDDEN, EXPERTS), torch.randn(EXPERTS, HIDDEN, HIDDEN)
    hidden = torch.randn(TOKENS, HIDDEN) + 2 * torch.randn(HIDDEN)  # all look alike: a skewed load

    weights = [[experts[row]] for row in maps.slot_to_expert.view(LAYERS, RANKS, -1)[:, rank]]
    packed = [layer[0].mT.contiguous() for layer in weights]  # what the forward pass works with

    def repack(layer, slots):
        packed[layer][slots] = weights[layer][0][slots].mT

    state = eq.EplbState(eq.EPLBConfig(step_interval=8), group, eq.get_policy("deepseek"))
    wire = eq.create_eplb_communicator(state.transfer_group, "auto", weights)
    state.add_model("mine", weights, maps, recorder, wire, on_commit=repack)
    state.rearrange(is_profile=True)  # take the memory for transfers now, where it can be measured

    outputs = torch.zeros(STEPS, LAYERS, TOKENS, HIDDEN)
    for step in range(STEPS):
        for layer in range(LAYERS):
            weight, expert = (hidden @ routers[layer]).softmax(-1).topk(TOP_K)
            slot = eq.choose_slots(maps, layer, expert, first_position=step + rank)
            recorder.record(layer, slot)
            sent = dispatcher.dispatch(hidden, slot)
            done = torch.einsum("ni,nio->no", sent.hidden_ND, packed[layer][sent.slot_N])
            outputs[step, layer] = dispatcher.combine(done, weight, sent)
        state.step()  # commits what has been moved beside the steps
    while state.is_rebalancing:
        state.step()
    did, change = state.stats().models["mine"], (outputs - outputs[0]).abs().max()
    print(
        f"rank {rank}: {did.moves} experts moved, balancedness {did.balancedness_before:.2f} -> "
        f"{did.balancedness_after:.2f}, largest change of an output {change:.1e}"
    )
    _ = state.close() and wire.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (f"file://{folder}/rendezvous",), nprocs=RANKS)
