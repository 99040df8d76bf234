"""What a benchmark says, whichever it is: rows, and what they could not show here."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

FORMAT_VERSION = 1

Row = dict[str, Any]
"""One case: plain values by name. A row with a goal has `goal`, a number; `goal_of`, the name of
the value that is compared with it; `goal_is`, "at least" or "at most"; and `met`."""


@dataclass(frozen=True)
class BenchOutcome:
    """Everything that was measured in one run.

    Attributes:
        name: of the benchmark.
        setting: what was measured with, by option name.
        rows: one per case, in the order in which they are shown.
        notes: what stands beside the figures: cases left out and what they need, limits found.
        versions: of the packages that figures depend on.
        figures: what stands beside the rows in the JSON, by name.
    """

    name: str
    setting: Mapping[str, Any]
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    versions: Mapping[str, str | None] = field(default_factory=dict)
    figures: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """One object with `rows`, as text that ends with a newline."""
        values = {
            "format_version": FORMAT_VERSION,
            "bench": self.name,
            "setting": dict(self.setting),
            "rows": list(self.rows),
            "notes": list(self.notes),
            "machine": describe_machine(),
            "versions": dict(self.versions),
            **self.figures,
        }
        return json.dumps(values, indent=2, allow_nan=False) + "\n"


def with_goal(row: Row, goal_of: str, goal: float, *, at_most: bool = False) -> Row:
    """The row, with its goal and whether the named value meets it.

    Args:
        row: of a case.
        goal_of: name of the value that has a goal.
        goal: the least that it should be.
        at_most: the goal is the most that it should be.
    """
    value = row[goal_of]
    met = bool(value <= goal if at_most else value >= goal)
    return {
        **row,
        "goal_of": goal_of,
        "goal_is": "at most" if at_most else "at least",
        "goal": goal,
        "met": met,
    }


def describe_machine() -> dict[str, Any]:
    """Processor, cores and operating system, as far as Python knows them."""
    return {
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
