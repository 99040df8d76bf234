"""A rank that gets a single row computes it as the plain model does."""

from __future__ import annotations

import copy

import torch

from equipoise import parallelize
from equipoise.comm.groups import RankGroup
from tests.models.comparison import CONFIG
from tests.models.thread_ranks import ThreadRanks
from tests.models.tiny import list_families, make_tiny, run


def test_a_token_alone_has_the_bits_of_the_plain_model() -> None:
    torch.set_num_threads(1)
    plain = make_tiny(next(f for f in list_families() if f.experts == "MixtralExperts"))
    plain.set_experts_implementation("batched_mm")
    ranks = ThreadRanks(4)

    def serve(group: RankGroup) -> list[torch.Tensor]:
        parallel = parallelize(copy.deepcopy(plain), group, CONFIG)
        outputs = []
        for token in range(3, 15):
            with parallel.route():
                outputs.append(run(parallel.model, torch.tensor([[token + 20 * group.rank]])))
        parallel.close()
        return outputs

    for rank, outputs in enumerate(ranks(serve)):
        for token, got in zip(range(3, 15), outputs, strict=True):
            assert torch.equal(got, run(plain, torch.tensor([[token + 20 * rank]])))
    ranks.close()
