"""Numbers and phases as people read them."""

from __future__ import annotations

from pathlib import Path

from equipoise.bundled import model_directory
from equipoise.job.records import LoadRecord, RebalanceRecord

PHASES = {
    "off": "serving, balancing off",
    "on": "serving, balancing on",
    "loss": "scoring held-out text",
    "check": "comparing with the plain model in one process",
}


def name_model(model: str) -> str:
    """A model directory as given, or `bundled model`."""
    return "bundled model" if Path(model) == model_directory() else model


def say_bytes(number: float) -> str:
    """A size in bytes with a decimal unit, like `1.3 MB`."""
    for unit in ("B", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} GB"


def say_count(number: int, what: str) -> str:
    """A number of things, like `1 expert` and `1,024 experts`."""
    return f"{number:,} {what}" + ("" if number == 1 else "s")


def say_seconds(seconds: float) -> str:
    """A duration, like `12 ms` and `1.3 s`."""
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def say_loading(record: LoadRecord) -> str:
    """How far rank 0 is with reading its weights."""
    read, due = say_bytes(record.bytes_read), say_bytes(record.bytes_due)
    return f"reading weights: {read} of {due} on rank 0"


def say_rebalance(record: RebalanceRecord) -> str:
    """One line on what a rebalance did, what it cost and what it brought."""
    if not record.moves and not record.local_moves:
        return f"step {record.step}: planned in {say_seconds(record.plan_s)}, nothing moved"
    within = f" and {record.local_moves:,} within ranks" if record.local_moves else ""
    return (
        f"step {record.step}: {say_count(record.moves, 'expert')} moved{within}, "
        f"{say_bytes(record.bytes)} in {say_seconds(record.transfer_s)} "
        f"(planned in {say_seconds(record.plan_s)}); balancedness of the window "
        f"{record.balancedness_before.mean():.2f} -> {record.balancedness_after.mean():.2f}"
    )
