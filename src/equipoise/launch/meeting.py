"""Ranks that a launcher started find each other, and compare what each was asked for.

They meet in the launcher's store, before any of them loads a model: a rank with a wrong option, or
with another one than the rest, is found at once, and one rank alone says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import cast

from torch.distributed import rendezvous  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from equipoise.comm.deadline import call_in_time
from equipoise.comm.exchange import name_ranks
from equipoise.elastic.spec import ServiceSpec
from equipoise.errors import MembershipError
from equipoise.job.spec import JobSpec

LEAVE_S = 3.0
"""How long a rank that ends waits for the one that says why."""

_PREFIX = "equipoise"


@dataclass(frozen=True)
class Word:
    """What a rank says of the job that it was asked for.

    Attributes:
        problem: why it cannot begin, or None.
        facts: what must be equal on all ranks, by name; empty where there is a problem.
    """

    problem: str | None
    facts: Mapping[str, str]


@dataclass(frozen=True)
class Refusal:
    """Why a job does not begin.

    Attributes:
        speaker: the rank that says so.
        text: what it says, in one line.
    """

    speaker: int
    text: str


def join_store(rank: int, size: int, environment: Mapping[str, str], timeout_s: float) -> Store:
    """Reach the store that the variables of an env:// job name; rank 0 may have to open it.

    Args:
        rank: of this process.
        size: R.
        environment: of this process.
        timeout_s: longest wait for it.
    Collective: every rank of the job.
    Raises: MembershipError that names host and port, if they are taken or nobody answers there.
    """
    where = f"{environment['MASTER_ADDR']}:{environment['MASTER_PORT']} (MASTER_ADDR, MASTER_PORT)"
    # torch complains in C++ beside the exception that we turn into one line.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        return call_in_time(lambda: _rendezvous(rank, size, timeout_s), timeout_s + LEAVE_S)
    except TimeoutError:
        said = f"no store answers at {where} within {timeout_s:.0f} s: does another program listen?"
        raise MembershipError(f"rank {rank}: {said}", rank=rank) from None
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())
        said = f"no store at {where}: {reason}"
        if "EADDRINUSE" in reason:
            said = f"the port of {where} is in use: choose one that is free"
        raise MembershipError(f"rank {rank}: {said}", rank=rank) from error


def compare_words(
    store: Store, rank: int, size: int, mine: Word, timeout_s: float
) -> Refusal | None:
    """Find out whether all ranks can begin, and were asked for the same.

    Args:
        store: of the job.
        rank: of this process.
        size: R.
        mine: this rank's word.
        timeout_s: longest wait for another rank's.
    Returns:
        None if they can; else why not, the same on every rank.
    Collective: every rank of the job.
    Raises: MembershipError that names the ranks that did not come.
    """
    heard: dict[int, Word] = {}

    def exchange() -> None:
        store.set(f"{_PREFIX}/word/{rank}", json.dumps(asdict(mine)))
        for peer in range(size):
            key = f"{_PREFIX}/word/{peer}"
            store.wait([key], timedelta(seconds=timeout_s))
            heard[peer] = Word(**json.loads(store.get(key)))

    try:
        call_in_time(exchange, timeout_s + LEAVE_S)
    except (RuntimeError, TimeoutError) as error:
        missing = [peer for peer in range(size) if peer not in heard]
        said = f"{name_ranks(missing[:1])} did not come within {timeout_s:.0f} s"
        raise MembershipError(f"rank {rank}: {said}", rank=rank, peer=missing[0]) from error
    return _judge([heard[peer] for peer in range(size)])


def describe_spec(spec: JobSpec) -> dict[str, str]:
    """What must be equal on all ranks of a job.

    Args:
        spec: this rank's; its model may lie elsewhere on another host.
    Collective: none.
    """
    texts = [(prompt.kind, prompt.text) for prompt in (*spec.prompts, *spec.held_out)]
    facts = {
        "model": _digest((spec.model / "config.json").read_text(encoding="utf-8")),
        "prompts": _digest(json.dumps([len(spec.prompts), texts])),
    }
    for name in ("dtype", "device", "max_new_tokens", "max_batch_size", "max_steps", "check"):
        facts[name] = str(getattr(spec, name))
    return {**facts, "seed": str(spec.seed), **{k: str(v) for k, v in spec.config}}


def describe_service(spec: ServiceSpec) -> dict[str, str]:
    """What must be equal on all ranks of a service. As `describe_spec`."""
    values = spec.to_json()
    values["model"] = _digest((spec.model / "config.json").read_text(encoding="utf-8"))
    values |= values.pop("config")
    # Where its controller listens is the first rank's to say.
    del values["interface"]
    return {name: str(value) for name, value in values.items()}


def claim(store: Store, rank: int, *, grace_s: float = 0.0) -> bool:
    """Whether this rank is the one that says what ended the job; yes, if nobody can be asked.

    Args:
        store: of the job.
        rank: of this process.
        grace_s: how long to leave the word to a rank that knows better.
    Collective: each rank that ends early, once.
    """
    key = f"{_PREFIX}/speaker"

    def ask() -> int:
        if grace_s:
            with contextlib.suppress(RuntimeError):
                store.wait([key], timedelta(seconds=grace_s))
        return int(store.compare_set(key, "", str(rank)))

    try:
        return call_in_time(ask, grace_s + LEAVE_S) == rank
    except (RuntimeError, TimeoutError):
        return True


def leave(store: Store, rank: int, size: int, say: Callable[[], None] | None) -> None:
    """End early, but not before it has been said why.

    A launcher ends all ranks as soon as one has ended, and the store may be a part of rank 0.

    Args:
        store: of the job.
        rank: of this process.
        size: R.
        say: says why, on the rank whose part that is; None on others.
    Collective: each rank that ends early; waits LEAVE_S at most for one that does not.
    """
    if say is not None:
        say()

    def wait_for_others() -> None:
        if say is not None:
            store.set(f"{_PREFIX}/said", "yes")
        else:
            store.wait([f"{_PREFIX}/said"], timedelta(seconds=LEAVE_S))
        store.set(f"{_PREFIX}/left/{rank}", "yes")
        if rank == 0:
            left = [f"{_PREFIX}/left/{peer}" for peer in range(size)]
            store.wait(left, timedelta(seconds=LEAVE_S))

    with contextlib.suppress(RuntimeError, TimeoutError):
        call_in_time(wait_for_others, 2 * LEAVE_S)


def _rendezvous(rank: int, size: int, timeout_s: float) -> Store:
    timeout = timedelta(seconds=timeout_s)
    store, _, _ = next(iter(rendezvous("env://", rank, size, timeout=timeout)))
    return cast("Store", store)


def _judge(words: list[Word]) -> Refusal | None:
    problems = {rank: word.problem for rank, word in enumerate(words) if word.problem is not None}
    if problems:
        speaker, text = next(iter(problems.items()))
        shared = len(problems) == len(words) and len(set(problems.values())) == 1
        return Refusal(speaker, text if shared else f"rank {speaker}: {text}")
    first = words[0].facts
    for rank, word in enumerate(words):
        if word.facts != first:
            differences = [
                _describe(name, word.facts.get(name, "unknown"), value)
                for name, value in first.items()
                if word.facts.get(name) != value
            ]
            text = f"rank {rank} was given other options than rank 0: {', '.join(differences)}"
            return Refusal(0, text)
    return None


def _describe(name: str, theirs: str, ours: str) -> str:
    if name in ("model", "prompts"):
        return f"another {name}" if name == "model" else f"other {name}"
    return f"{name} {theirs}, not {ours}"


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
