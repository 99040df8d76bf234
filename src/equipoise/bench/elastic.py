"""`equipoise bench elastic`: ranks come and go under a constant stream of requests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import torch

from equipoise.bench.link import LinkSpec, measure_link
from equipoise.bench.outcome import BenchOutcome, Row, with_goal
from equipoise.bench.request_stream import RequestStream, StreamResult
from equipoise.bench.served import WAIT_S, make_encoder, serve_stream, take_model
from equipoise.bundled.texts import KINDS, excerpts
from equipoise.comm.nixl.agent import has_nixl
from equipoise.config import EPLBConfig
from equipoise.elastic.controller import Controller
from equipoise.elastic.placing import Redundancy
from equipoise.elastic.service import ScaleReport, ServiceStatus
from equipoise.elastic.spec import Dispatch, ServiceSpec
from equipoise.errors import ConfigError
from equipoise.models.families import read_model_shape

PAUSE_STEPS, PAUSE_MS = 3.0, 100.0
UP_S = 3.0
LINK_SHARE, LEAST_LINK_BYTES = 0.8, 1_000_000_000
"""Of one READ between two GPUs; a few megabytes tell nothing of a link."""
SAME_LOSS = MappingProxyType({"float32": 1e-5, "bfloat16": 2**-8})
"""Nats, by dtype: other ranks sum the same outputs, and round some differently."""
TEXTS, TEXT_BYTES = 4, 192
"""Of each kind."""


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
        dispatch: what tokens travel by; nixl_ep carries bfloat16, so that the model is served in
            it, and each rank has as many slots as the smallest size needs.
        timeout_s: longest wait of a rank for another.
        seed: of the prompts.
        size_gb: serve a model of random weights with so many GB of experts instead; written to a
            directory for temporary files first.
    """

    sizes: tuple[int, ...] = (2, 4, 2, 3, 5, 2)
    num_requests: int = 2000
    num_in_flight: int = 32
    num_new_tokens: int = 8
    model: Path | None = None
    device: Literal["cpu", "cuda"] = "cpu"
    dispatch: Dispatch = "torch"
    timeout_s: float = 30.0
    seed: int = 0
    size_gb: float | None = None

    def __post_init__(self) -> None:
        if self.model is not None and self.size_gb is not None:
            raise ConfigError("a model is either given or made of a size, not both")
        if len(self.sizes) < 2 or min(self.sizes) < 1:
            raise ConfigError(f"sizes must be at least two, each from 1 on, got {self.sizes}")
        if any(before == after for before, after in pairwise(self.sizes)):
            raise ConfigError(f"sizes must differ from the ones before them, got {self.sizes}")
        if self.dispatch == "nixl_ep" and self.device != "cuda":
            raise ConfigError(f"dispatch nixl_ep needs device cuda, not {self.device}")

    @property
    def dtype(self) -> Literal["float32", "bfloat16"]:
        """Of the weights."""
        return "bfloat16" if self.dispatch == "nixl_ep" else "float32"


@dataclass(frozen=True)
class _Change:
    before: int
    after: int
    expected_s: float
    report: ScaleReport
    step_s: dict[int, float]
    losses: dict[str, float]


@dataclass(frozen=True)
class _HeldOut:
    """Texts that losses are of, by kind."""

    kinds: tuple[str, ...]
    texts: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, encode: Callable[[str], list[int]]) -> _HeldOut:
        named = [(kind, text) for kind in KINDS for text in excerpts(kind, TEXTS, TEXT_BYTES)]
        return cls(tuple(kind for kind, _ in named), tuple(tuple(encode(t)) for _, t in named))

    def score(self, controller: Controller) -> dict[str, float]:
        """Mean loss by kind, over the ranks that serve now."""
        losses = controller.score(self.texts, WAIT_S)
        sums = dict.fromkeys(self.kinds, 0.0)
        for kind, loss in zip(self.kinds, losses, strict=True):
            sums[kind] += loss / TEXTS
        return sums


def measure_elastic(bench: ElasticBench, say: Callable[[str], None]) -> BenchOutcome:
    """Serve through all sizes, and compare every token with the plain model's.

    Args:
        bench: what to measure.
        say: told how far it is.
    Collective: none; starts those who meet.
    Raises: MembershipError or TimeoutError if a change is not done.
    """
    with take_model(bench.model, bench.size_gb, bench.seed, say, bench.dtype) as model:
        return _measure(bench, model, say)


def _measure(bench: ElasticBench, model: Path, say: Callable[[str], None]) -> BenchOutcome:
    held_out = _HeldOut.of(make_encoder(model))
    spec = ServiceSpec(
        model=model,
        num_ranks=bench.sizes[0],
        config=EPLBConfig(window_size=64, step_interval=128),
        dtype=bench.dtype,
        device=bench.device,
        dispatch=bench.dispatch,
        max_ranks=max(bench.sizes),
        slots_per_rank=_choose_slots(bench, model),
        max_len=128,
        timeout_s=bench.timeout_s,
    )
    say("starting ranks")
    load = (bench.num_in_flight, bench.num_new_tokens, bench.seed)
    with serve_stream(spec, *load) as (controller, stream):
        losses = held_out.score(controller)
        stream.start()
        changes = _change_all(bench, controller, stream, held_out, say)
        stream.end(WAIT_S)
        status = controller.status()
    link = None
    if bench.device == "cuda" and torch.cuda.device_count() > 1 and has_nixl():
        say("measuring one READ between two GPUs")
        link = measure_link(LinkSpec(timeout_s=bench.timeout_s))
    say("comparing every token with the plain model's")
    result = stream.check(model, bench.device, bench.dtype)
    rows = [_describe_requests(result), *_compare_losses(losses, changes, SAME_LOSS[bench.dtype])]
    for change in changes:
        rows += _describe_change(change, link, is_cpu=bench.device == "cpu")
    return _sum_up(bench, rows, result, status)


