"""An order between two threads, and between their streams."""

from __future__ import annotations

import threading
import time

import torch

_POLL_S = 50e-6
"""Between two looks at the device: not long beside a step, and the interpreter is free."""


class CpuGpuEvent:
    """One thread records that its work so far is the other's to build on; the other waits.

    Unlike a CUDA event, the wait may come before the record: it blocks until then. After a wait the
    event can be used again. On the CPU, where work is over when it is called, there is no stream.

    Protocol: record, wait, record, wait ... One thread records, one waits; `cancel` may come from
    any.

    Args:
        device: of the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._event = torch.cuda.Event() if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        if self._event is not None:
            # The device's part of it is made by its first record, which may be in a hurry later.
            self._event.record()
        self._changed = threading.Condition()
        self._is_recorded = False
        self._is_cancelled = False

    def record(self, stream: torch.cuda.Stream | None = None) -> None:
        """Stand behind what the stream was given so far.

        Args:
            stream: of a CUDA device; None for the current one.
        Collective: none; the other thread waits once for each record.
        Raises: RuntimeError if the last record was not waited for: two would be taken for one.
        """
        with self._changed:
            if self._is_recorded:
                raise RuntimeError("recorded again before anybody waited for the record before")
            if self._event is not None:
                self._event.record(stream)
            self._is_recorded = True
            self._changed.notify_all()

    def wait(self, timeout_s: float, stream: torch.cuda.Stream | None = None) -> bool:
        """Wait for the record, then for the work behind which it stands.

        Args:
            timeout_s: longest wait, for the record and on the host for the work together.
            stream: waits for the work in this thread's stead, so that only the record is waited
                for here; None to wait on the host until the work is over.
        Returns:
            False if the event was cancelled before it was recorded.
        Collective: none; the other thread records.
        Raises: TimeoutError if the record does not come, or the work behind it is not over.
        """
        deadline = time.monotonic() + timeout_s
        with self._changed:
            while not self._is_recorded:
                if self._is_cancelled:
                    return False
                left = deadline - time.monotonic()
                if left <= 0:
                    raise TimeoutError(f"nothing was recorded within {timeout_s:.1f} s")
                self._changed.wait(left)
            self._is_recorded = False
        # Not under the lock: the work may take its time.
        if self._event is not None:
            if stream is not None:
                stream.wait_event(self._event)
            while stream is None and not self._event.query():  # type: ignore[no-untyped-call]
                if time.monotonic() > deadline:
                    raise TimeoutError(f"the device was not through within {timeout_s:.1f} s")
                time.sleep(_POLL_S)
        return True

    def cancel(self) -> None:
        """End a wait that has not seen a record, now and later. Collective: none."""
        with self._changed:
            self._is_cancelled = True
            self._changed.notify_all()
