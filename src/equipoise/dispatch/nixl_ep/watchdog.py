"""A deadline for native calls that keep Python's lock: in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

# It is killed by its parent, or hears of its parent's end, or ends it.
_WATCH = """
import os, select, signal, sys
if not select.select([0], [], [], float(sys.argv[2]))[0]:
    os.write(2, (sys.argv[3] + "\\n").encode())
    os.kill(int(sys.argv[1]), signal.SIGKILL)
"""


@contextmanager
def end_process_after(seconds: float, last_words: str) -> Iterator[None]:
    """End this process if the block takes longer.

    While a native call keeps Python's lock no thread of Python runs, so nothing in this process
    can give the call up. A process that ends is seen by its peers and by whoever started it; one
    that hangs is not.

    Args:
        seconds: until then.
        last_words: one line to standard error before that.
    Collective: none.
    """
    watcher = subprocess.Popen(  # noqa: S603 - this interpreter, and nothing of a user's
        [sys.executable, "-I", "-S", "-c", _WATCH, str(os.getpid()), str(seconds), last_words],
        stdin=subprocess.PIPE,
    )
    assert watcher.stdin is not None
    try:
        yield
    finally:
        watcher.kill()
        watcher.wait()
        watcher.stdin.close()