def _choose_slots(bench: ElasticBench, model: Path) -> int | None:
    """NIXL-EP's buffer is made for one number of them."""
    if bench.dispatch == "torch":
        return None
    return Redundancy().choose_slots(read_model_shape(model).num_experts, min(bench.sizes))


def _change_all(
    bench: ElasticBench,
    controller: Controller,
    stream: RequestStream,
    held_out: _HeldOut,
    say: Callable[[str], None],
) -> list[_Change]:
    share = -(-bench.num_requests // len(bench.sizes))
    changes = []
    stream.wait_for(share, WAIT_S)
    for before, after in pairwise(bench.sizes):
        step_s = {before: _find_step_s(controller.status())}
        say(f"{before} to {after} ranks")
        expected = controller.scale(to=after, dry_run=True, timeout_s=WAIT_S)
        report = controller.scale(to=after, timeout_s=WAIT_S)
        stream.wait_for(share, WAIT_S)
        status = controller.status()
        step_s[after] = _find_step_s(status)
        # Told by then: ranks measure it with the first step behind the switch.
        pauses = [rank.pause_s for rank in status.ranks if rank.name in report.staying]
        report = replace(report, pause_s=max(pauses, default=0.0))
        losses = held_out.score(controller)
        expected_s = expected.pause_s or 0.0
        changes.append(_Change(before, after, expected_s, report, step_s, losses))
    return changes


def _find_step_s(status: ServiceStatus) -> float:
    return max(rank.step_s for rank in status.ranks if rank.state == "serving")


def _sum_up(
    bench: ElasticBench, rows: list[Row], result: StreamResult, status: ServiceStatus
) -> BenchOutcome:
    notes = [
        f"{result.num_requests} requests, {result.num_tokens} tokens in {result.seconds:.1f} s; "
        f"{status.totals.rerun} requests were given to another rank on the way; the longest time "
        f"without any token was {result.longest_gap_s * 1000:.0f} ms",
        "a pause is from the end of the last step before the switch to the end of the first one "
        "behind it, on the slowest rank; both are measured in steps of the larger size",
        "expected: what a rehearsal of the change (`--dry-run`) said of the pause just before it",
        "a change counts from when its newcomers' processes have started and imported",
        "held-out loss: the largest difference of a kind's mean negative log-likelihood, after any "
        "of the changes, from the one before the first",
    ]
    if bench.dtype != "float32":
        notes.append(
            f"{result.num_ties} answers of the others have a token that the plain model gives as "
            f"much as its best, within the rounding of {bench.dtype}"
        )
    setting = {
        "sizes": list(bench.sizes),
        "requests": bench.num_requests,
        "in_flight": bench.num_in_flight,
        "new_tokens": bench.num_new_tokens,
        "model": str(bench.model or "bundled"),
        "device": bench.device,
        "dispatch": bench.dispatch,
        "seed": bench.seed,
        "size_gb": bench.size_gb,
    }
    return BenchOutcome("elastic", setting, tuple(rows), tuple(notes))


def _describe_requests(result: StreamResult) -> Row:
    row: Row = {
        "what": f"requests failed or wrong, of {result.num_requests}",
        "value": result.num_failed + result.num_wrong,
        "unit": "",
        "failed": result.num_failed,
        "wrong": result.num_wrong,
        "ties": result.num_ties,
    }
    return with_goal(row, "value", 0, at_most=True)


def _compare_losses(before: dict[str, float], changes: list[_Change], same: float) -> list[Row]:
    rows = []
    for kind, loss in before.items():
        most = max(abs(change.losses[kind] - loss) for change in changes)
        row: Row = {
            "what": f"held-out loss of {kind}: largest difference",
            "value": most,
            "unit": "nats",
            "loss": loss,
        }
        rows.append(with_goal(row, "value", same, at_most=True))
    return rows


def _describe_change(change: _Change, link: float | None, *, is_cpu: bool) -> list[Row]:
    report, name = change.report, f"{change.before} to {change.after} ranks"
    step_s = change.step_s[max(change.before, change.after)]
    pause_ms = (report.pause_s or 0.0) * 1000
    pause: Row = {
        "what": f"{name}: pause",
        "value": pause_ms / 1000 / step_s if is_cpu else pause_ms,
        "unit": "steps" if is_cpu else "ms",
        "pause_ms": pause_ms,
        "expected_ms": change.expected_s * 1000,
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
    rows = [
        with_goal(pause, "value", PAUSE_STEPS if is_cpu else PAUSE_MS, at_most=True),
        with_goal(total, "value", UP_S, at_most=True) if has_goal else total,
    ]
    if link is not None and report.newcomer_bytes_per_s is not None:
        rate: Row = {
            "what": f"{name}: a newcomer's weights",
            "value": report.newcomer_bytes_per_s / 1e9,
            "unit": "GB/s",
            "of_link": report.newcomer_bytes_per_s / link,
        }
        if report.bytes >= LEAST_LINK_BYTES:
            rate = with_goal(rate, "of_link", LINK_SHARE, at_most=False)
        rows.append(rate)
    return rows
