"""Requests that come and go, are cancelled, handed over, and outlive generations."""

from __future__ import annotations

import gc
import os
import tracemalloc
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from equipoise.bundled import model_directory
from equipoise.comm.groups import RankGroup, create_rank_group
from equipoise.config import EPLBConfig
from equipoise.dispatch import create_dispatcher
from equipoise.engine.engine import Engine, EngineLimits
from equipoise.engine.figures import StepResult
from equipoise.engine.requests import Request, SamplingParams
from equipoise.engine.sampling import choose_tokens
from equipoise.errors import TransferError
from equipoise.models.loading import load_tokenizer
from equipoise.models.parallel import ParallelModel, assemble, parallelize
from tests.ranks import Rank, processes
from tests.test_engine import join, run_until_idle, spread_model
from tests.test_models import CPU, VOCABULARY, make_lone_group, make_model

NUM_REQUESTS = 240
"""Of all ranks."""
LEAK_REQUESTS = int(os.environ.get("LEAK_REQUESTS", "300"))


def draw_requests(seed: int, number: int) -> list[Request]:
    """Mixed lengths; half of them sampled, each with a seed of its own."""
    random = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=random))

    requests = []
    for index in range(number):
        tokens = torch.randint(2, VOCABULARY, (draw(1, 40),), generator=random).tolist()
        sampling = SamplingParams(
            max_new_tokens=draw(1, 16),
            temperature=0.7 * (index % 2),
            top_p=0.9,
            seed=1000 * seed + index,
            ignore_end=index % 3 == 0,
        )
        requests.append(Request(f"{seed}/{index}", tuple(tokens), sampling))
    return requests


def check_tokens(family: str, requests: list[Request]) -> None:
    """Each token is what the plain model, given those before it, would have chosen."""
    plain: Any = make_model(family)
    for request in requests:
        num = len(request.generated)
        ids = torch.tensor([[*request.tokens, *request.generated[:-1]]])
        with torch.inference_mode():
            logits = plain(ids, use_cache=False, logits_to_keep=num).logits[0]
        prefixes = [replace(request, generated=request.generated[:i]) for i in range(num)]
        assert request.generated == choose_tokens(logits, prefixes).tolist()
        ended = request.generated[-1] == 1 and not request.sampling.ignore_end
        assert ended or num == request.sampling.max_new_tokens


