"""`equipoise bench elastic`: ranks come and go under a constant stream of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.request_stream import RequestStream, StreamResult
from equipoise.bundled import model_directory
from equipoise.config import EPLBConfig
from equipoise.elastic.controller import Controller
from equipoise.elastic.service import ScaleReport, ServiceStatus
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import ConfigError
from equipoise.launch.processes import LocalLauncher

PAUSE_STEPS = 3.0
UP_S = 3.0
WAIT_S = 120.0


@dataclass(frozen=True)
class ElasticBench:
    """What is measured.

    Attributes:
        sizes: numbers of ranks, one after the other.
        num_requests: at least so many, spread over the sizes.
        num_in_flight: requests at any time.
        num_new_tokens: of each request.
        model: checkpoint directory; None for the bundled model.
        device: kind of device.
        timeout_s: longest wait of a rank for another.
        seed: of the prompts.
    """

    sizes: tuple[int, ...] = (2, 4, 2, 3, 5, 2)
    num_requests: int = 2000
    num_in_flight: int = 32
    num_new_tokens: int = 8
    model: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    timeout_s: float = 30.0
    seed: int = 0

    def __post_init__(self) -> None:
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ConfigError(f"sizes must be at least two, each from 1 on, got {self.sizes}")
        if any(before == after for before, after in pairwise(self.sizes)):
            raise ConfigError(f"sizes must differ from the ones before them, got {self.sizes}")


@dataclass(frozen=True)
class _Change:
    before: int
    after: int
    report: ScaleReport
    step_s: dict[int, float]


def measure_elastic(bench: ElasticBench, say: Callable[[str], None]) -> BenchOutcome:
    """Serve through all sizes, and compare every token with the plain model's.

    Args:
        bench: what to measure.
        say: told how far it is.
    Collective: none; starts those who meet.
    Raises: MembershipError or TimeoutError if a change is not done.
    """
    model = bench.model or model_directory()
    spec = ServiceSpec(
        model=model,
        num_ranks=bench.sizes[0],
        config=EPLBConfig(window_size=64, step_interval=128),
        device=bench.device,
        max_len=128,
        timeout_s=bench.timeout_s,
    )
    controller = Controller(spec, LocalLauncher(bench.device, model))
    controller.start()
    try:
        stream = RequestStream(
            controller,
            make_encoder(model),
            bench.num_in_flight,
            bench.num_new_tokens,
            bench.seed,
        )
        stream.start()
        changes = _change_all(bench, controller, stream, say)
        stream.end(WAIT_S)
        status = controller.status()
    finally:
        controller.close()
    say("comparing every token with the plain model's")
    return _sum_up(bench, changes, stream.check(model, bench.device), status)


def _change_all(
    bench: ElasticBench,
    controller: Controller,
    stream: RequestStream,
    say: Callable[[str], None],
) -> list[_Change]:
    share = -(-bench.num_requests // len(bench.sizes))
    changes = []
    stream.wait_for(share, WAIT_S)
    for before, after in pairwise(bench.sizes):
        step_s = {before: _find_step_s(controller.status())}
        say(f"{before} to {after} ranks")
        report = controller.scale(to=after, timeout_s=WAIT_S)
        stream.wait_for(share, WAIT_S)
        status = controller.status()
        step_s[after] = _find_step_s(status)
        # Told by then: ranks measure it with the first step behind the switch.
        pauses = [rank.pause_s for rank in status.ranks if rank.name in report.staying]
        changes.append(
            _Change(before, after, replace(report, pause_s=max(pauses, default=0.0)), step_s)
        )
    return changes


def _find_step_s(status: ServiceStatus) -> float:
    return max(rank.step_s for rank in status.ranks if rank.state == "serving")


def make_encoder(model: Path) -> Callable[[str], list[int]]:
    """What makes a text the model's tokens, without special ones."""
    from equipoise.models.loading import load_tokenizer

    tokenizer = load_tokenizer(model)
    return partial(_encode, tokenizer)


def _encode(tokenizer: Callable[..., dict[str, list[int]]], text: str) -> list[int]:
    return list(tokenizer(text, verbose=False, add_special_tokens=False)["input_ids"])


def _sum_up(
    bench: ElasticBench, changes: list[_Change], result: StreamResult, status: ServiceStatus
) -> BenchOutcome:
    rows = [_describe_requests(result)]
    for change in changes:
        rows += _describe_change(change, is_cpu=bench.device == "cpu")
    notes = [
        f"{result.num_requests} requests, {result.num_tokens} tokens in {result.seconds:.1f} s; "
        f"{status.totals.rerun} requests were given to another rank on the way; the longest time "
        f"without any token was {result.longest_gap_s * 1000:.0f} ms",
        "a pause is from the end of the last step before the switch to the end of the first one "
        "behind it, on the slowest rank; both are measured in steps of the larger size",
        "a change counts from when its newcomers' processes have started and imported",
    ]
    setting = {
        "sizes": list(bench.sizes),
        "requests": bench.num_requests,
        "in_flight": bench.num_in_flight,
        "new_tokens": bench.num_new_tokens,
        "model": str(bench.model or "bundled"),
        "device": bench.device,
        "seed": bench.seed,
    }
    return BenchOutcome("elastic", setting, tuple(rows), tuple(notes))


def _describe_requests(result: StreamResult) -> Row:
    row: Row = {
        "what": f"requests failed or wrong, of {result.num_requests}",
        "value": result.num_failed + result.num_wrong,
        "unit": "",
        "failed": result.num_failed,
        "wrong": result.num_wrong,
    }
    return with_goal(row, "value", 0, at_most=True)


def _describe_change(change: _Change, *, is_cpu: bool) -> list[Row]:
    report, name = change.report, f"{change.before} to {change.after} ranks"
    step_s = change.step_s[max(change.before, change.after)]
    steps: Row = {
        "what": f"{name}: pause",
        "value": (report.pause_s or 0.0) / step_s,
        "unit": "steps",
        "pause_ms": (report.pause_s or 0.0) * 1000,
        "step_ms": step_s * 1000,
        "bytes": report.bytes,
    }
    total: Row = {
        "what": f"{name}: until all serve",
        "value": report.total_s,
        "unit": "s",
        "prepare_s": report.prepare_s,
    }
    has_goal = is_cpu and (change.before, change.after) == (2, 4)
    return [
        with_goal(steps, "value", PAUSE_STEPS, at_most=True) if is_cpu else steps,
        with_goal(total, "value", UP_S, at_most=True) if has_goal else total,
    ]
