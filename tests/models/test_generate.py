"""generate() of transformers on every rank, against the plain model's tokens."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import EPLBConfig, ParallelModel, parallelize
from equipoise.comm.groups import RankGroup
from tests.models.saved import save
from tests.models.thread_ranks import ThreadRanks

RANKS = 4
CONFIG = EPLBConfig(
    window_size=3, step_interval=3, policy="deepseek", communicator="torch_gloo", use_async=False
)


@pytest.fixture(scope="module")
def ranks() -> Iterator[ThreadRanks]:
    torch.set_num_threads(1)
    started = ThreadRanks(RANKS)
    yield started
    started.close()


@pytest.fixture(scope="module", params=["Qwen3MoeExperts", "GptOssExperts"])
def saved(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Path, Any]:
    directory = tmp_path_factory.mktemp("saved")
    plain = save(request.param, directory)
    plain.config.use_cache = True
    return directory, plain


def make_request(rank: int) -> dict[str, Any]:
    """Other lengths and other numbers of tokens on each rank; rows padded on the left."""
    random = torch.Generator().manual_seed(rank)
    tokens = torch.randint(3, 97, (1 + rank % 2, 5 + 2 * rank), generator=random)
    mask = torch.ones_like(tokens)
    mask[0, : 1 + rank] = 0
    return {
        "input_ids": tokens.masked_fill(mask == 0, 0),
        "attention_mask": mask,
        "max_new_tokens": 3 + 4 * rank,
        "do_sample": False,
        "eos_token_id": None,
        "use_cache": True,
    }


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_tokens_are_those_of_the_plain_model(
    attention: str, saved: tuple[Path, Any], ranks: ThreadRanks
) -> None:
    directory, plain = saved
    if attention == "sdpa" and not plain._supports_sdpa:
        pytest.skip(f"{type(plain).__name__} has no sdpa attention in transformers")
    plain.set_attn_implementation(attention)
    plain.set_experts_implementation("batched_mm")

    def serve(group: RankGroup) -> tuple[torch.Tensor, int, int]:
        parallel = parallelize(directory, group, CONFIG, attention=attention)
        parallel.model.set_experts_implementation("batched_mm")
        tokens = parallel.generate(**make_request(group.rank))
        stats = parallel.state.stats()
        parallel.close()
        return tokens, stats.steps, stats.models["model"].moves

    served = ranks(serve)
    for rank, (tokens, steps, moves) in enumerate(served):
        assert torch.equal(tokens, plain.generate(**make_request(rank)))
        # As many steps on every rank as the one that generates most.
        assert steps == make_request(RANKS - 1)["max_new_tokens"]
        assert moves > 0


@pytest.mark.parametrize("way", [{"num_beams": 2}, {"prompt_lookup_num_tokens": 2}])
def test_other_ways_to_generate(
    way: dict[str, int], saved: tuple[Path, Any], ranks: ThreadRanks
) -> None:
    """Beams, and tokens that are guessed, which take as many calls as come true."""
    directory, plain = saved
    plain.set_experts_implementation("batched_mm")

    def make(rank: int) -> dict[str, Any]:
        request = make_request(rank)
        # Guesses are for one row without padding.
        alone = {name: request[name][:1, 1 + rank :] for name in ("input_ids", "attention_mask")}
        return request | alone | way

    def serve(group: RankGroup) -> torch.Tensor:
        parallel = parallelize(directory, group, CONFIG)
        parallel.model.set_experts_implementation("batched_mm")
        tokens: torch.Tensor = parallel.generate(**make(group.rank))
        parallel.close()
        return tokens

    for rank, tokens in enumerate(ranks(serve)):
        assert torch.equal(tokens, plain.generate(**make(rank)))


def test_a_rank_without_requests_keeps_step(saved: tuple[Path, Any], ranks: ThreadRanks) -> None:
    directory, plain = saved
    plain.set_experts_implementation("batched_mm")

    def serve(group: RankGroup) -> Any:
        with torch.inference_mode(group.rank == 3):
            parallel = parallelize(directory, group, CONFIG)
        parallel.model.set_experts_implementation("batched_mm")
        tokens = parallel.generate(**make_request(1)) if group.rank == 1 else parallel.generate()
        # Whatever was made in inference mode is written out of it, and the other way round.
        with torch.inference_mode(group.rank == 0):
            parallel.state.rearrange()
        parallel.step()
        after = parallel.generate(**make_request(group.rank))
        parallel.close()
        return tokens, after

    served = ranks(serve)
    assert [tokens is None for tokens, _ in served] == [True, False, True, True]
    assert torch.equal(served[1][0], plain.generate(**make_request(1)))
    for rank, (_, after) in enumerate(served):
        assert torch.equal(after, plain.generate(**make_request(rank)))


def test_router_logits_and_hooks(saved: tuple[Path, Any], ranks: ThreadRanks) -> None:
    directory, plain = saved
    plain.set_experts_implementation("batched_mm")

    def serve(group: RankGroup) -> tuple[Any, list[torch.Tensor]]:
        parallel: ParallelModel = parallelize(directory, group, CONFIG)
        parallel.model.set_experts_implementation("batched_mm")
        with parallel.lockstep() as model:
            found = look(model)
        parallel.close()
        return found

    wanted, wanted_seen = look(plain)
    for got, seen in ranks(serve):
        assert torch.equal(got.logits, wanted.logits)
        assert len(got.router_logits) == len(wanted.router_logits) == 3
        for name in ("router_logits", "hidden_states"):
            assert all(map(torch.equal, getattr(got, name), getattr(wanted, name)))
        assert torch.equal(got.aux_loss, wanted.aux_loss)
        assert len(seen) == len(wanted_seen) == 2
        assert all(map(torch.equal, seen, wanted_seen))


def look(model: Any) -> tuple[Any, list[torch.Tensor]]:
    """A forward pass with all that transformers tells of it, and what hooks see."""
    seen: list[torch.Tensor] = []
    block = model.model.layers[1].mlp
    hooks = [
        block.register_forward_hook(lambda _m, _i, output: seen.append(first(output))),
        block.experts.register_forward_hook(lambda _m, _i, output: seen.append(output)),
    ]
    tokens = torch.arange(5, 25, device=model.device)[None]
    with torch.inference_mode():
        output = model(input_ids=tokens, output_router_logits=True, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    return output, seen


def first(output: Any) -> torch.Tensor:
    tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return tensor
