"""The closing tables of a job, as text, for terminal and page alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from equipoise.report.summary import JobSummary
from equipoise.report.wording import say_bytes, say_count, say_seconds


class TextTable(NamedTuple):
    """A table of text.

    Attributes:
        title: what it shows.
        columns: headings; the first column's cells are names, the others' numbers.
        rows: cells.
    """

    title: str
    columns: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def list_imbalance(summary: JobSummary) -> TextTable:
    """The slowest rank's load over its share, over all steps covered and by kind of text."""
    steps = summary.covered_steps
    over = f"steps {steps[0]} to {steps[1]}" if steps else "no steps"
    figures = {"all": summary.covered.balancedness()}
    figures |= {kind: tally.balancedness() for kind, tally in summary.covered_kinds.items()}
    return TextTable(
        f"Slowest rank's load over its share, {over} with balancing on",
        ("kind of text", "initial placement", "as balanced"),
        [
            (name, f"{1 / figure.before:.2f}", f"{1 / figure.after:.2f}")
            for name, figure in figures.items()
        ],
    )


def list_passes(summary: JobSummary) -> TextTable:
    """What each pass did and took."""
    rows = []
    for in_pass in ("off", "on"):
        cpu_s = summary.expert_cpu_s(in_pass)
        rate = summary.tokens_per_s(in_pass)
        rows.append(
            (
                in_pass,
                f"{summary.num_new_tokens(in_pass):,}",
                "-" if rate is None else f"{rate:,.0f}",
                f"{cpu_s.max():.2f}",
                f"{np.mean(cpu_s):.2f}",
            )
        )
    columns = ("balancing", "new tokens", "tokens/s", "expert CPU s, slowest rank", "mean rank")
    return TextTable("Both passes over the same prompts", columns, rows)


def list_losses(summary: JobSummary) -> TextTable:
    """Held-out loss of each kind of text; no rows if none was scored."""
    losses = summary.result.losses if summary.result else ()
    return TextTable(
        "Loss on held-out text, nats per token",
        ("kind of text", "initial placement", "as balanced", "plain model"),
        [
            (
                loss.kind,
                f"{loss.off:.4f}",
                f"{loss.on:.4f}",
                "not checked" if loss.plain is None else f"{loss.plain:.4f}",
            )
            for loss in losses
        ],
    )


def list_moves(summary: JobSummary) -> TextTable:
    """Each rebalance: what it moved, what that cost and what it brought."""
    rows = [
        (
            f"{record.step:,}",
            f"{record.moves:,}",
            f"{record.local_moves:,}",
            say_bytes(record.bytes),
            say_seconds(record.plan_s),
            say_seconds(record.transfer_s),
            f"{record.balancedness_before.mean():.3f}",
            f"{record.balancedness_after.mean():.3f}",
        )
        for record in summary.rebalances
    ]
    columns = (
        "after step",
        "experts moved",
        "within ranks",
        "bytes",
        "planned in",
        "moved in",
        "balancedness of the window before",
        "after",
    )
    return TextTable(say_count(len(rows), "rebalance"), columns, rows)
