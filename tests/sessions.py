"""Commands in processes of their own, and what becomes of the processes that they start."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from tests.switches import without_switches


def start(
    folder: Path, module: str, *words: str, environment: Mapping[str, str] | None = None
) -> subprocess.Popen[str]:
    """Run a module of Python in a session of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *words],
        cwd=folder,
        env={**without_switches(os.environ), "OMP_NUM_THREADS": "1", **(environment or {})},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def end_session(process: subprocess.Popen[str]) -> None:
    """End what is left of a process and those that it started."""
    for pid in list_session(process.pid):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    for stream in (process.stdout, process.stderr):
        assert stream is not None
        stream.close()


def wait_until_alone(session: int, deadline: float) -> None:
    """Fail at the deadline, in `time.monotonic()`, if processes of a session still live."""
    while others := list_session(session):
        assert time.monotonic() < deadline, f"processes {others} still run"
        os.sched_yield()


def list_session(session: int) -> list[int]:
    """Processes that live in a session."""
    return [pid for pid, fields in read_processes() if int(fields[3]) == session]


def list_children(parent: int) -> list[int]:
    """Children of a process that live, in the order of their start."""
    children = {pid: f for pid, f in read_processes() if int(f[1]) == parent}
    return sorted(children, key=lambda pid: (int(children[pid][19]), pid))


def read_processes() -> Iterator[tuple[int, list[str]]]:
    """Every process that lives, with the fields that its stat has behind its name."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            fields = path.read_text().rpartition(")")[2].split()
            if fields[0] not in "ZX":
                yield int(path.parent.name), fields
