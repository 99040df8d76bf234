"""A loaded Hugging Face model becomes expert-parallel by one call, and is balanced as it serves."""

import tempfile
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from transformers import AutoModelForCausalLM, AutoTokenizer

import equipoise as eq
from equipoise.bundled import KINDS, excerpts, model_directory

RANKS, STEPS = 2, 4


@torch.inference_mode()
def serve(rank: int, rendezvous: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=RANKS)
    group = eq.RankGroup.from_process_groups(
        dist.group.WORLD, device=torch.device("cpu"), timeout=timedelta(seconds=60)
    )
    model = AutoModelForCausalLM.from_pretrained(model_directory(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(model_directory())

    # Each rank has requests of its own kind; the shorter one is padded on the right.
    long, short = excerpts(KINDS[rank], 2, 400)
    requests = [long, short[:100]]
    batch = tokenizer(requests, return_tensors="pt", padding=True, padding_side="right")
    valid = batch.attention_mask.flatten().bool()
    plain = model(**batch).logits.flatten(0, 1)[valid]

    config = eq.EPLBConfig(window_size=2, step_interval=2, use_async=False)
    parallel = eq.parallelize(model, group, config)
    largest = 0.0
    for _ in range(STEPS):
        with parallel.route(valid) as spread:
            logits = spread(**batch, use_cache=False).logits.flatten(0, 1)[valid]
        largest = max(largest, float((logits - plain).abs().max()))
        for outcome in parallel.step():
            if rank == 0:
                before = outcome.balancedness_before.mean()
                after = outcome.balancedness_after.mean()
                print(
                    f"step {outcome.step}: {outcome.moves} experts moved, "
                    f"balancedness {before:.2f} -> {after:.2f}"
                )
    print(f"rank {rank}: logits differ by {largest:.1e} at most from the plain model's")
    parallel.close()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(serve, (f"file://{folder}/rendezvous",), nprocs=RANKS)