@pytest.mark.timeout(300)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@processes(timeout_s=290)
def test_hundreds_that_come_and_go_get_the_plain_models_tokens(rank: Rank, num_ranks: int) -> None:
    """240 requests, in the background over whatever wire `auto` takes.

    Each step some come; now and then some are handed over and come again later, and some are
    cancelled. Now and then nobody has any for a while.
    """
    group = rank.make_group(timeout_s=40)
    parallel = spread_model(
        group, "qwen3_moe", step_interval=8, use_async=True, communicator="auto"
    )
    initial = parallel.spread.maps.placement
    engine = Engine(parallel, EngineLimits(5, 56, prefill_chunk=24))
    requests = draw_requests(rank.rank, NUM_REQUESTS // group.size)
    waiting, cancelled = list(requests), set()
    results: list[StepResult] = []
    goes_on = torch.tensor([1])
    while goes_on:
        number = len(results)
        if number % 3 == rank.rank % 3:
            engine.submit(*waiting[:3])
            del waiting[:3]
        if number % 11 == 7:
            back = engine.evict([request.id for request in requests[number % 5 :: 7]])
            waiting[2:2] = [request for request in back if request.id not in cancelled]
        if number % 17 == 5:
            before, begun = engine.num_requests, [r.id for r in requests if r.generated]
            # Of those that have begun the last one; it may have ended.
            engine.cancel(begun[-1] if begun else "nobody")
            if engine.num_requests < before:
                cancelled.add(begun[-1])
        works = torch.tensor([int(engine.has_work)])
        group.all_reduce(works, "max")
        results.append(engine.step() if works else engine.tick())
        goes_on = torch.tensor([int(bool(waiting) or engine.has_work)])
        group.all_reduce(goes_on, "max")
    results.append(engine.tick())
    # On a busy machine the requests may be done before the rebalance that began beside them.
    parallel.state.pause()
    while parallel.state.is_rebalancing:
        results.append(engine.tick())
    assert parallel.state.steps == len(results)
    tokens = join(results)
    assert tokens == {request.id: request.generated for request in requests}
    check_tokens("qwen3_moe", [request for request in requests if request.id not in cancelled])
    if group.size > 1:
        assert parallel.spread.maps.placement != initial
    parallel.close()
    group.barrier()


def test_a_request_goes_on_elsewhere_with_the_same_tokens() -> None:
    group = make_lone_group()
    parallel = spread_model(group, "mixtral")
    one, other = (Engine(parallel, EngineLimits(4, 56)) for _ in range(2))
    whole, parted = draw_requests(5, 8), draw_requests(5, 8)
    one.submit(*whole)
    run_until_idle(one, group)
    one.submit(*parted)
    results = [one.step() for _ in range(4)]
    handed_over = one.evict()
    assert not one.has_work
    assert any(request.generated for request in handed_over)
    other.submit(*handed_over)
    results += run_until_idle(other, group)
    assert [request.generated for request in parted] == [request.generated for request in whole]
    assert join(results) == {request.id: request.generated for request in whole}


def test_a_stop_string_ends_a_request_also_when_it_is_run_again() -> None:
    group = make_lone_group()
    tokenizer = load_tokenizer(model_directory())
    parallel = parallelize(
        model_directory(), group, EPLBConfig(use_async=False), dtype=torch.float32
    )
    engine = Engine(parallel, EngineLimits(2, 120), tokenizer=tokenizer)
    prompt = tuple(tokenizer("def read(self, path):")["input_ids"])
    free = Request("free", prompt, SamplingParams(max_new_tokens=60))
    engine.submit(free)
    run_until_idle(engine, group)
    text = tokenizer.decode(free.generated)
    stop = text[11:15]
    (end,) = [num for num in range(60) if stop in tokenizer.decode(free.generated[: num + 1])][:1]
    sampling = SamplingParams(max_new_tokens=60, stop=("never", stop))
    straight, again = Request("straight", prompt, sampling), Request("again", prompt, sampling)
    engine.submit(straight, again)
    # Handed over with the stop string half said.
    results = [engine.step() for _ in range(end)]
    engine.submit(*engine.evict(["again"]))
    results += run_until_idle(engine, group)
    for request in (straight, again):
        assert request.generated == free.generated[: end + 1]
    assert {d.finish_reason for r in results for d in r.deltas} == {None, "stop"}
    parallel.close()


def test_requests_outlive_a_failed_step_and_a_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails in the dispatch of its second layer gives no tokens, and loses none."""
    group = make_lone_group()
    parallel = spread_model(group, "olmoe")
    engine = Engine(parallel, EngineLimits(3, 56, prefill_chunk=16))
    want, requests = draw_requests(6, 9), draw_requests(6, 9)
    engine.submit(*want)
    run_until_idle(engine, group)

    engine.submit(*requests)
    results = [engine.step() for _ in range(3)]
    calls = iter(range(9))
    dispatcher = parallel.dispatchers[0]
    dispatch = dispatcher.dispatch

    def fail(*given: Any) -> Any:
        if next(calls) == 1:
            raise TransferError("a rank died", rank=0)
        return dispatch(*given)

    monkeypatch.setattr(dispatcher, "dispatch", fail)
    with pytest.raises(TransferError, match="a rank died"):
        engine.step()
    later = make_next_generation(parallel)
    assert later.state.group.generation == 1
    engine.adopt(later)
    parallel.close()
    results += run_until_idle(engine, later.state.group)
    assert later.state.steps == len(results) - 3
    assert [request.generated for request in requests] == [request.generated for request in want]
    assert join(results) == {request.id: request.generated for request in want}


def make_next_generation(parallel: ParallelModel) -> ParallelModel:
    timeout = timedelta(seconds=30)
    group = create_rank_group(
        dist.HashStore(), 0, 1, CPU, generation=1, timeout=timeout, device_group="gloo"
    )
    sets = tuple(
        replace(one, dispatcher=create_dispatcher("torch", group, one.maps.placement.topology))
        for one in parallel.spread.sets
    )
    later = assemble(replace(parallel.spread, sets=sets), group, parallel.state.config)
    for one in sets:
        one.bind()
    return later


def test_a_tick_is_a_step_of_the_balancer_without_a_forward_pass() -> None:
    parallel = spread_model(make_lone_group(), "olmoe")
    engine = Engine(parallel, EngineLimits(1, 20, keep_load=True))
    called = []
    parallel.model.register_forward_hook(lambda *_: called.append(1))
    parallel.model.base_model.register_forward_hook(lambda *_: called.append(1))
    result = engine.tick()
    assert (parallel.state.steps, called) == (1, [])
    assert (result.deltas, result.figures.num_tokens, result.figures.loads) == ((), 0, ())
    engine.step()
    assert (parallel.state.steps, called) == (2, [1])


def serve_many(engine: Engine, group: RankGroup, number: int) -> None:
    for begin in range(0, number, 10):
        engine.submit(
            *(
                Request(
                    str(begin + i),
                    (2 + i, 5, 7),
                    SamplingParams(max_new_tokens=1 + i % 4, temperature=i % 2, seed=begin),
                )
                for i in range(10)
            )
        )
        for _ in range(6):
            engine.step()
        engine.cancel(str(begin))
    run_until_idle(engine, group)


@pytest.mark.timeout(1200 if LEAK_REQUESTS > 300 else 240)
def test_nothing_is_left_of_requests_that_have_ended() -> None:
    """LEAK_REQUESTS asks for more of them, like 10000."""
    group = make_lone_group()
    engine = Engine(spread_model(group, "olmoe", step_interval=50), EngineLimits(8, 20))
    tracemalloc.start()
    try:
        # The first half makes what stays: caches of the interpreter, the balancer's window.
        memory, objects = zip(
            *(measure_after(engine, group, LEAK_REQUESTS // 2) for _ in range(2)), strict=True
        )
    finally:
        tracemalloc.stop()
    assert memory[1] - memory[0] < 100_000
    assert objects[1] - objects[0] < 500
    assert engine.num_requests == 0


def measure_after(engine: Engine, group: RankGroup, number: int) -> tuple[int, int]:
    """Bytes and objects, once so many requests have been served."""
    serve_many(engine, group, number)
    gc.collect()
    return tracemalloc.get_traced_memory()[0], len(gc.get_objects())
